"""What ``create`` may say of a model: numbers, flags and words that decide its structure, each with its range. Standard library only.

Nothing that a library would open, fetch, import or call is among them: timm's ``create_model`` also takes paths of
checkpoints, which versions before 1.0.26 unpickle, folders, names of hubs, and classes of layers. An artefact's manifest and a
study file come from anyone, so that what is not listed here never reaches a constructor.

The ranges are no advice: beyond them nothing is a vision transformer, and building its modules, even without weights, would
take minutes or wrap around. Whether a model fits a machine is asked elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Number:
    """A number from ``low`` to ``high`` inclusive: whole, or any where ``real``; or None where ``optional``."""

    low: float
    high: float
    real: bool = False
    optional: bool = False

    def rule(self, value: object) -> str | None:
        """Returns what ``value`` must be, None where it is that."""
        if value is None and self.optional:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float) if self.real else int):
            return "must be a valid number" if self.real else "must be a valid integer"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if value < self.low:
            return "must not be negative" if self.low == 0 else f"must be at least {self.low:g}"
        return f"must be at most {self.high:,.15g}" if value > self.high else None


@dataclass(frozen=True)
class Sides:
    """A side in pixels as ``side`` has it, or two: height and width."""

    side: Number

    def rule(self, value: object) -> str | None:
        """Returns what ``value`` must be, None where it is that."""
        both = list(value) if isinstance(value, list | tuple) and len(value) == 2 else [value]
        return next((rule for one in both if (rule := self.side.rule(one)) is not None), None)


@dataclass(frozen=True)
class Flag:
    """True or false; or None where ``optional``."""

    optional: bool = False

    def rule(self, value: object) -> str | None:
        """Returns what ``value`` must be, None where it is that."""
        return None if isinstance(value, bool) or (value is None and self.optional) else "must be true or false"


@dataclass(frozen=True)
class Word:
    """One of ``words``."""

    words: tuple[str, ...]

    def rule(self, value: object) -> str | None:
        """Returns what ``value`` must be, None where it is that."""
        return None if isinstance(value, str) and value in self.words else f"must be one of {', '.join(self.words)}"


Setting = Number | Sides | Flag | Word

WIDTH, DEPTH, HEADS, SIDE = Number(1, 65_536), Number(1, 256), Number(1, 4_096), Number(1, 16_384)
_RATIO, _WORDS, _SHARE = Number(1, 64), Number(1, 8_388_608), Number(0, 1, real=True)
_CLASSES = Number(1, 1_048_576)
_STD = Number(0, 100, real=True, optional=True)

_TIMM: Mapping[str, Setting] = {
    **{"img_size": Sides(SIDE), "patch_size": SIDE, "in_chans": Number(1, 1_024), "num_classes": _CLASSES},
    **{"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": Number(1 / 64, 64, real=True)},
    **{"qkv_bias": Flag(), "qk_norm": Flag(), "proj_bias": Flag(), "pre_norm": Flag(), "final_norm": Flag()},
    **{"scale_attn_norm": Flag(), "scale_mlp_norm": Flag(), "fc_norm": Flag(optional=True), "fix_init": Flag()},
    **{"class_token": Flag(), "no_embed_class": Flag(), "reg_tokens": Number(0, 4_096), "pool_include_prefix": Flag()},
    **{"dynamic_img_size": Flag(), "dynamic_img_pad": Flag(), "init_values": _STD, "pos_embed_std": _STD},
    **{"drop_rate": _SHARE, "pos_drop_rate": _SHARE, "patch_drop_rate": _SHARE, "proj_drop_rate": _SHARE},
    **{"attn_drop_rate": _SHARE, "drop_path_rate": _SHARE, "pos_embed": Word(("learn", "none", ""))},
    "global_pool": Word(("token", "avg", "avgmax", "max", "map")),
    "weight_init": Word(("", "jax", "jax_nlhb", "moco", "reset", "skip")),
    **{
        "head_dim": Number(1, 65_536),
        "norm_eps": Number(0, 1, real=True),
        "act": Word(("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")),
    },
}
"""Of timm's VisionTransformer all but its layers' classes, device and dtype; and ``pos_embed_std``, ``head_dim``,
``norm_eps`` and ``act``, which are ours."""

_JOINT: Mapping[str, Setting] = {
    **{"task": Word(("vqa", "nlvr2", "nlvr1", "entailment", "retrieval"))},
    **{"num_classes": Number(1, 1_048_576, optional=True), "embed_dim": WIDTH, "num_heads": HEADS, "mlp_ratio": _RATIO},
    **{"img_size": SIDE, "patch_size": SIDE, "in_chans": Number(1, 1_024), "vocab_size": _WORDS},
    **{"max_text_tokens": Number(1, 1_048_576), "dropout": _SHARE},
}
"""Of both vision-language families."""

_VILT: Mapping[str, Setting] = {
    **{"depth": DEPTH, "max_image_length": Number(1, 2**28, optional=True), "patch_seed": Number(0, 2**63 - 1)},
    **{"shuffle_patches": Flag(), "pos_embed_std": Number(0, 100, real=True), "init_std": Number(0, 100, real=True)},
}

_METER: Mapping[str, Setting] = {
    **{"cross_depth": DEPTH, "text_dim": WIDTH, "text_depth": DEPTH, "text_heads": HEADS, "pad_id": Number(0, 2**23)},
    **{"image_dim": WIDTH, "image_depth": DEPTH, "image_heads": HEADS, "pos_embed_std": _STD, "init_std": _STD},
}

SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    "timm": _TIMM,
    "vilt": {**_JOINT, **_VILT},
    "meter": {**_JOINT, **_METER},
}
"""Family to the settings that its models may be built with; whoever adds a family of models lists its own."""


def nearest(family: str, key: object) -> str | None:
    """Returns the setting of a family whose name is nearest to ``key``, None where none is near."""
    near = get_close_matches(str(key), SETTINGS[family], n=1)
    return near[0] if near else None


def faults(family: str, create: Mapping[str, object]) -> list[str]:
    """Returns what is wrong with ``create``, a sentence a fault: keys that are no settings of the family, and values beyond their range."""
    found = []
    for key, value in create.items():
        setting = SETTINGS[family].get(key)
        if setting is None:
            near = nearest(family, key)
            found.append(f"model.create.{key} is no setting of {family}" + (f"; nearest: {near}" if near else ""))
        elif rule := setting.rule(value):
            found.append(f"model.create.{key} {rule}, got {value!r:.80}")
    return found
