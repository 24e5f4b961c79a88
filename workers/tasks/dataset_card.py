"""What a data set's card says of its files: ``configs`` in the header of ``README.md``, or in ``.huggingface.yaml``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from workers.tasks.task_info import TaskError

CARD, STANDALONE = "README.md", ".huggingface.yaml"

_HEADER = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def patterns(root: Path) -> Mapping[str, list[str]] | None:
    """Returns part to patterns of files below ``root``, of the default configuration; None where the card says nothing.

    Raises:
        TaskError: the card cannot be read, or it has several configurations and none is the default.
    """
    configs = _read(root).get("configs")
    if not configs:
        return None
    if not isinstance(configs, list) or not all(isinstance(one, Mapping) and "config_name" in one for one in configs):
        raise TaskError(f"{root / CARD}: configs must be a list of mappings with a config_name; correct or remove it")
    chosen = _default(root, configs)
    if chosen.get("data_files") is None:
        folder = chosen.get("data_dir")
        if folder is None:
            return None
        raise TaskError(
            f"{root / CARD}: its configuration {chosen['config_name']} is the folder {folder}; set data.path to {root / str(folder)}"
        )
    below = f"{str(chosen['data_dir']).strip('/')}/" if chosen.get("data_dir") else ""
    return {part: [below + one.removeprefix("./") for one in given] for part, given in _listed(root, chosen).items()}


def matches(pattern: str, name: str) -> bool:
    """Returns whether a path with slashes fits a pattern, in which ``**`` is any number of folders."""
    text = "".join(_segment(one, last) for one, last in _segments(pattern))
    return re.fullmatch(text, name, re.DOTALL) is not None


def _segments(pattern: str) -> list[tuple[str, bool]]:
    parts = pattern.split("/")
    return [(one, index == len(parts) - 1) for index, one in enumerate(parts)]


def _segment(segment: str, last: bool) -> str:
    if segment == "**":
        return ".*" if last else "(?:.*/)?"
    found = re.split(r"(\*|\?|\[[^\]]+\])", segment)
    text = "".join(
        "[^/]*" if one == "*" else "[^/]" if one == "?" else _set(one) if one.startswith("[") else re.escape(one)
        for one in found
    )
    return text if last else f"{text}/"


def _set(text: str) -> str:
    inner = text[1:-1].replace("\\", "\\\\")
    return f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"


def _read(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        if (root / CARD).is_file():
            header = _HEADER.match((root / CARD).read_text(encoding="utf-8", errors="replace"))
            found |= _mapping(yaml.safe_load(header[1])) if header else {}
        if (root / STANDALONE).is_file():
            found |= _mapping(yaml.safe_load((root / STANDALONE).read_text(encoding="utf-8", errors="replace")))
    except yaml.YAMLError as error:
        raise TaskError(f"{root / CARD}: its header must be YAML: {error}; correct or remove it") from error
    return found


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _default(root: Path, configs: list[Any]) -> Mapping[str, Any]:
    named = [one for one in configs if len(configs) == 1 or one["config_name"] == "default" or one.get("default")]
    if len(named) != 1:
        names = ", ".join(str(one["config_name"]) for one in configs)
        raise TaskError(
            f"{root / CARD}: must have one configuration or mark one as the default, has {names}; set data.path to the folder of "
            "one, or write 'default: true' at one"
        )
    chosen: Mapping[str, Any] = named[0]
    return chosen


def _listed(root: Path, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns part to patterns, whichever of the forms they are written in."""
    given = config["data_files"]
    if isinstance(given, str):
        return {"train": [given]}
    if isinstance(given, list) and given and all(isinstance(one, str) for one in given):
        return {"train": list(given)}
    found: dict[str, list[str]] = {}
    for one in given if isinstance(given, list) else ():
        path = one.get("path") if isinstance(one, Mapping) else None
        paths = [path] if isinstance(path, str) else path
        if not isinstance(paths, list) or not isinstance(one.get("split"), str) or one["split"] in found:
            break
        found[one["split"]] = [str(pattern) for pattern in paths]
    else:
        if found:
            return found
    raise TaskError(
        f"{root / CARD}: data_files of {config['config_name']} must be patterns, or a list of split and path, each split once; "
        "correct it"
    )
