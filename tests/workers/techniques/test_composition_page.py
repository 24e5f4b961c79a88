"""docs/composition.md says what the records say: its tables are made from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import pytest

from tests.places import ROOT
from workers.techniques import NAMES, registry
from workers.techniques.families import FAMILIES

PAGE = ROOT / "docs" / "composition.md"
BUILTIN = [registry()[name] for name in NAMES]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def families() -> str:
    rows = (
        (
            f"`{family.name}`",
            family.doc,
            code(t.name for t in BUILTIN if t.family == family.name),
            family.exclusive or "no",
            "; ".join(f"`{name}`: {why}" for name, why in family.after.items()),
        )
        for family in FAMILIES.values()
    )
    return table(("family", "changes", "techniques, in canonical order", "excludes its own kind", "comes after"), rows)


def said() -> Iterator[tuple[str, str, str, str]]:
    for holder in (*BUILTIN, *FAMILIES.values()):
        for rule in holder.rules:
            only = f" (models of family {', '.join(rule.only_on)} only)" if rule.only_on else ""
            yield f"`{holder.name}`", code(rule.others), rule.kind + only, rule.reason


TABLES = {
    "families": families(),
    "rules": table(("who", "with", "verdict", "why"), said()),
    "orders": table(
        ("one", "other", "what differs"),
        ((f"`{t.name}`", f"`{other}`", why) for t in BUILTIN for other, why in t.either_order.items()),
    ),
    "devices": table(
        ("technique", "not on", "why"), ((f"`{t.name}`", kind, why) for t in BUILTIN for kind, why in t.not_on.items())
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_table_of_the_records(name: str) -> None:
    found = re.search(rf"<!-- {name} -->\n\n(.*?)\n(?:\n#|\Z)", PAGE.read_text(), re.DOTALL)
    assert found is not None
    assert found[1].strip() == TABLES[name], f"put this below <!-- {name} --> in docs/composition.md:\n{TABLES[name]}"
