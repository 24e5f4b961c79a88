"""Reads a study file: safe YAML with line numbers, and the faults of a file as values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import yaml

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"

MAX_BYTES = 1 << 20
"""A study file is a page of text; a larger one is something else."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in a study.

    Attributes:
        where: path in the file: ``techniques.tome.r``, ``recipes[2]``; empty for the file as a whole.
        rule: what it must be.
        value: what it is; :data:`ABSENT` where there is nothing.
        remedy: what to do about it, with the nearest known name where a name is unknown.
        line: 1-based line in the file, None where the study came from Python.
    """

    where: str
    rule: str
    value: Any
    remedy: str = ""
    line: int | None = None

    def __str__(self) -> str:
        place = self.where or "the file"
        line = f" (line {self.line})" if self.line else ""
        got = "" if self.value is ABSENT else f" (got {shorten(self.value)})"
        return f"{place}{line}: {self.rule}{got}" + (f"; {self.remedy}" if self.remedy else "")


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()


class StudyError(ValueError):
    """A study with every fault it has; one line each."""

    def __init__(self, source: str, faults: Iterable[Fault]) -> None:
        self.source, self.faults = source, list(faults)
        super().__init__("\n".join(f"{source}: {fault}" for fault in self.faults))


def shorten(value: object, limit: int = 80) -> str:
    """Returns ``repr(value)``, cut to ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: object, known: Iterable[str]) -> str:
    """Returns the remedy for an unknown name: the nearest known one, else all of them."""
    known = list(map(str, known))
    near = get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "known: " + ", ".join(known)


def path_text(location: Iterable[str | int]) -> str:
    """Returns ``("recipes", 2, "tome")`` as ``recipes[2].tome``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, which let a short file stand for an endless one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                None, None, "must not use aliases (*name); write the value out", mark
            )
        return super().compose_node(parent, index)


# YAML 1.1 reads 1e-3 as text; people and YAML 1.2 read it as a number.
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read(text: str, source: str) -> tuple[dict[str, Any], dict[str, int], list[Fault]]:
    """Parses a study file.

    Returns:
        The mapping, the line of every path in it, and the faults that still leave it readable (duplicate keys).

    Raises:
        StudyError: the text is no YAML mapping, has tags that would build objects, or uses aliases.
    """
    if len(text) > MAX_BYTES:
        raise StudyError(
            source, [Fault("", f"must be at most {MAX_BYTES} characters", len(text), "is this a study file?")]
        )
    if found := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line, rule = text.count("\n", 0, found.start()) + 1, "must not hold control characters"
        raise StudyError(source, [Fault("", rule, found.group(), "remove it; is this a text file?", line)])
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            found = node.value if node is not None else None
            raise StudyError(
                source, [Fault("", "must be a mapping of keys to values", found, "start with `name: my-study`")]
            )
        lines: dict[str, int] = {}
        faults: list[Fault] = []
        _walk(node, (), lines, faults)
        return loader.construct_document(node), lines, faults
    except yaml.YAMLError as error:
        raise StudyError(source, [_yaml_fault(error)]) from None
    except RecursionError:
        raise StudyError(
            source, [Fault("", "must not be nested that deeply", ABSENT, "is this a study file?")]
        ) from None
    except ValueError as error:  # a date or number that YAML takes for one and Python does not
        if isinstance(error, StudyError):
            raise
        raise StudyError(source, [Fault("", "must be readable YAML", str(error), "quote the value")]) from None
    finally:
        loader.dispose()


def _yaml_fault(error: yaml.YAMLError) -> Fault:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    line = mark.line + 1 if mark is not None else None
    if "could not determine a constructor for the tag" in problem:
        tag = problem.split("'")[1]
        return Fault("", "must use plain YAML only; tags that build objects are refused", tag, "remove the tag", line)
    if "aliases" in problem:
        return Fault("", problem.split(";")[0], ABSENT, "write the value out", line)
    return Fault("", f"must be readable YAML: {problem}", ABSENT, "check the indentation and quotes there", line)


_AMBIGUOUS = {
    re.compile(r"[-+]?0[0-7_]+"): ("must not begin with a 0: YAML 1.1 reads {} as the octal number {}", "write {}"),
    re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?"): (
        "must not be written with colons: YAML 1.1 reads {} as the number {}",
        "give a unit (90s, 30m, 2h), or quote what is text",
    ),
}
"""Plain scalars that versions of YAML, and people, read differently; and what to write instead."""


def _ambiguity(node: yaml.Node, at: tuple[str | int, ...]) -> Iterator[Fault]:
    if not isinstance(node, yaml.ScalarNode) or node.style is not None or node.tag not in (_INT, _FLOAT):
        return
    for pattern, (rule, remedy) in _AMBIGUOUS.items():
        if pattern.fullmatch(node.value):
            meant = yaml.safe_load(node.value)
            decimal = node.value.replace("_", "").lstrip("+-0") or "0"
            line = node.start_mark.line + 1
            yield Fault(path_text(at), rule.format(node.value, meant), ABSENT, remedy.format(decimal), line)


def _walk(node: yaml.Node, at: tuple[str | int, ...], lines: dict[str, int], faults: list[Fault]) -> None:
    """Notes the line of every path below ``node``, the keys that stand twice, and values that are read differently."""
    faults += _ambiguity(node, at)
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[path_text((*at, index))] = child.start_mark.line + 1
            _walk(child, (*at, index), lines, faults)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            here = (*at, str(key.value))
            faults += _ambiguity(key, here)
            line = key.start_mark.line + 1
            if here[-1] in seen:
                rule = f"must stand once; the first is on line {lines[path_text(here)]}"
                faults.append(Fault(path_text(here), rule, ABSENT, "remove one of the two", line))
                continue
            seen.add(str(here[-1]))
            lines[path_text(here)] = line
            _walk(child, here, lines, faults)


def with_lines(faults: Iterable[Fault], lines: Mapping[str, int]) -> list[Fault]:
    """Returns the faults with the line of their path, or of the nearest enclosing one that the file has."""
    return [f if f.line else Fault(f.where, f.rule, f.value, f.remedy, _line(f.where, lines)) for f in faults]


def _line(where: str, lines: Mapping[str, int]) -> int | None:
    while where and where not in lines:
        where = where[: max(where.rfind("."), where.rfind("["), 0)]
    return lines.get(where)
