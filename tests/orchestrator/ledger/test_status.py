"""What a study's folder alone says of where its time went."""

from __future__ import annotations

from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.ledger.status import study_status
from orchestrator.study.load import load_study
from tests.ledger_rows import STUDY, make_row
from tests.studies import tiny_study
from workers.node.storage import LocalStorage


def test_seconds_are_summed_over_trials_and_taken_over_speeds_counted(tmp_path: Path) -> None:
    context = make_row(0)["context"]
    ledger = Ledger(LocalStorage(tmp_path), STUDY, context=context)
    ledger.write_study({"config": load_study(tiny_study(STUDY)).to_dict(), "token": "t", "context": context})
    ledger.write_attempt({**make_row(0), "seconds": {"train": 100.0}})
    ledger.write_attempt({**make_row(1), "seconds": {"train": 4.0, "lane_wait": 1.5}})
    ledger.write_attempt({**make_row(2), "seconds": {"train": 2.0, "measure": 3.0}, "speed_of": "a1"})
    ledger.write_attempt({**make_row(3, context="another"), "seconds": {"train": 50.0}})
    status = study_status(ledger)
    assert status["seconds"] == {"lane_wait": 1.5, "measure": 3.0, "train": 6.0}
    assert status["speeds_taken_over"] == 1
