"""The page in a real browser: nothing is asked for, nothing complains, it sorts, filters, and fits a phone."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.records import Record
from testbed.report import page
from tests.made_up import MANY, SIZES


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Return a headless browser that listens to the console and to the network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("no chromium with its chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


@pytest.fixture
def shown(chromium: Any, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that shows the page of records on a screen of a size, light or dark."""

    def show(records: list[Record], size: tuple[int, int] = (1280, 900), scheme: str = "light") -> Any:
        path = page.write_page(records, tmp_path)
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        chromium.get_log("browser"), chromium.get_log("performance")  # of the page before
        chromium.get(path.as_uri())
        return chromium

    return show


def column(browser: Any, key: str) -> list[str]:
    """Return what the table's visible rows say in a column."""
    script = "return [...document.querySelectorAll(arguments[0])].map((cell) => cell.textContent)"
    found: list[str] = browser.execute_script(script, f"#table tbody tr:not([hidden]) td.{key}")
    return found


def test_nothing_is_asked_for_and_nothing_complains(shown: Any) -> None:
    browser = shown([*MANY, *SIZES])
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [browser.current_url]
    assert browser.get_log("browser") == []


def test_sorts_by_number_both_ways_with_what_is_missing_last(shown: Any) -> None:
    browser = shown(MANY)
    header = browser.find_element("css selector", "th.median_s button")
    header.click()
    up = column(browser, "median_s")
    header.click()
    down = column(browser, "median_s")
    assert [text.split(" ±")[0] for text in up[:5]] == ["10 ms", "50 ms", "100 ms", "200 ms", "–"]
    assert [text.split(" ±")[0] for text in down[:5]] == ["200 ms", "100 ms", "50 ms", "10 ms", "–"]


def test_filters_by_words(shown: Any) -> None:
    browser = shown(MANY)
    browser.find_element("id", "filter").send_keys("B_ out")
    assert column(browser, "backend") == ["b_timeout"]
    assert browser.find_element("id", "count").text == f"1 of {len(MANY) + 2} rows"


def test_filters_by_choice(shown: Any) -> None:
    browser = shown(MANY)
    browser.find_element("xpath", "//select/option[.='oom']").click()
    assert column(browser, "backend") == ["b_oom"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone_and_can_be_read(scheme: str, shown: Any) -> None:
    browser = shown([*MANY, *SIZES], (390, 844), scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    script = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    text, back = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in browser.execute_script(script))
    assert (back - text) * (1 if scheme == "light" else -1) > 400
    drawn = "getComputedStyle(document.querySelector('svg text')).fill"
    assert browser.execute_script(f"return {drawn} === getComputedStyle(document.querySelector('figure')).color")
