"""The HTML report in headless Chromium: it loads nothing, says nothing on the console, sorts, tells of cells.

Set LORARY_SCREENSHOTS to a folder to keep the pictures; LORARY_REPORT to look at a page of your own.
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]


class Tab:
    """A page of Chromium, driven through pipes by the DevTools protocol."""

    def __init__(self, process: subprocess.Popen, write: int, read: int):
        self._process, self._write, self._read = process, write, read
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def open(self, url: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            code = {"Enter": 13, "ArrowRight": 39, "ArrowDown": 40}[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def look(self, *, width: int, height: int, dark: bool) -> None:
        is_phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def complaints(self) -> list[Any]:
        """What a developer would see on the console."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [event["params"] for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            assert part, f"Chromium ended: {self._process.poll()}"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A tab of a browser of its own."""
    to_browser, our_write = os.pipe()
    our_read, from_browser = os.pipe()
    profile = tmp_path_factory.mktemp("profile")
    options = f"--headless --no-sandbox --disable-gpu --no-first-run --user-data-dir={profile}"
    # the protocol's pipe is on descriptors 3 and 4, which are first moved out of the way of each other
    pipes = f"exec 8<&{to_browser} 9>&{from_browser}; exec 3<&8 4>&9 8<&- 9>&-"
    command = f"{pipes}; exec '{CHROMIUM}' --remote-debugging-pipe {options} about:blank"
    process = subprocess.Popen(
        ["bash", "-c", command], pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL, start_new_session=True
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Tab(process, our_write, our_read)
    finally:
        process.kill()
        process.wait()
        os.close(our_write)
        os.close(our_read)


@pytest.fixture(scope="module")
def page(run: Callable, store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    if found := os.environ.get("LORARY_REPORT"):
        return Path(found).resolve().as_uri()
    assert run("report", "--html", str(path), "--gate", "average_score<100", store=store).exit_code == 0
    return path.as_uri()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("device", "width", "height"), [("desktop", 1280, 900), ("phone", 390, 844)])
def test_it_is_drawn_without_a_word_on_the_console(
    tab: Tab, page: str, device: str, width: int, height: int, dark: bool
):
    tab.look(width=width, height=height, dark=dark)

    tab.open(page)

    assert tab.complaints() == []
    assert tab.requests() == [page]
    assert tab.value("document.documentElement.scrollWidth") <= width, "the page itself never scrolls sideways"
    background = tab.value("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 27)" if dark else "rgb(253, 253, 251)")
    picture = tab.picture()
    assert len(picture) > 20_000
    if folder := os.environ.get("LORARY_SCREENSHOTS"):
        (Path(folder) / f"{device}-{'dark' if dark else 'light'}.png").write_bytes(picture)


def test_a_table_is_sorted_by_keyboard(tab: Tab, page: str):
    tab.open(page)
    table = "document.querySelector('#domains table')"
    column = f"[...{table}.tBodies[0].rows].map(row => row.cells[3].dataset.v).filter(Boolean).map(Number)"

    tab.value(f"{table}.querySelectorAll('button')[3].focus()")
    tab.press("Enter")
    rising = tab.value(column)
    state = tab.value(f"{table}.tHead.rows[0].cells[3].getAttribute('aria-sort')")
    tab.press("Enter")
    falling = tab.value(column)

    assert state == "ascending"
    assert rising == sorted(rising)
    assert falling == rising[::-1]
    assert len(set(rising)) > 1
    assert tab.complaints() == []


def test_arrow_keys_go_through_cells_which_tell_their_interval(tab: Tab, page: str):
    tab.open(page)

    tab.value("document.querySelector('#matrix td').focus()")
    tab.press("ArrowRight")
    tab.press("ArrowDown")

    assert tab.value("document.activeElement.parentNode.sectionRowIndex") == 1
    assert tab.value("document.activeElement.cellIndex") == 2
    told = tab.value("document.getElementById('tip').innerText").split("\n")
    assert not tab.value("document.getElementById('tip').hidden")
    assert told[0].endswith("after general")
    assert "n = " in told[1]
    assert told[2].startswith("95 % ")


def test_the_theme_can_be_chosen(tab: Tab, page: str):
    tab.look(width=1280, height=900, dark=False)
    tab.open(page)

    tab.value("document.getElementById('theme').click()")

    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 27)"
    assert tab.value("document.getElementById('theme').textContent") == "Light"


def test_what_a_page_could_smuggle_in_is_refused_by_the_policy(tab: Tab, page: str):
    tab.open(page)

    tab.value("document.body.insertAdjacentHTML('beforeend', '<img src=\"https://example.org/x.png\">')")
    tab.value("document.body.insertAdjacentHTML('beforeend', '<p id=\"odd\" style=\"color: rgb(1, 2, 3)\">x</p>')")

    assert tab.value("getComputedStyle(document.getElementById('odd')).color") != "rgb(1, 2, 3)"
    reasons = [e["params"].get("blockedReason") for e in tab.events if e.get("method") == "Network.loadingFailed"]
    assert reasons == ["csp"]
