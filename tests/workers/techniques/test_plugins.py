"""Techniques of other packages: those that are sound join, of each of the others there is one line, and nothing else breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.study.techniques import resolve_techniques
from tests.cli_calls import call
from workers import techniques
from workers.techniques import NAMES, composition, left_out, registry

PACKAGE = '''
from dataclasses import dataclass, replace

from workers.techniques.families import Family
from workers.techniques.record import Rule, Technique, number

@dataclass(frozen=True)
class Config:
    """Nothing much."""
    rank: int = number(4, 1, 8, 1, doc="of the added layers")

ADAPTERS = Family("adapters", "small layers beside the large ones", "two adapters", before={"precision": "they are converted too"})

def technique(name, **more):
    return Technique(
        name=name, version=1, Config=Config, stage="surgery", apply=None, rebuild=None, source="nobody", **more
    )

EARLY = technique("early", family="adapters")
LORA = technique("lora", family="adapters", new_family=ADAPTERS, rules=(Rule(("quantisation",), "experimental", "not yet"),))
TOME = technique("tome", family="token_reduction")
NOTHING = {"name": "nothing"}
OTHER_NAME = technique("renamed", family="pruning")
LOST = technique("lost", family="no_such_family")
CONTRARY = technique(
    "contrary", family="token_reduction", rules=(Rule(("low_rank_attention",), "allowed", "it goes with everything"),)
)
'''

POINTS = """
[vitpareto.techniques]
absent = no_such_module_anywhere:TECHNIQUE
broken = vitpareto_mixed_broken:TECHNIQUE
contrary = vitpareto_mixed:CONTRARY
early = vitpareto_mixed:EARLY
lora = vitpareto_mixed:LORA
lost = vitpareto_mixed:LOST
nothing = vitpareto_mixed:NOTHING
other_name = vitpareto_mixed:OTHER_NAME
tome = vitpareto_mixed:TOME
"""

REASONS = {
    "absent": "(no_such_module_anywhere:TECHNIQUE): ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    "broken": "(vitpareto_mixed_broken:TECHNIQUE): RuntimeError: the card is on fire",
    "contrary": "neither is more specific: contrary says that ",
    "lost": "technique lost: family must be one of distillation, pruning, ",
    "nothing": "must name a workers.techniques.record.Technique, not a dict",
    "other_name": "must have the name of its record, renamed",
    "tome": "there is a technique of that name already",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two sound techniques of a new family, the one that describes it being the later one, and one of each fault."""
    metadata = tmp_path / "vitpareto_mixed-2.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vitpareto-mixed\nVersion: 2.1\n")
    (metadata / "entry_points.txt").write_text(POINTS)
    (tmp_path / "vitpareto_mixed.py").write_text(PACKAGE)
    (tmp_path / "vitpareto_mixed_broken.py").write_text("raise RuntimeError('the card\\nis on fire')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for known in (techniques._known, composition.table):
        known.cache_clear()
    yield
    for known in (techniques._known, composition.table):
        known.cache_clear()


def test_what_is_sound_joins_and_of_the_others_there_is_a_line_each(installed: None) -> None:
    assert [name for name in registry() if name in (*NAMES, "early", "lora")] == [*NAMES, "early", "lora"]
    mine = [broken for broken in left_out() if broken.package == "vitpareto-mixed 2.1"]  # others may be installed
    assert [broken.name for broken in mine] == sorted(REASONS)
    for broken in mine:
        line = str(broken)
        assert line.startswith(f"technique {broken.name} of vitpareto-mixed 2.1 is left out (")
        assert REASONS[broken.name] in line
        assert "\n" not in line


def test_a_family_and_rules_from_outside_are_composed_like_our_own(installed: None) -> None:
    assert composition.families()[4:6] == ("low_rank_weights", "adapters")
    assert composition.legal_orders(["precision", "lora", "tome"]) == [("tome", "lora", "precision")]
    assert composition.fault(["precision", "early"]) == "early must come before precision: they are converted too"
    assert composition.fault(["lora", "fp8"]) == "lora + fp8: not yet (experimental)"
    assert composition.fault(["early", "lora"]) == "early + lora: two adapters"


def test_commands_go_on_and_say_it_once(installed: None) -> None:
    for arguments in (("techniques", "--format", "json"), ("plan", "quick")):
        done = call(*arguments)
        assert done.exit_code == 0
        assert "Traceback" not in done.output
        assert [line for line in done.stderr.splitlines() if "left out" in line] == [
            f"vitpareto: {broken}" for broken in left_out()
        ]
    assert '"lora"' in call("techniques", "--format", "json").stdout


def test_a_study_that_names_one_is_told_whose_it_is(installed: None) -> None:
    resolved, faults = resolve_techniques({"tome": {}, "absent": {}, "abscent": {}})
    assert list(resolved) == ["tome"]
    assert [fault.where for fault in faults] == ["techniques.absent", "techniques.abscent"]
    assert "of vitpareto-mixed 2.1 is left out" in faults[0].rule
    assert faults[0].remedy.startswith("repair vitpareto-mixed 2.1")
    assert faults[1].rule == "must be a known technique"
