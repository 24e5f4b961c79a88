"""Key maps that are read off shapes and names: for many ways of naming the same model."""

from __future__ import annotations

import re

import pytest
import torch

from tests.workers.models.test_foreign_weights import DATA, SHAPE
from workers import models
from workers.models import guessing
from workers.models.key_map import rename

OUTER = {
    "cls_token": "class_token",
    "pos_embed": "pos_embedding",
    "patch_embed.proj.": "conv_proj.",
    "norm.": "encoder.ln.",
    "head.": "classifier.",
}
BLOCKS = {
    "torchvision": (
        "encoder.layers.encoder_layer_{}.",
        {
            "norm1.": "ln_1.",
            "attn.qkv.": "self_attention.in_proj_",
            "attn.proj.": "self_attention.out_proj.",
            "norm2.": "ln_2.",
            "mlp.fc1.": "mlp.0.",
            "mlp.fc2.": "mlp.3.",
        },
    ),
    "torch's encoder layer": (
        "transformer.layers.{}.",
        {
            "norm1.": "norm1.",
            "attn.qkv.": "self_attn.in_proj_",
            "attn.proj.": "self_attn.out_proj.",
            "norm2.": "norm2.",
            "mlp.fc1.": "linear1.",
            "mlp.fc2.": "linear2.",
        },
    ),
    "a student": (
        "vit.layer{}.",
        {
            "norm1.": "pre_norm.",
            "attn.qkv.": "mha.qkv.",
            "attn.proj.": "mha.output.",
            "norm2.": "post_norm.",
            "mlp.fc1.": "ffn.dense_in.",
            "mlp.fc2.": "ffn.dense_out.",
        },
    ),
    "CLIP": (
        "visual.transformer.resblocks.{}.",
        {
            "norm1.": "ln_1.",
            "attn.qkv.": "attn.in_proj_",
            "attn.proj.": "attn.out_proj.",
            "norm2.": "ln_2.",
            "mlp.fc1.": "mlp.c_fc.",
            "mlp.fc2.": "mlp.c_proj.",
        },
    ),
    "vit-pytorch": (
        "transformer.layers.{}.",
        {
            "norm1.": "0.norm.",
            "attn.qkv.": "0.to_qkv.",
            "attn.proj.": "0.to_out.0.",
            "norm2.": "1.net.0.",
            "mlp.fc1.": "1.net.1.",
            "mlp.fc2.": "1.net.4.",
        },
    ),
}
APART = {
    "transformers": ("attention.attention.query.", "attention.attention.key.", "attention.attention.value."),
    "q_proj": ("attn.q_proj.", "attn.k_proj.", "attn.v_proj."),
    "to_q": ("attn.to_q.", "attn.to_k.", "attn.to_v."),
    "wq": ("attn.wq.", "attn.wk.", "attn.wv."),
}


def own() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model = models.build({"family": "timm", "create": SHAPE}, DATA)
    return model, dict(model.state_dict())


def called(name: str, stem: str, inside: dict[str, str]) -> str:
    """Returns a stranger's name of a tensor."""
    if match := re.match(r"blocks\.(\d+)\.(.*\.)", name):
        return stem.format(match[1]) + inside.get(match[2], match[2]) + name.rpartition(".")[2]
    return next((theirs + name.removeprefix(ours) for ours, theirs in OUTER.items() if name.startswith(ours)), name)


def guessed(theirs: dict[str, torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    rules = guessing.key_map(theirs, 48)
    return rename(theirs, rules, module)[0]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("naming", BLOCKS)
def test_names_are_found_in_whatever_order_they_lie(naming: str, ordered: bool) -> None:
    model, tensors = own()
    theirs = {called(name, *BLOCKS[naming]): tensor for name, tensor in tensors.items()}
    assert not theirs.keys() & tensors.keys()
    found = guessed(dict(sorted(theirs.items())) if ordered else theirs, model)
    assert {name: id(tensor) for name, tensor in found.items()} == {n: id(t) for n, t in tensors.items()}


@pytest.mark.parametrize("naming", APART)
def test_queries_keys_and_values_that_are_apart_are_put_together(naming: str) -> None:
    model, tensors = own()
    stem, inside = (
        "encoder.layer.{}.",
        {"norm1.": "layernorm_before.", "norm2.": "layernorm_after.", "attn.proj.": "attention.output.dense."},
    )
    theirs = {}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            start, _, end = name.partition("attn.qkv.")
            block = stem.format(start.split(".")[1])
            theirs |= {block + part + end: third for part, third in zip(APART[naming], tensor.chunk(3), strict=True)}
        else:
            theirs[called(name, stem, inside)] = tensor
    found = guessed(theirs, model)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_what_shapes_do_not_tell_is_not_guessed() -> None:
    """An MLP that is no wider than the model: which of three square layers is which, nobody can say."""
    model = models.build({"family": "timm", "create": {**SHAPE, "mlp_ratio": 1.0}}, DATA)
    inside = {
        "attn.proj.": "a.",
        "mlp.fc1.": "b.",
        "mlp.fc2.": "c.",
        "attn.qkv.": "qkv.",
        "norm1.": "x.",
        "norm2.": "y.",
    }
    theirs = {called(name, "layers.{}.", inside): tensor for name, tensor in model.state_dict().items()}
    targets = set(guessing.key_map(theirs, 48).values())
    assert r"blocks.\1.attn.qkv.\2" in targets
    assert not {
        target for target in targets if any(part in target for part in ("proj.\\2", "fc1", "fc2", "norm1", "norm2"))
    }


def test_names_without_blocks_give_nothing() -> None:
    assert guessing.key_map({}, 48) == {}
    assert guessing.key_map({"a": torch.zeros(3), "b.weight": torch.zeros(3, 3), "7": torch.zeros(())}, 48) == {}
