"""What runs on which vision transformer of timm: docs/supported-models.md says it, `plan` knows it, and no technique raises.

The page is made anew by ``python -m tests.workers.techniques.test_supported_models``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import timm

from tests.places import ROOT
from tests.workers.techniques.carried_out import carry_out, reason_against
from tests.workers.techniques.reduced import PATTERNS, built, described, kind, names, pictures
from tests.workers.techniques.test_contract import SAMPLES
from workers import models
from workers.models import ModelError
from workers.techniques import registry

PAGE = ROOT / "docs" / "supported-models.md"

NOTHING = {"head_ratio": 0.0, "mlp_ratio": 0.0}
LESS: dict[str, dict[str, Any]] = {
    "distill": {"loss": {}, "depth": {"depth": 0.5}, "width": {"width": 0.5}, "token": {"token": True}},
    "magnitude_prune": {
        "head_ratio": {**NOTHING, "head_ratio": 0.5},
        "mlp_ratio": {**NOTHING, "mlp_ratio": 0.25},
        "head_dim_ratio": {**NOTHING, "head_dim_ratio": 0.5, "round_to": 4},
        "embed_ratio": {**NOTHING, "embed_ratio": 0.25},
        "depth_ratio": {**NOTHING, "depth_ratio": 0.5},
    },
    "taylor_prune": {
        name: {"dimensions": name, "ratio": 0.2, "round_to": 4, "batches": 2}
        for name in ("mlp", "heads+mlp", "heads+head_dims+mlp", "all")
    },
    "importance_prune": {
        "head_ratio": {**NOTHING, "head_ratio": 0.5},
        "mlp_ratio": {**NOTHING, "mlp_ratio": 0.25},
        "head_dim_ratio": {**NOTHING, "head_dim_ratio": 0.5, "round_to": 4},
    },
    "linformer": {"": {"k": 12}},  # more than any of these models has prefix tokens
}
"""Techniques that can do less on some models than on others: what each is asked for apart."""

ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    f"`{name}`" + (f" `{part}`" if part else ""): (name, values)
    for name, sample in SAMPLES.items()
    for part, values in LESS.get(name, {"": sample}).items()
}
"""As the page calls it: the technique, and its config."""

BUILT: dict[str, dict[str, Any]] = {
    "`global_pool: max`": {"global_pool": "max"},
    "`global_pool: avgmax`": {"global_pool": "avgmax"},
    "`global_pool: map`": {"global_pool": "map"},
    "`global_pool: avg`, `class_token: false`": {"global_pool": "avg", "class_token": False},
    "`global_pool: avg`, `fc_norm: false`": {"global_pool": "avg", "fc_norm": False},
    "`global_pool: avg`, `pool_include_prefix: true`": {"global_pool": "avg", "pool_include_prefix": True},
    "`fc_norm: true`": {"fc_norm": True},
    "`final_norm: false`": {"final_norm": False},
    "`scale_attn_norm: true`": {"scale_attn_norm": True},
    "`scale_mlp_norm: true`": {"scale_mlp_norm": True},
    "`qk_norm: true`": {"qk_norm": True},
    "`pre_norm: true`": {"pre_norm": True},
    "`patch_drop_rate: 0.5`": {"patch_drop_rate": 0.5},
    "`dynamic_img_size: true`": {"dynamic_img_size": True},
    "`in_chans: 1`": {"in_chans": 1},
    "`pos_embed: none`": {"pos_embed": "none"},
    "`reg_tokens: 4`, `no_embed_class: true`": {"reg_tokens": 4, "no_embed_class": True},
    "`init_values: 0.1`": {"init_values": 0.1},
    "`qkv_bias: false`, `proj_bias: false`": {"qkv_bias": False, "proj_bias": False},
    "`drop_rate`, `proj_drop_rate`, `attn_drop_rate`, `drop_path_rate`: 0.1": dict.fromkeys(
        ("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), 0.1
    ),
}
"""Settings of a model that is built from them, beside a plain ViT's, as the page calls them."""

Answers = Mapping[str, str | None]
"""What :data:`ASKED` has, to the reason against it, None where it runs."""


def answers(description: Mapping[str, Any]) -> dict[str, str | None]:
    info = models.model_info(models.skeleton(description), "cpu")
    found = {}
    for what, (name, values) in ASKED.items():
        technique = registry()[name]
        found[what] = technique.check(info, technique.Config(**values))
    return found


def of_settings(**create: Any) -> dict[str, Any]:
    return described(None, patch_size=4, embed_dim=64, depth=2, num_heads=4, **create)


@cache
def kinds() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Returns the names by the kind of their facts, the smallest first, and those that no study takes by the reason."""
    taken: dict[str, list[tuple[int, str]]] = {}
    refused: dict[str, list[str]] = {}
    for name in names():
        try:
            info = models.model_info(models.skeleton(described(name)))
            taken.setdefault(kind(info), []).append((info.params, name))
        except ModelError as error:
            refused.setdefault(str(error).removeprefix(f"model {name} "), []).append(name)
    return {key: [name for _, name in sorted(found)] for key, found in taken.items()}, refused


# --- the page ---------------------------------------------------------------------------------------------------------


def core(reason: str) -> str:
    """Returns a reason without the setting that asked, what it must be instead, and what this model has: one sentence for all."""
    return re.sub(
        r"; (must be|here) .*$", "", re.sub(r"^((\w+=\S+|heads|head_dims|hidden|channels|token): )+", "", reason)
    )


def excluded(found: Answers) -> str:
    by_reason: dict[str, list[str]] = {}
    for what, reason in found.items():
        if reason is not None:
            by_reason.setdefault(core(reason), []).append(what)
    if not by_reason:
        return "Everything runs."
    return "\n".join(["| not possible | why |", "| --- | --- |", *_rows(by_reason)])


def _rows(by_reason: Mapping[str, list[str]]) -> Iterator[str]:
    for reason, whats in by_reason.items():
        yield f"| {', '.join(_joined(whats))} | {reason} |"


def _joined(whats: Iterable[str]) -> Iterator[str]:
    """Yields each technique once, with the parts of it in brackets."""
    parts: dict[str, list[str]] = {}
    for what in whats:
        name, _, part = what.partition(" ")
        parts.setdefault(name, []).extend([part] if part else [])
    for name, of in parts.items():
        yield f"{name} ({', '.join(of)})" if of else name


def said_of_names() -> str:
    taken, refused = kinds()
    groups: dict[str, list[str]] = {}
    for of_kind in taken.values():
        groups.setdefault(excluded(answers(described(of_kind[0]))), []).extend(of_kind)
    parts = []
    for text, members in sorted(groups.items(), key=lambda group: -len(group[1])):
        parts += [f"### {_count(members)}", _code(members), text]
    for reason, members in refused.items():
        parts += [f"### {_count(members)} that no study takes", _code(members), f"`plan` says: {reason}."]
    return "\n\n".join(parts)


def said_of_settings() -> str:
    groups: dict[str, list[str]] = {}
    for what, settings in BUILT.items():
        groups.setdefault(excluded(answers(of_settings(**settings))), []).append(what)
    return "\n\n".join(f"{'; '.join(whats)}\n\n{text}" for text, whats in groups.items())


def _count(members: list[str]) -> str:
    return f"{len(members)} model{'s' if len(members) > 1 else ''}: {sorted(members)[0]}" + (
        " and others" if len(members) > 1 else ""
    )


def _code(members: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(members))


def page(head: str) -> str:
    """Returns the whole page below its own introduction."""
    patterns = ", ".join(f"`{pattern}`" for pattern in PATTERNS)
    parts = [
        head.rstrip(),
        f"<!-- made: timm {timm.__version__} -->",
        f"Of the {len(names())} names that match {patterns} in timm {timm.__version__}.",
        "## By name",
        said_of_names(),
        "## By setting",
        "Of a plain ViT that is built, or a named one, with these settings in `model.create` or `model.options`.",
        said_of_settings(),
    ]
    return "\n\n".join(parts) + "\n"


@pytest.mark.slow
def test_the_page_says_what_plan_says() -> None:
    text = PAGE.read_text()
    if f"<!-- made: timm {timm.__version__} -->" not in text:
        pytest.skip(f"the page is of another timm than the installed {timm.__version__}")
    assert text == page(text.partition("<!-- made")[0]), (
        "make it anew: python -m tests.workers.techniques.test_supported_models"
    )


# --- nothing raises ---------------------------------------------------------------------------------------------------


def carry_out_all(description: Mapping[str, Any], asked: Iterable[str] = ASKED) -> None:
    """Carries out whatever `check` has nothing against; every technique that raises is named."""
    model, data, faults = built(description), pictures(description), []
    for what in asked:
        name, values = ASKED[what]
        if reason_against(registry()[name], values, description) is not None:
            continue
        try:
            carry_out(registry()[name], values, description, model, data)
        except Exception as error:  # noqa: BLE001 - whatever it is, a trial would end with it
            faults.append(f"{what}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


SOME = {
    "attention pooling": "vit_base_patch16_siglip_224",
    "gated": "vit_giant_patch14_reg4_dinov2",
    "rotary, gated": "eva02_small_patch14_224",
    "DINOv3": "vit_small_patch16_dinov3",
    "relative positions": "beit_base_patch16_224",
    "post-norm": "vit_base_patch16_rpn_224",
    "differential": "vit_dlittle_patch16_reg1_gap_256",
}

FEW = ("`distill` `loss`", "`magnitude_prune` `mlp_ratio`", "`svd`", "`precision`", "`smoothquant`")


@pytest.mark.parametrize("name", SOME.values(), ids=SOME.keys())
def test_the_commonest_run_on_unusual_models(name: str) -> None:
    carry_out_all(described(name), FEW)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning:timm", "ignore:Using a non-tuple:UserWarning:timm")
def test_nothing_raises_on_any_kind_of_named_model() -> None:
    faults = []
    for of_kind in kinds()[0].values():
        try:
            carry_out_all(described(of_kind[0]))
        except AssertionError as error:
            faults.append(f"{of_kind[0]}:\n{error}")
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("settings", BUILT.values(), ids=BUILT.keys())
def test_nothing_raises_whatever_the_settings(settings: dict[str, Any]) -> None:
    carry_out_all(of_settings(**settings))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text().partition("<!-- made")[0]))
