"""The page of a report in a real browser, where it must not connect to anything: clicked, filtered, sorted, turned dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.report.data import Report
from orchestrator.report.plots import staircase
from orchestrator.report.render import page
from orchestrator.report.sentences import verdict
from tests.chromium import POINT, Browser, needs_browser
from tests.report_rows import HOSTILE, Rows, every_kind, study_of

pytestmark = needs_browser


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return every_kind(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def report(rows: Rows) -> Report:
    return rows.report()


@pytest.fixture(scope="module")
def file(rows: Rows) -> Path:
    return rows.page()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser, file: Path) -> Iterator[Browser]:
    """The page of ``rows``, freshly loaded; whatever a test does, nothing may be reported or requested."""
    chromium.resize(1440)
    chromium.open(file)
    yield chromium
    assert chromium.faults() == []


def test_a_click_on_a_point_shows_its_recipe(browser: Browser, rows: Rows, report: Report) -> None:
    fast = next(c for c in report.candidates if c.label == "tome(r=1, schedule=decreasing)")
    browser.click_point(fast.label)
    browser.wait("return document.getElementById('panel').textContent.includes(arguments[0])", fast.id)
    shown = browser.text("#panel")
    assert "certainly on the frontier" in shown
    assert browser.texts("#panel .steps li") == ["tome r 1, schedule decreasing"]
    numbers = {row.split("\n")[0]: row for row in browser.texts("#panel .numbers tbody tr")}
    assert re.search(r"11,7\d\d to 12,2\d\d images/s", " ".join(numbers.values()))
    assert "790 kB" in shown
    assert f"vitpareto show looks {fast.id} --storage {rows.folder}" in shown
    assert f"vitpareto export looks {fast.id}" in shown
    browser.click_point("magnitude_prune(mlp_ratio=0.5)")
    browser.wait("return document.querySelector('#panel .standing').textContent.includes('dominated')")
    assert browser.texts("#panel .steps li") == ["magnitude_prune mlp_ratio 0.5"]


def test_the_commands_that_the_panel_shows_exist(browser: Browser, rows: Rows) -> None:
    browser.click_point("tome(r=1, schedule=decreasing)")
    browser.wait("return document.getElementById('panel').textContent.includes('tome')")
    show, export = browser.texts("#panel .command code")
    done = CliRunner().invoke(cli.app, show.split()[1:])
    assert (done.exit_code, "tome(r=1" in done.output) == (0, True)
    refused = CliRunner().invoke(cli.app, export.split()[1:])  # these rows have no artefact
    assert "Usage:" not in refused.output
    assert refused.exit_code in (1, 2)


def test_groups_flags_and_marks(browser: Browser, report: Report) -> None:
    group = next(c for c in report.frontier("certain", "possible") if len(c.members) > 1)
    browser.js("document.querySelector(`tr[data-recipe='${arguments[0]}'] button`).click()", group.id)
    other = next(c for c in report.candidates if c.id == group.members[1])
    assert browser.texts("#panel .members li") == [c.label for c in report.candidates if c.id in group.members[1:]]
    browser.js("document.querySelector('#panel .members button').click()")
    assert "not told apart from a member" in browser.text("#panel .standing")
    assert other.id in browser.text("#panel")
    symbols = browser.js("return document.getElementById('frontier-plot').data.flatMap((t) => t.marker?.symbol ?? [])")
    assert {"circle", "triangle-down", "square", "star"} <= set(symbols)
    bars = browser.js(
        "return document.getElementById('frontier-plot').data.filter((t) => t.error_y).map((t) => t.name)"
    )
    assert {"certain", "possible", "baseline"} <= set(bars)
    assert "dominated" not in bars


def test_the_axes_can_be_chosen(browser: Browser) -> None:
    def titles() -> list[str]:
        return list(
            browser.js(
                "const l = document.getElementById('frontier-plot')._fullLayout; return [l.yaxis.title.text, l.xaxis.title.text]"
            )
        )

    assert titles() == ["top-1 accuracy (%)", "artefact size"]
    before = browser.js(POINT, "tome(r=1, schedule=decreasing)")
    Select(browser.driver.find_element(By.ID, "axis-x")).select_by_visible_text("throughput")
    assert titles() == ["top-1 accuracy (%)", "throughput (images/s)"]
    x = browser.js("return document.getElementById('frontier-plot').data.find((t) => t.name === 'certain').x")
    assert 12000 in x
    assert browser.js(POINT, "tome(r=1, schedule=decreasing)") != before
    browser.click_point("tome(r=1, schedule=decreasing)")
    browser.wait("return document.querySelector('#panel .steps')?.textContent.includes('tome')")
    Select(browser.driver.find_element(By.ID, "axis-y")).select_by_visible_text("MACs of one image")
    points = browser.js(
        "return document.getElementById('frontier-plot').data.slice(1, -1).reduce((n, t) => n + t.x.length, 0)"
    )
    assert points == 2, "only those that have the number"


def test_the_staircase_is_that_of_the_figure(browser: Browser, report: Report) -> None:
    line = browser.js("const t = document.getElementById('frontier-plot').data[0]; return [t.x, t.y]")
    points = [[c.value[1], c.value[0]] for c in report.frontier("certain")]
    expected = staircase(np.array(points, dtype=float), ["minimize", "maximize"])
    assert list(zip(*line, strict=True)) == [pytest.approx(tuple(p)) for p in expected]


def test_the_table_filters(browser: Browser, report: Report) -> None:
    sure = sum((c.probability or 0) >= 0.95 for c in report.candidates)
    cases = {
        "tome": 2,
        "tome -int8": 1,
        "size_bytes < 300k": 5,
        "size_bytes<=200kB and top1_pct >= 97": 3,
        "tome.r=1": 2,
        "mlp_ratio>0.4 certainly": 0,
        "breaks": 1,
        "simulated": 1,
        "probability>=0.95": sure,
        "<img": 1,
    }
    everything = len(report.candidates)
    for text, expected in cases.items():
        browser.filter(text)
        browser.wait(
            "return document.getElementById('filter-note').textContent === arguments[0]",
            f"{expected} of {everything} recipes",
        )
        assert browser.count("#recipe-table tbody tr") == expected, text
    browser.driver.find_element(By.ID, "filter-clear").click()
    assert browser.count("#recipe-table tbody tr") == everything


def test_an_unknown_column_is_named(browser: Browser) -> None:
    browser.filter("sise<3")
    browser.wait(
        "return document.getElementById('filter-note').textContent.startsWith('no column sise; columns: top1_pct, ')"
    )
    assert browser.driver.find_element(By.ID, "filter").get_attribute("aria-invalid") == "true"


def test_a_click_on_a_heading_sorts(browser: Browser) -> None:
    def column() -> list[str]:
        return browser.texts("#recipe-table tbody td:nth-child(5)")

    heading = browser.driver.find_element(By.CSS_SELECTOR, "#recipe-table th:nth-child(5) button")
    assert heading.text == "artefact size"
    heading.click()
    kilobytes = [float(text.split()[0]) for text in column()]
    assert kilobytes == sorted(kilobytes)
    heading.click()
    assert [float(text.split()[0]) for text in column()] == sorted(kilobytes, reverse=True)


def test_a_range_on_an_axis_narrows_everything(browser: Browser) -> None:
    canvas = browser.driver.find_element(By.ID, "parallel-canvas")
    browser.js("arguments[0].scrollIntoView({block: 'center'})", canvas)
    box = browser.js("const b = arguments[0].getBoundingClientRect(); return [b.left, b.top, b.width]", canvas)
    last = round(box[0] + box[2] - 44)  # the axis of throughput: fast is up
    drag = ActionBuilder(browser.driver)
    drag.pointer_action.move_to_location(last, round(box[1] + 45)).pointer_down()
    drag.pointer_action.move_to_location(last, round(box[1] + 80)).move_to_location(
        last, round(box[1] + 100)
    ).pointer_up()
    drag.perform()
    assert browser.text("#filter-note") == "1 of 9 recipes"
    assert browser.texts("#recipe-table tbody td:nth-child(2) button") == ["tome(r=1, schedule=decreasing)"]
    points = browser.js(
        "return document.getElementById('frontier-plot').data.slice(1, -1).reduce((n, t) => n + t.x.length, 0)"
    )
    assert points == 1
    inked = browser.js(
        "const c = arguments[0]; return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v)",
        canvas,
    )
    assert inked


def test_hostile_texts_are_texts(browser: Browser, rows: Rows) -> None:
    assert browser.driver.title == "looks – vitpareto"
    assert HOSTILE in browser.text("#failures-list")
    assert any(HOSTILE in text for text in browser.texts("#recipe-table tbody td:nth-child(2)"))
    browser.click_point(f"precision(dtype={HOSTILE})")
    browser.wait("return document.querySelector('#panel .steps')?.textContent.includes('onerror')")
    assert browser.js("return document.querySelectorAll('script').length") == 3
    assert browser.js("return document.images.length") == 0
    assert browser.driver.title == "looks – vitpareto"


def test_progress_and_techniques_are_drawn(browser: Browser) -> None:
    line = browser.js("const t = document.getElementById('progress-plot').data[0]; return [t.x, t.y]")
    assert line == [[2, 3, 4], [0.1, 0.5, 0.9]]
    browser.driver.find_element(By.CSS_SELECTOR, "#progress-controls input[value=time]").click()
    assert browser.js("return document.getElementById('progress-plot').data[0].x[0]") == 0
    shown = browser.texts("#techniques-bars tbody tr")
    assert len(shown) == 4
    assert any(re.match(r"tome\s+\d+\.\d %\s+2\s+\d", text) for text in shown)


def test_dark_is_dark_and_nothing_is_wider_than_the_window(browser: Browser) -> None:
    def colours() -> tuple[str, str]:
        return (
            browser.js("return getComputedStyle(document.body).backgroundColor"),
            browser.js("return document.getElementById('frontier-plot')._fullLayout.font.color"),
        )

    light = colours()
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    browser.wait("return document.getElementById('frontier-plot')._fullLayout.font.color !== arguments[0]", light[1])
    assert colours()[0] != light[0]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    for width in (1440, 1000, 420):
        browser.resize(width)
        browser.wait("return innerWidth === arguments[0] && document.documentElement.scrollWidth <= innerWidth", width)


@pytest.mark.parametrize(
    "kind", ["nothing", "baseline only", "all failed", "none feasible", "one objective", "no speed", "no number"]
)
def test_a_study_with_little_in_it_has_a_page(chromium: Browser, tmp_path: Path, kind: str) -> None:
    made, objectives = study_of(kind, tmp_path)
    chromium.open(made.page(objectives))
    report = made.report(objectives)
    assert chromium.text("h1") == verdict(report)[0]
    assert chromium.count("#recipe-table tbody tr") == len(report.candidates)
    assert chromium.faults() == []


def test_five_thousand_recipes(chromium: Browser, report: Report, tmp_path: Path) -> None:
    from plotly.offline import get_plotlyjs

    plain = [c for c in report.candidates if not c.is_baseline]

    def made(k: int) -> Any:
        of = plain[k % len(plain)]
        spread = [None if v is None else v * (1 + k / 50_000) for v in of.value]
        return replace(of, id=f"{k:012x}", number=k, value=spread, members=[f"{k:012x}"])

    candidates = [c for c in report.candidates if c.is_baseline] + [made(k) for k in range(5000)]
    text = page(replace(report, candidates=candidates))
    assert len(text) - len(get_plotlyjs()) < 10e6
    file = tmp_path / "many.html"
    file.write_text(text, encoding="utf-8")
    chromium.open(file)
    assert chromium.text("#filter-note") == "5,001 of 5,001 recipes"
    assert chromium.count("#recipe-table tbody tr") == 100
    chromium.driver.find_element(By.ID, "filter").send_keys("tome size_bytes<190k")
    chromium.wait("return document.getElementById('filter-note').textContent.startsWith('0 of')")
    assert chromium.faults() == []
