"""The report page in a real Chromium, driven through its debugging protocol. Skipped where there is none."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import websocket
from PIL import Image

from benchmarks.report import build_dataset, report
from common.dataset_layout import DatasetFolder

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Browser:
    """One tab."""

    def __init__(self, url: str):
        self._socket = websocket.create_connection(url, suppress_origin=True, timeout=60)
        self._last_id = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        self._socket.send(json.dumps({"id": self._last_id, "method": method, "params": parameters}))
        return self._receive(lambda message: message.get("id") == self._last_id)["result"]

    def open(self, url: str, width: int) -> None:
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=width < 600)
        self.call("Page.navigate", url=url)
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive(lambda message: message.get("method") == "Page.loadEventFired")

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def problems(self) -> list[str]:
        """Requests that left the page, and whatever the console reported."""
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        outside = [url[:80] for url in sent if not url.startswith(("data:", "file:"))]
        logged = [json.dumps(e["params"]) for e in self.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
        return outside + logged

    def close(self) -> None:
        with contextlib.suppress(websocket.WebSocketException, OSError):
            self.call("Browser.close")
        self._socket.close()

    def _receive(self, is_it) -> dict[str, Any]:
        while True:
            message = json.loads(self._socket.recv())
            if is_it(message):
                return message
            if "method" in message:
                self.events.append(message)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    profile = tmp_path_factory.mktemp("profile")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = next(match[1] for line in process.stderr if (match := re.search(r"ws://([\d.:]+)/", line)))
            with urllib.request.urlopen(f"http://{address}/json/list") as answer:
                tabs = json.load(answer)
            tab = Browser(next(each["webSocketDebuggerUrl"] for each in tabs if each["type"] == "page"))
            yield tab
            tab.close()
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The address of the page of a run with a thousand images, among them captions that try to be more than text."""
    root = tmp_path_factory.mktemp("project")
    images = root / "dataset" / "images"
    images.mkdir(parents=True)
    first = images / "0000.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(first)
    for number in range(1, 1000):
        os.link(first, images / f"{number:04}.png")
    for number in range(1000):
        caption = "sks, <script>document.title='run'</script>, <img src=http://example.com/x.png>" + ", averylongword" * 20
        (images / f"{number:04}.txt").write_text(caption)
    lora = root / "output" / "lora"
    lora.mkdir(parents=True)
    (lora / "training_config_resolved.toml").write_text('[train.saving]\noutput_name = "' + "a_long_name_" * 12 + '"\n')
    lines = [json.dumps({"step": step, "loss": 1 / (step + 1), "lr": 1e-4}) for step in range(5000)]
    (lora / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"DATASET_DIR": root / "dataset", "OUTPUT_DIR": root / "output", "TRIGGER_WORD": "sks"}
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    subprocess.run([sys.executable, str(ROOT / "scripts/report.py")], env=environment, check=True, stdout=subprocess.DEVNULL)
    return (root / "output" / "report.html").as_uri()


@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_fits_the_window_makes_no_request_and_reports_nothing(browser, page, width):
    browser.open(page, width)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('.sheet figure').length") == 1000
    assert browser.value("document.querySelectorAll('svg polyline').length") >= 2
    assert browser.value("[...document.images].every(image => !image.complete || image.naturalWidth > 0)")
    assert browser.problems() == []


def test_captions_stay_text(browser, page):
    browser.open(page, 1400)
    assert browser.value("document.scripts.length") == 1  # the page's own
    assert "LoRACat report" in browser.value("document.title")
    assert "<script>" in browser.value("document.querySelector('.sheet figcaption').textContent")


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory) -> str:
    """The address of the page of a few images, two of them flagged."""
    root = tmp_path_factory.mktemp("reviewed")
    build_dataset(DatasetFolder(root / "dataset"), 14, 64, None)
    report(root)
    return (root / "output" / "report.html").as_uri()


TEXT = "document.getElementById('exclusions').value"


def test_ticked_images_make_the_text_for_the_exclusions(browser, reviewed):
    browser.open(reviewed, 1400)
    assert [line.split()[0] for line in browser.value(TEXT).splitlines()] == ["0003.png", "0011.png"]
    browser.value("document.querySelector('input[value=\"0005.png\"]').click()")
    browser.value("document.querySelector('input[value^=\"0003.png\"]').click()")
    assert [line.split()[0] for line in browser.value(TEXT).splitlines()] == ["0011.png", "0005.png"]
    assert browser.value("document.getElementById('picked').textContent") == "2"
    browser.value("document.getElementById('copy').click()")
    assert browser.value("document.activeElement.id") == "exclusions"
    assert browser.problems() == []


def test_without_script_the_text_has_the_flagged_images(browser, reviewed):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(reviewed, 400)
        assert browser.value("getComputedStyle(document.querySelector('label.pick')).display") == "none"
        assert [line.split()[0] for line in browser.value(TEXT).splitlines()] == ["0003.png", "0011.png"]
        assert browser.value("document.documentElement.scrollWidth") <= 400
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_no_other_script_would_run(browser, reviewed):
    """Even if a text of the user were taken for one."""
    browser.open(reviewed, 1400)
    browser.value("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = \"run\"'}))")
    assert "LoRACat report" in browser.value("document.title")
    assert "Content Security Policy" in str(browser.problems())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_colour_schemes(browser, page, scheme):
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(page, 1400)
    text, back = (browser.value(f"getComputedStyle(document.body).{key}") for key in ("color", "backgroundColor"))
    text, back = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (text, back))
    assert abs(text - back) > 128
    assert (back < text) == (scheme == "dark")
