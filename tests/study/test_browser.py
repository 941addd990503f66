"""The page in a real Chromium, light and dark; skipped where there is none."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import websocket
from lib.results import read_results
from page_support import ATTACKS, written
from study_support import make_study, result, write_log, write_results

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--hide-scrollbars --remote-debugging-port=0"
)


class Browser:
    """One tab of a headless Chromium, through its DevTools."""

    def __init__(self, folder: Path):

        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        told, end = folder / "DevToolsActivePort", time.monotonic() + 100
        while not (told.exists() and "\n" in told.read_text()):
            assert time.monotonic() < end and self.process.poll() is None, "Chromium does not start"
            time.sleep(0.05)
        port = told.read_text().split("\n")[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=100) as answer:
            tab = next(t for t in json.load(answer) if t["type"] == "page")
        address = tab["webSocketDebuggerUrl"]
        self.socket = websocket.create_connection(address, suppress_origin=True, timeout=60)
        self.sent, self.events = 0, []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: object) -> dict:
        self.sent += 1
        self.socket.send(json.dumps(dict(id=self.sent, method=method, params=params)))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.sent:
                return answer["result"]
            self.events.append(answer)

    def js(self, expression: str):
        """The value of an expression on the page."""
        found = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        end = time.monotonic() + 100
        while not self.js(f"!!({expression})"):
            assert time.monotonic() < end, expression
            time.sleep(0.05)

    def open(self, url: str, width: int = 1280, dark: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def show(self, stage: str) -> str:
        """Scroll to a stage's curves; JavaScript for their place."""
        place = f"document.querySelector('[data-stage=\"{stage}\"]')"
        self.js(f"{place}.scrollIntoView()")
        self.until(f"{place}.querySelector('.chart.js-plotly-plot .xtick, .chart .xtick')")
        return place

    def complaints(self) -> list[dict]:
        """Errors and warnings of the console, exceptions, and requests that left the page."""
        self.js("1")
        kinds = ("error", "warning")
        out = []
        for e in self.events:
            p = e.get("params", {})
            if e["method"] == "Runtime.exceptionThrown":
                out.append(p)
            elif e["method"] == "Log.entryAdded" and p["entry"]["level"] in kinds:
                out.append(p)
            elif e["method"] == "Runtime.consoleAPICalled" and p["type"] in kinds:
                out.append(p)
            elif e["method"] == "Network.requestWillBeSent":
                url = p["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:")):
                    out.append({"request": url})
        return out

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome here: apt-get install chromium")
    pytest.importorskip("websocket", reason="pip install websocket-client")
    one = Browser(tmp_path_factory.mktemp("chromium"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page")
    written(folder, make_study(folder))
    return (folder / "report.html").as_uri()


def choose(browser: Browser, place: str, key: str, value: str) -> None:
    select = f"{place}.querySelector('[data-key={key}]')"
    browser.js(f"{select}.value = '{value}', {select}.dispatchEvent(new Event('change')), 1")


def test_the_page_loads_without_a_complaint_and_asks_for_nothing(browser, address):
    browser.open(address)
    place = browser.show("stage-stage1")
    assert (
        browser.js(f"{place}.querySelectorAll('.scatterlayer .trace').length") == 6
    )  # two lines, two bands
    assert browser.complaints() == []


def test_no_button_sends_data_away(browser, address):
    browser.open(address)
    browser.show("stage-stage1")
    titles = browser.js("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert titles[0] == "Download plot as a PNG" and len(titles) == 6
    assert not [t for t in titles if re.search("share|cloud|edit|plotly", t, re.IGNORECASE)]


def test_a_click_in_the_legend_hides_a_curve_with_its_band_and_shows_it_again(browser, address):
    browser.open(address)
    place = browser.show("stage-stage1")
    visible = f"{place}.querySelector('.chart').data.map(t => t.visible)"
    click = f"{place}.querySelectorAll('.legend button')[1].click()"
    assert browser.js(visible) == [True] * 6
    browser.js(click)
    assert browser.js(visible) == [True] * 3 + [False] * 3
    assert browser.js(f"{place}.querySelectorAll('.scatterlayer .trace').length") == 3
    choose(browser, place, "x", "time")  # what was hidden stays hidden
    assert browser.js(visible) == [True] * 3 + [False] * 3
    browser.js(click)
    assert browser.js(visible) == [True] * 6


def test_the_axes_can_be_switched(browser, address):
    browser.open(address)
    place = browser.show("stage-stage1")
    chart = f"{place}.querySelector('.chart')"
    last, title = f"{chart}.data[2].x.at(-1)", f"{chart}.layout.xaxis.title.text"
    seen = []
    for axis in ("steps", "time", "tokens"):
        choose(browser, place, "x", axis)
        seen.append((browser.js(last), browser.js(title)))
    assert seen == [(100, "optimizer steps"), (40, "training time (s)"),
                    (pytest.approx(52.4288), "training tokens (millions, all ranks)")]  # fmt: skip
    choose(browser, place, "xscale", "log")
    choose(browser, place, "yscale", "log")
    assert browser.js(f"[{chart}.layout.xaxis.type, {chart}.layout.yaxis.type]") == ["log", "log"]
    choose(browser, place, "y", "diff")
    choose(browser, place, "yscale", "linear")
    difference = f"{chart}.data.map(t => t.y.at(-1))"
    assert browser.js(difference) == [pytest.approx(-0.045)]
    choose(browser, place, "x", "time")
    assert browser.js(difference) == [None]  # the slower arm ends after the baseline
    assert browser.complaints() == []


def test_the_first_view_leaves_step_0_out(browser, address):
    browser.open(address)
    place = browser.show("stage-stage1")
    low, high = browser.js(f"{place}.querySelector('.chart').layout.yaxis.range")
    assert 3 < low < 3.25 and 3.3 < high < 6


def test_smoothing_changes_the_line(browser, address):
    browser.open(address)
    place = browser.show("stage-stage1")
    choose(browser, place, "y", "train_loss")
    last = f"{place}.querySelector('.chart').data.at(-1).y.at(-1)"
    before = browser.js(last)
    smooth = f"{place}.querySelector('[data-key=smooth]')"
    browser.js(f"{smooth}.value = 0.9, {smooth}.dispatchEvent(new Event('input')), 1")
    assert browser.js(last) > before + 0.05


def test_run_details_open_with_knobs_as_text(browser, tmp_path, attacked):
    written(tmp_path, attacked)
    browser.open((tmp_path / "report.html").as_uri())
    browser.js("for (const d of document.querySelectorAll('details')) d.open = true")
    browser.until("document.querySelector('details.run')")
    browser.js("for (const d of document.querySelectorAll('details.run')) d.open = true")
    browser.until("document.querySelector('details.run dl')")
    for stage in browser.js(
        "[...document.querySelectorAll('[data-stage]')].map(p => p.dataset.stage)"
    ):
        place = browser.show(stage)
        choose(browser, place, "lines", "runs")
        texts = f"{place}.querySelector('.chart').data.map(t => t.name + t.hovertemplate)"
        assert not [t for t in browser.js(texts) if re.search("<(?!b>|/b>|br>|extra>|/extra>)", t)]
    assert ATTACKS[0] in browser.js("document.body.textContent")
    assert browser.js("typeof pwned") == "undefined"
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_screen(browser, address, width, dark):
    browser.open(address, width, dark)
    browser.js("for (const d of document.querySelectorAll('details')) d.open = true")
    browser.show("stage-stage1")
    assert browser.js("document.documentElement.scrollWidth") <= width
    outside = (
        "[...document.querySelectorAll('main > *, main section > *, .controls > *, .legend > *')]"
    )
    assert (
        browser.js(f"{outside}.filter(e => e.getBoundingClientRect().right > {width} + 1).length")
        == 0
    )
    paper = browser.js("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    assert browser.js("document.querySelector('.chart').layout.paper_bgcolor") == (
        "#14171b" if dark else "#ffffff"
    )
    browser.send("Emulation.clearDeviceMetricsOverride")


def test_a_watched_page_takes_up_changes_where_the_reader_is(browser, served, tmp_path):
    port, study = served
    browser.open(f"http://127.0.0.1:{port}/")
    place = browser.show("stage-stage1")
    browser.js(f"{place}.querySelectorAll('.legend button')[1].click()")
    choose(browser, place, "x", "time")
    browser.js("document.querySelector('#full-stage-stage1').open = true, scrollTo(0, 300), 1")
    rows, _ = read_results(Path(study[1]))
    write_log(tmp_path / "logs", "c1", 3.1)
    write_results(Path(study[1]), [*(dict(r.values) for r in rows), result("c1", 1, 3.1, "const")])
    browser.until("document.body.textContent.includes('const')")
    browser.until(
        f"{place}.querySelectorAll('.legend button').length === 4"
    )  # "all or none", and three cells
    assert browser.js("scrollY") == 300 and browser.js(
        "document.querySelector('#full-stage-stage1').open"
    )
    assert browser.js(f"{place}.querySelector('[data-key=x]').value") == "time"
    pressed = browser.js(f"[...{place}.querySelectorAll('[aria-pressed]')].map(b => b.ariaPressed)")
    assert pressed.count("false") == 1
    assert browser.complaints() == []
