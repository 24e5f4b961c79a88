"""What a model may be built with: every setting of the constructors is listed, or known to be none of structure."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import hypothesis
import pytest
import timm
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from workers import model_settings as settings
from workers.models import FAMILIES, ModelError, describe, model_info, skeleton
from workers.models.meter import MeterShape
from workers.models.timm_vit import ACTIVATIONS
from workers.models.vilt import ViltShape
from workers.tasks import TaskInfo

NOT_STRUCTURE = {
    *{"embed_layer", "embed_norm_layer", "norm_layer", "act_layer", "block_fn", "mlp_layer", "attn_layer"},
    *{"device", "dtype"},
}
"""Of timm's VisionTransformer: classes that are called, and where it lies."""


def test_every_argument_of_the_constructors_is_judged() -> None:
    taken = set(list(inspect.signature(VisionTransformer.__init__).parameters)[1:])
    assert set(settings.SETTINGS["timm"]) - {"pos_embed_std", "head_dim", "norm_eps", "act"} == taken - NOT_STRUCTURE
    assert settings.SETTINGS["timm"]["act"] == settings.Word(tuple(ACTIVATIONS))
    assert not set(settings.SETTINGS["timm"]) & set(inspect.signature(timm.create_model).parameters)
    for family, shape in (("vilt", ViltShape), ("meter", MeterShape)):
        assert set(settings.SETTINGS[family]) == {field.name for field in dataclasses.fields(shape)}
    assert settings.SETTINGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize(("family", "shape"), [("vilt", ViltShape), ("meter", MeterShape)])
def test_the_defaults_are_within_their_ranges(family: str, shape: type) -> None:
    standing = {f.name: f.default for f in dataclasses.fields(shape) if f.default is not dataclasses.MISSING}
    assert settings.faults(family, standing) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("depth", 0, "must be at least 1"),
        ("depth", True, "must be a valid integer"),
        ("depth", 3.0, "must be a valid integer"),
        ("depth", [3], "must be a valid integer"),
        ("embed_dim", 10**6, "must be at most 65,536"),
        ("mlp_ratio", float("nan"), "must be a finite number"),
        ("mlp_ratio", 10**400, "must be at most 64"),
        ("qk_norm", 1, "must be true or false"),
        ("global_pool", "", "must be one of token, avg"),
        ("checkpoint_path", "/tmp/x", "is no setting of timm"),
        ("act_layer", "relu", "is no setting of timm"),
        ("embed_dims", 3, "nearest: embed_dim"),
    ],
)
def test_faults(key: str, value: object, said: str) -> None:
    (fault,) = settings.faults("timm", {key: value, "init_values": None})
    assert fault.startswith(f"model.create.{key} ")
    assert said in fault


ODD = st.sampled_from([None, True, "", "x", -1, 0, 1e9, 3.5, [1], [16, 32], {"a": 1}, 10**400, float("nan")])


def values(setting: settings.Setting) -> st.SearchStrategy[Any]:
    """Values of a setting, small where it is a size, and some that are none."""
    if isinstance(setting, settings.Flag):
        return st.booleans()
    if isinstance(setting, settings.Word):
        return st.sampled_from(setting.words)
    if isinstance(setting, settings.Number) and setting.real:
        return st.floats(setting.low, setting.high)
    return st.integers(1, 4) | st.sampled_from([8, 16, 32]) | ODD


CHOSEN = st.lists(st.sampled_from(sorted(settings.SETTINGS["timm"])), max_size=4, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: values(settings.SETTINGS["timm"][key]) for key in keys})
)
NAMED = st.sampled_from(
    [None, "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224"]
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(name=NAMED, create=CHOSEN)
def test_whatever_is_chosen_is_a_model_or_is_refused(name: str | None, create: dict[str, Any]) -> None:
    small = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    data = TaskInfo(num_classes=3, in_chans=3, image_size=16, class_names=("a", "b", "c"))
    told = {"family": "timm", "name": name, "create": {**small, **create}}
    try:
        model = skeleton(describe(told, data))
    except ModelError:
        return
    assert model_info(model).num_classes == 3


@pytest.mark.parametrize("depth", [0, -1, 257, None, 1.0, "2", True])
def test_a_depth_that_is_none_is_refused_for_names_and_for_built_models(depth: object) -> None:
    data = TaskInfo(num_classes=3, in_chans=3, image_size=16, class_names=("a", "b", "c"))
    for name in (None, "vit_tiny_patch16_224"):
        with pytest.raises(ModelError, match=r"model\.create\.depth must be"):
            skeleton(describe({"family": "timm", "name": name, "create": {"depth": depth}}, data))
