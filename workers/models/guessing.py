"""What a stranger's names could mean: a key map read off shapes and common words, for a refusal to show. Nothing is loaded by it.

A block is a family of names that differ in their first number alone. In it the joint projection is three times as high as
wide, the MLP's layers are wide one way and the other, what is square and left is the attention's output, and of two norms the
first is the one nearer to the attention by name. Where that decides nothing, nothing is guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Shape = tuple[int, ...]

_KINDS = {"weight": "weight", "gamma": "weight", "alpha": "weight", "scale": "weight", "bias": "bias", "beta": "bias"}
_NUMBERED = re.compile(r"(\D*)(\d+)(.*)")
_LEAF = re.compile(rf"(.*?)({'|'.join(_KINDS)})")
_JOINT = re.compile(r"qkv|in_proj|c_attn")
_THIRD = re.compile(r"(?:^|[._]|to|w)(query|key|value|q|k|v)(?:$|[._]|proj|lin)", re.IGNORECASE)
_FIRST, _SECOND = re.compile(r"before|pre|att|input|1"), re.compile(r"after|post|mlp|ffn?|feed|2")
_MLP = re.compile(r"mlp|ffn?|fc|feed|net|linear|dense|intermediate")
_TOKENS = {"dist": "dist_token", "reg": "reg_token", "cls": "cls_token", "class": "cls_token"}


@dataclass
class _Layer:
    """What has one stem: ``leaves`` maps weight and bias to the end of the name and the shape."""

    stem: str
    leaves: dict[str, tuple[str, Shape]] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        return self.leaves["weight"][1] if "weight" in self.leaves else ()

    def is_norm(self, width: int) -> bool:
        return {kind: shape for kind, (_, shape) in self.leaves.items()} == {"weight": (width,), "bias": (width,)}


def key_map(names: Mapping[str, Tensor], patch_inputs: int) -> dict[str, str]:
    """Returns expressions that lead names of a plain ViT to timm's, as far as they can be told.

    Args:
        names: of tensors that have no place in the model.
        patch_inputs: numbers in a patch, of the model.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in names.items()}
    stem = _block_stem(shapes)
    inside = {m[3]: s for n, s in shapes.items() if stem and (m := _NUMBERED.fullmatch(n)) and m[1] == stem}
    outside = {n: s for n, s in shapes.items() if not (stem and (m := _NUMBERED.fullmatch(n)) and m[1] == stem)}
    block = _layers(inside)
    width = _width(block) or _width(_layers(outside))
    rules: dict[str, str] = {}
    if width:
        by_stem, start = {layer.stem: layer for layer in block}, rf"{re.escape(stem or '')}(\d+)"
        for inner, ours in _in_block(block, width).items():
            _add(rules, start, r"blocks.\1.", by_stem[inner], ours, 2)
        rules |= _thirds(block, stem or "")
        rules |= _outside(outside, width, patch_inputs)
    return rules


def _block_stem(names: Iterable[str]) -> str | None:
    counts = Counter(m[1] for name in names if (m := _NUMBERED.fullmatch(name)) and m[3])
    stem, count = counts.most_common(1)[0] if counts else (None, 0)
    return stem if count >= 8 else None


def _layers(shapes: Mapping[str, Shape]) -> list[_Layer]:
    found: dict[str, _Layer] = {}
    for name, shape in shapes.items():
        if match := _LEAF.fullmatch(name):
            found.setdefault(match[1], _Layer(match[1])).leaves[_KINDS[match[2]]] = (match[2], shape)
    return list(found.values())


def _width(layers: list[_Layer]) -> int | None:
    sizes = Counter(shape[0] for layer in layers for _, shape in layer.leaves.values() if len(shape) == 1)
    return sizes.most_common(1)[0][0] if sizes else None


def _in_block(layers: list[_Layer], width: int) -> dict[str, str]:
    """Returns stem to timm's name of what lies in a block, without queries, keys and values that are apart."""
    found: dict[str, str] = {}
    matrices = [layer for layer in layers if len(layer.shape) == 2 and not _third(layer)]
    joint = [m for m in matrices if _JOINT.search(m.stem)] or [
        m for m in matrices if m.shape == (3 * width, width) and not _MLP.search(m.stem)
    ]
    thirds = [layer for layer in layers if _third(layer) and len(layer.shape) == 2]
    attention = joint[0] if len(joint) == 1 else thirds[0] if len(thirds) == 3 else None
    if attention is None:
        return {}
    inner = attention.shape[0] // (3 if joint else 1)
    if joint:
        found[attention.stem] = "attn.qkv"
    rest = [m for m in matrices if m is not attention]
    by_shape = {
        "attn.proj": [m for m in rest if m.shape == (width, inner)],
        "mlp.fc1": [m for m in rest if m.shape[1] == width and m.shape[0] not in (width, inner)],
        "mlp.fc2": [m for m in rest if m.shape[0] == width and m.shape[1] not in (width, inner)],
    }
    for ours, fitting in by_shape.items():
        if len(fitting) == 1:
            found[fitting[0].stem] = ours
    wide = by_shape["mlp.fc1"]
    norms = [layer for layer in layers if layer.is_norm(width)]
    if len(norms) == 2 and len(wide) == 1 and (pair := _ordered(norms, attention, wide[0])):
        found |= {pair[0].stem: "norm1", pair[1].stem: "norm2"}
    return found


def _third(layer: _Layer) -> str | None:
    match = _THIRD.search(layer.stem.rstrip("."))
    return match[1].lower() if match and not _JOINT.search(layer.stem) else None


def _ordered(norms: list[_Layer], attention: _Layer, mlp: _Layer) -> tuple[_Layer, _Layer] | None:
    def leaning(norm: _Layer) -> int:
        near = _shared(norm.stem, attention.stem) - _shared(norm.stem, mlp.stem)
        last = norm.stem.rstrip("._").rpartition(".")[2]
        return near or bool(_FIRST.search(last)) - bool(_SECOND.search(last))

    one, two = norms
    if leaning(one) == leaning(two):
        return None
    return (one, two) if leaning(one) > leaning(two) else (two, one)


def _shared(one: str, two: str) -> int:
    """Returns how many parts between dots two names begin with in common."""
    pairs = zip(one.split("."), two.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), 0)


def _thirds(layers: list[_Layer], stem: str) -> dict[str, str]:
    """Returns the rule of queries, keys and values that are apart: one where their names differ in that word alone."""
    parts = [layer for layer in layers if _third(layer) and len(layer.shape) == 2]
    stems = [layer.stem for layer in parts]
    if len(parts) != 3 or {(_third(layer) or " ")[0] for layer in parts} != set("qkv"):
        return {}
    before = _start(stems)
    after = _start([s[len(before) :][::-1] for s in stems])[::-1]
    words = [s[len(before) : len(s) - len(after)] for s in stems]
    ends = "|".join(dict.fromkeys(end for layer in parts for end, _ in layer.leaves.values()))
    start = rf"{re.escape(stem)}(\d+)"
    if all(word in ("q", "k", "v", "query", "key", "value") for word in words):
        return {
            rf"{start}{re.escape(before)}({'|'.join(words)}){re.escape(after)}({ends})": r"blocks.\1.attn.qkv{\2}.\3"
        }
    return {
        rf"{start}{re.escape(layer.stem)}({ends})": rf"blocks.\1.attn.qkv{{{(_third(layer) or '')[0]}}}.\2"
        for layer in parts
    }


def _start(texts: list[str]) -> str:
    """Returns the letters that all texts begin with."""
    alike = 0
    for letters in zip(*texts, strict=False):
        if len(set(letters)) > 1:
            break
        alike += 1
    return texts[0][:alike]


def _outside(shapes: Mapping[str, Shape], width: int, patch_inputs: int) -> dict[str, str]:
    rules: dict[str, str] = {}
    single = {name: shape for name, shape in shapes.items() if shape and shape[-1] == width}
    tokens: dict[str, str] = {}
    for name, shape in single.items():
        last = name.rpartition(".")[2] if not name.endswith(".weight") else name
        ours = "pos_embed" if "pos" in last else next((o for word, o in _TOKENS.items() if word in last), None)
        if (
            ours
            and (len(shape) > 1 or ours != "pos_embed")
            and not name.endswith(".bias")
            and ours not in tokens.values()
        ):
            tokens[name] = ours
    rules |= {re.escape(name): ours for name, ours in tokens.items() if not _is_head(name, shapes[name])}
    layers = _layers({name: shape for name, shape in shapes.items() if re.escape(name) not in rules})
    patches = [m for m in layers if len(m.shape) == 4 and m.shape[0] == width]
    flat = [m for m in layers if m.shape == (width, patch_inputs) and re.search("patch|embed", m.stem)]
    for patch, layout in [(p, "") for p in patches] or [(p, "{p1 p2 c}") for p in flat]:
        _add(rules, "", "", patch, f"patch_embed.proj{layout}", 1)
    known = {p.stem for p in (*patches, *flat)}
    heads = [m for m in layers if len(m.shape) == 2 and m.shape[1] == width and m.stem not in known]
    norms = [n for n in layers if n.is_norm(width) and not re.search("patch|embed|pre", n.stem)]
    for fitting, ours in ((heads, "head"), (norms, "norm")):
        if len(fitting) == 1:
            _add(rules, "", "", fitting[0], ours, 1)
    return rules


def _is_head(name: str, shape: Shape) -> bool:
    """Returns whether a name with a token's word in it is that of a classifier."""
    return len(shape) == 2 and name.endswith("weight") and "pos" not in name


def _add(rules: dict[str, str], start: str, lead: str, layer: _Layer, ours: str, group: int) -> None:
    """Adds the rule of one layer; norms that say gamma and beta get a rule for each."""
    ends = [end for end, _ in layer.leaves.values()]
    name = f"{start}{re.escape(layer.stem)}"
    plain = [end for end in ends if end == _KINDS[end]]
    if plain:
        rules[f"{name}({'|'.join(plain)})"] = rf"{lead}{ours}.\{group}"
    rules.update({f"{name}{end}": f"{lead}{ours}.{_KINDS[end]}" for end in ends if end not in plain})
