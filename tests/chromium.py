"""A real headless Chromium with a page open, for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
WAIT_S = 240
"""Less than pytest's own limit, so that a wait in vain ends by saying what it waited for."""

needs_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="needs chromium and chromedriver: apt-get install chromium chromium-driver",
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
)


class Browser:
    """Chromium with a page open."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        assert BROWSER is not None
        options.binary_location = BROWSER
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.resize(1440)

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open(self, file: Path) -> None:
        self.driver.get(file.as_uri())
        self.wait("return document.getElementById('filter-note').textContent !== ''")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, *arguments: Any) -> None:
        WebDriverWait(self.driver, WAIT_S, 0.05).until(lambda _: self.js(script, *arguments), script)

    def text(self, selector: str) -> str:
        return str(self.driver.find_element(By.CSS_SELECTOR, selector).text)

    def texts(self, selector: str) -> list[str]:
        return [e.text for e in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def filter(self, text: str) -> None:
        box = self.driver.find_element(By.ID, "filter")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(Keys.DELETE, text)

    def click_point(self, label: str) -> None:
        """Clicks the middle of a point of the frontier plot, as a reader does."""
        x, y = self.js(POINT, label)
        pointer = ActionBuilder(self.driver)
        pointer.pointer_action.move_to_location(round(x), round(y)).pause(0.1).click()
        pointer.perform()

    def faults(self) -> list[str]:
        """Whatever the console holds, and requests that left the file, since the last call."""
        console = [entry["message"] for entry in self.driver.get_log("browser")]
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        mine = [s["request"]["url"] for s in sent if s["documentURL"].startswith("file:")]
        return console + [url for url in mine if not url.startswith(("file:", "data:", "blob:"))]


POINT = """
const plot = document.getElementById("frontier-plot");
plot.scrollIntoView({block: "center"});
const data = JSON.parse(document.getElementById("data").textContent);
const k = data.recipes.findIndex((recipe) => recipe.label === arguments[0]);
const box = plot.getBoundingClientRect(), {xaxis, yaxis} = plot._fullLayout;
for (const trace of plot.data) {
  const at = (trace.customdata ?? []).indexOf(k);
  if (at >= 0 && trace.name !== "selected")
    return [box.left + xaxis._offset + xaxis.d2p(trace.x[at]), box.top + yaxis._offset + yaxis.d2p(trace.y[at])];
}
return null;
"""
