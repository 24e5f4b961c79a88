"""Single values of a study file: how texts are read as names, times, bytes and objectives, and what breaks a rule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from orchestrator.study.constraints import ConstraintError, parse
from orchestrator.study.yaml_lines import nearest
from workers.metrics import OBJECTIVES

SAMPLERS = ("recipe", "tpe", "nsga2", "random")
SAMPLER_GROUP = "vitpareto.samplers"
"""Entry point group through which other packages add samplers by name."""

RESERVED = "stages"
"""The folder at the top of a storage that is no study, in any case of letters."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_QUANTITY = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def broken(rule: str, remedy: str = "") -> PydanticCustomError:
    return PydanticCustomError("study_rule", "{rule}", {"rule": rule, "remedy": remedy})


def study_name(text: str) -> str:
    """Returns ``text`` if it is safe as a folder, job and table name.

    Raises:
        PydanticCustomError: (a ValueError) for anything else: slashes, ``..``, a leading dash, over 64 characters.
    """
    if not _NAME.fullmatch(text) or ".." in text:
        cleaned = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip("-._")[:64] or "my-study"
        raise broken(
            "must be 1 to 64 letters, digits, '.', '_' or '-', start with a letter or digit and hold no '..'",
            f"for example {cleaned}",
        )
    if text.lower() == RESERVED:
        raise broken(
            f"must not be {RESERVED}: the storage keeps the models of all studies in a folder of that name",
            f"for example my-{text}",
        )
    return text


def _quantity(value: object, units: Mapping[str, float], example: str) -> object:
    """Reads "30m" or "1GiB" as a number in base units; other types go on to pydantic."""
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value)
    if match is None or match[2] not in units:
        raise broken(
            f"must be a number with one of the units {', '.join(filter(None, units))}", f"for example {example}"
        )
    return float(match[1]) * units[match[2]]


def duration_s(value: object) -> object:
    """Reads "90s", "30m", "2h" as seconds; a plain number is seconds."""
    return _quantity(value, _SECONDS, "30m")


def size_bytes(value: object) -> object:
    """Reads "1GiB", "500MB" as bytes; a plain number is bytes."""
    found = _quantity(value, _BYTES, "1GiB")
    return int(found) if isinstance(found, float) else found


def sampler_name(text: str) -> str:
    """Returns the name of a built-in sampler or of one that another package adds."""
    known = [*SAMPLERS, *sorted(point.name for point in entry_points(group=SAMPLER_GROUP))]
    if text not in known:
        raise broken(f"must be one of {', '.join(known)}", nearest(text, known))
    return text


def constraint(text: str) -> str:
    try:
        return str(parse(text))
    except ConstraintError as error:
        raise broken(error.rule, error.remedy) from None


def distinct(values: list[int]) -> list[int]:
    if len(set(values)) != len(values):
        raise broken("must not repeat a value", "remove the repeated ones")
    return values


def empty_for_null(value: object) -> object:
    return {} if value is None else value


def directions(value: object) -> object:
    """A list of objectives gets the direction that is better for each; unknown names are reported elsewhere."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return value
    return {name: OBJECTIVES.get(name, "minimize") for name in value}


def step(value: object) -> object:
    return {value: {}} if isinstance(value, str) else value


Parameters = Annotated[dict[str, Any], BeforeValidator(empty_for_null)]
RecipeStep = Annotated[dict[str, Parameters], BeforeValidator(step), Field(min_length=1, max_length=1)]
Duration = Annotated[float, BeforeValidator(duration_s), Field(gt=0)]
MOST = 10**9
"""No count of a study is higher: larger ones are mistakes, and some would wrap around."""

Positive = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""What NumPy, and with it Optuna's samplers, takes."""
