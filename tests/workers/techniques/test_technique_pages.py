"""Every technique has a page in docs/techniques/, and the lists there and in README.md link to it."""

from __future__ import annotations

import pytest

from tests.places import ROOT
from workers.techniques import NAMES

PAGES = ROOT / "docs" / "techniques"


@pytest.mark.parametrize("name", NAMES)
def test_every_technique_has_a_page(name: str) -> None:
    assert (PAGES / f"{name}.md").exists()
    assert f"[{name}]({name}.md)" in (PAGES / "README.md").read_text()
    assert f"[`{name}`](docs/techniques/{name}.md)" in (ROOT / "README.md").read_text()
