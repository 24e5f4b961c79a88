"""Loads a study: file, shipped name or mapping -> StudyConfig, or every fault at once with its path in the file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from orchestrator.study import faults as judge
from orchestrator.study import runnable, scalars, tasks, techniques
from orchestrator.study.data import kind_of
from orchestrator.study.sampler import sampler_faults
from orchestrator.study.schema import StudyConfig, model_info
from orchestrator.study.yaml_lines import ABSENT, MAX_BYTES, Fault, StudyError, nearest, path_text, read, with_lines
from workers.measuring.protocols import MIN_CPU_BYTES

if TYPE_CHECKING:
    from workers.model_info import ModelInfo

__all__ = [
    "Fault",
    "StudyConfig",
    "StudyError",
    "StudyRefused",
    "check_measurable",
    "check_runs_here",
    "check_same_study",
    "check_study_name",
    "load_study",
    "model_info",
    "parse_duration_s",
    "parse_size_bytes",
    "shipped_studies",
    "stored_study",
]


MAY_CHANGE = frozenset({"trials", "budget", "resources", "retries", "early_stopping", "sampler"})
"""Keys in which a study may differ from the one of its name that the storage holds: they change no trial's numbers."""


class StudyRefused(ValueError):
    """A sound study that cannot be run as things are; the message says why and what to do."""


def load_study(
    source: str | os.PathLike[str] | Mapping[str, Any], *, check_files: bool = True, here: bool = False
) -> StudyConfig:
    """Loads and checks a study.

    Args:
        source: a path, the name of a study that ships (``quick``), or the content as a mapping. A file wins over a
            shipped study of the same name. Relative paths inside a file are relative to the file's folder; where
            nothing lies there, to the working directory.
        check_files: whether data and checkpoint must be here and readable. False for a study that runs elsewhere, where
            they are.
        here: whether trials are to run on this machine, so that asking for what it lacks is a fault.

    Returns:
        The study with absolute paths, every parameter of every technique, and complete recipes.

    Raises:
        StudyError: with every fault of the study; with those of the file's own text alone where one of them says that
            nothing could run it, since what techniques and models say of the rest takes seconds of imports.
    """
    if isinstance(source, Mapping):
        return _checked(dict(source), "study", Path.cwd(), check_files=check_files, here=here)
    path = _find(source)
    text = _text(path)
    values, lines, faults = read(text, path.name)
    return _checked(values, path.name, path.parent, lines, faults, check_files=check_files, here=here)


def shipped_studies() -> dict[str, Path]:
    """Returns the studies that come with the package, by name."""
    folder = Path(str(files("search_spaces")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def check_study_name(name: str) -> str:
    """Returns ``name`` if it is safe as a study's name.

    Raises:
        StudyError: if it is not.
    """
    try:
        return scalars.study_name(name)
    except PydanticCustomError as error:
        raise StudyError("study", [_rule_fault("name", error.context or {}, name)]) from None


def stored_study(stored: Mapping[str, Any], where: str) -> StudyConfig:
    """Returns the study that a study's record holds, ready to be run.

    Args:
        stored: what ``study.json`` holds.
        where: the study's folder.

    Raises:
        StudyError: its config is none, or one that this version does not run.
    """
    values, faults = stored["config"], list[Fault]()
    family = tasks.family_of(values.get("model"))
    try:
        config = StudyConfig.from_dict(values)
        resolved, faults = techniques.resolve_techniques(config.techniques, family)
        faults += techniques.resolve_recipes(
            config.recipes, resolved, config.techniques, config.max_techniques, family
        )[1]
    except ValidationError as error:
        faults = [_schema_fault(e) for e in error.errors(include_url=False)]
    if faults:
        raise StudyError(f"{where}/study.json", faults)
    return config


def check_measurable(config: StudyConfig, info: ModelInfo) -> None:
    """Checks that every objective can be told for a model of this size on the study's device.

    Raises:
        StudyRefused: one cannot.
    """
    smallest = MIN_CPU_BYTES // 4
    if "peak_memory_bytes" in config.objectives and config.device == "cpu" and info.params < smallest:
        raise StudyRefused(
            f"objectives: peak_memory_bytes on a CPU needs a model of {smallest:,} parameters or more, {info.name} has "
            f"{info.params:,}: less cannot be told apart from the libraries' own memory; remove the objective"
        )


def check_runs_here(config: StudyConfig, params: int | None = None) -> None:
    """Checks that this machine has what a study asks of the one that runs it.

    Args:
        params: of the model, where they are known.

    Raises:
        StudyRefused: it lacks something.
    """
    faults = runnable.machine_faults(config, params)
    if faults:
        raise StudyRefused("\n".join(f"study {config.name}: {fault}" for fault in faults))


def check_same_study(config: StudyConfig, stored: Mapping[str, Any], folder: str) -> None:
    """Checks that ``config`` asks the question of the study that ``folder`` holds, whose config ``stored`` is.

    Raises:
        StudyRefused: it asks another one.
    """
    now, before = config.to_dict(), _as_read_now(stored)
    changed = [key for key in now if key not in MAY_CHANGE and before.get(key) != now[key]]
    if changed:
        raise StudyRefused(
            f"{folder} holds another study of the name {config.name}: they differ in {', '.join(changed)}; "
            "use another --name or --storage"
        )


def _as_read_now(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a stored config with the keys that it lacks because they are newer than it."""
    try:
        return StudyConfig.from_dict(stored).to_dict()
    except ValidationError:
        return stored


def parse_duration_s(text: str, option: str = "time-budget") -> float:
    """Returns ``90s``, ``30m`` or ``2h`` in seconds, for ``--time-budget`` and other options.

    Raises:
        ValueError: for other texts, and for nothing or less.
    """
    return float(_quantity(text, option, scalars.duration_s, "30m"))


def parse_size_bytes(text: str, option: str) -> int:
    """Returns ``500MB`` or ``4GiB`` in bytes.

    Raises:
        ValueError: for other texts, and for nothing or less.
    """
    return int(_quantity(text, option, scalars.size_bytes, "4GB"))


def _quantity(text: str, option: str, read: Callable[[object], object], example: str) -> float:
    try:
        found = float(read(text))  # type: ignore[arg-type]
    except PydanticCustomError as error:
        raise ValueError(str(_rule_fault(option, error.context or {}, text))) from None
    if found <= 0:
        raise ValueError(f"{option}: must be above 0 (got {text!r}); for example {example}")
    return found


def _find(source: str | os.PathLike[str]) -> Path:
    path = Path(source).expanduser()
    shipped = shipped_studies()
    found = os.path.isfile(path)  # which takes names that no file can have, as Path.is_file does not
    if not found and str(source) in shipped:
        return shipped[str(source)]
    if found:
        return path.absolute()
    rule = "must be a study file that exists, or a study that ships"
    raise StudyError(str(source), [Fault("", rule, str(source), nearest(path.stem, shipped))])


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(path.name, [Fault("", f"must be readable as UTF-8 text: {error}", str(path))]) from None


def _checked(
    values: dict[str, Any],
    source: str,
    folder: Path,
    lines: Mapping[str, int] | None = None,
    faults: list[Fault] | None = None,
    *,
    check_files: bool,
    here: bool,
) -> StudyConfig:
    """Returns the study in ``values``; the schema's faults and the others are raised together."""
    values = _with_absolute_paths(values, folder)
    found = list(faults or [])
    study = None
    try:
        study = StudyConfig.model_validate(values)
    except ValidationError as error:
        found += [_schema_fault(e) for e in error.errors(include_url=False)]
    model, data, training = (values.get(key) for key in ("model", "data", "training"))
    found += [
        *judge.objective_faults(values.get("objectives"), values.get("reference_point")),
        *tasks.metric_faults(values.get("objectives"), values.get("constraints"), data),
        *runnable.setting_faults(model),
        *runnable.key_map_faults(model),
        *tasks.family_faults(model, data),
        *judge.data_faults(data, must_exist=check_files),
        *tasks.data_key_faults(data),
        *tasks.channel_faults(data),
        *judge.training_faults(training, data),
        *tasks.augmentation_faults(training, data),
        *judge.resource_faults(values.get("device"), values.get("resources")),
    ]
    if hopeless := [*runnable.size_faults(model), *(_hopeless(study, here) if study is not None else ())]:
        raise _error(source, [*found, *hopeless], lines)
    family = tasks.family_of(model)
    resolved, technique_faults = techniques.resolve_techniques(values.get("techniques"), family)
    recipes, recipe_faults = techniques.resolve_recipes(
        values.get("recipes"),
        resolved,
        values.get("techniques"),
        values.get("max_techniques", _default("max_techniques")),
        family,
    )
    checkpoint = model.get("checkpoint") if isinstance(model, Mapping) else None
    found += [
        *technique_faults,
        *recipe_faults,
        *judge.model_name_faults(model),
        *(judge.folder_faults(model) if check_files else ()),
        *tasks.shape_faults(model, data),
        *(judge.checkpoint_faults(checkpoint) if check_files else ()),
        *(tasks.answers_faults(data) if check_files else ()),
    ]
    if study is not None:
        found += [*sampler_faults(study.sampler), *judge.seed_faults(study.seeds, study.measurement.protocol)]
    if found or study is None:
        raise _error(source, found, lines)
    return study.model_copy(update={"techniques": resolved, "recipes": recipes})


def _hopeless(study: StudyConfig, here: bool) -> list[Fault]:
    return [
        *runnable.constraint_faults(study.parsed_constraints()),
        *(runnable.machine_faults(study) if here else ()),
    ]


def _error(source: str, found: list[Fault], lines: Mapping[str, int] | None) -> StudyError:
    return StudyError(source, with_lines(_in_file_order(found, lines or {}), lines or {}))


def _default(key: str) -> Any:
    return StudyConfig.model_fields[key].default


def _with_absolute_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    values = _with_absolute_name(values, folder)
    for section, key in (("model", "checkpoint"), ("data", "path"), ("data", "answers"), ("data", "tokenizer")):
        part = values.get(section)
        if (
            isinstance(part, Mapping)
            and isinstance(text := part.get(key), str | os.PathLike)
            and "://" not in str(text)
            and not (key == "checkpoint" and str(text).startswith(judge.HUB))
        ):
            given = Path(os.path.expanduser(text))  # which leaves the home of nobody as it is
            path = folder / given if os.path.exists(folder / given) else given
            if key == "tokenizer" and not os.path.isdir(path):
                continue  # a name of the hub's
            if (
                key == "path"
                and not os.path.exists(path)
                and (kind := kind_of(part)) is not None
                and kind.is_name(str(text))
            ):
                continue
            values = {**values, section: {**part, key: str(path.absolute())}}
    return values


def _with_absolute_name(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the study with the folder of a ``local-dir:`` name as an absolute path."""
    model = values.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(name, str) or not name.startswith(judge.LOCAL):
        return values
    given = Path(os.path.expanduser(name.removeprefix(judge.LOCAL)))
    path = folder / given if os.path.exists(folder / given) else given
    return {**values, "model": {**model, "name": f"{judge.LOCAL}{path.absolute()}"}}


# --- the schema's faults in our words ---------------------------------------------------------------------------------


def _rule_fault(where: str, context: Mapping[str, Any], value: object) -> Fault:
    return Fault(where, str(context["rule"]), value, str(context["remedy"]))


def _schema_fault(error: ErrorDetails) -> Fault:
    """Translates one of pydantic's errors."""
    location = error["loc"]
    where, kind, context = path_text(location), error["type"], error.get("ctx", {})
    if kind == "study_rule":
        return _rule_fault(where, context, error["input"])
    if kind == "missing":
        return Fault(where, "must be given", ABSENT, "see search_spaces/README.md")
    if kind == "extra_forbidden":
        return Fault(where, "must be a known key", location[-1], nearest(location[-1], _known_keys(location[:-1])))
    rule = re.sub(r"^(Input|.* ) ?should (be|have)", r"must \2", error["msg"]).replace("valid dictionary", "mapping")
    remedy = ""
    if kind == "literal_error" and isinstance(error["input"], str):
        near = get_close_matches(
            error["input"], re.findall(r"'([^']+)'", str(context.get("expected"))), n=1, cutoff=0.5
        )
        remedy = f"did you mean {near[0]}?" if near else ""
    return Fault(where, rule, error["input"], remedy)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Returns the keys of the section at ``location``."""
    section: type[BaseModel] = StudyConfig
    for key in location:
        annotation = section.model_fields[str(key)].annotation
        section = next(
            a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
        )
    return list(section.model_fields)


def _in_file_order(faults: list[Fault], lines: Mapping[str, int]) -> list[Fault]:
    """Sorts by line; without lines by the schema's order of keys, stable within one."""
    keys = list(StudyConfig.model_fields)
    located = with_lines(faults, lines)
    top = [re.split(r"[.\[]", f.where)[0] for f in located]
    rank = [(f.line or 0, keys.index(t) if t in keys else len(keys)) for f, t in zip(located, top, strict=True)]
    return [f for _, _, f in sorted(zip(rank, range(len(located)), located, strict=True), key=lambda x: x[:2])]
