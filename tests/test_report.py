"""What report.py promises: the page holds the numbers of the tables, refers to nothing outside, cannot be injected
into, names what is wrong with the files; --watch listens on 127.0.0.1 only. The last part drives a real Chromium
through its DevTools and is skipped, with the reason, where there is none.
"""

import argparse
import csv
import http.client
import io
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "scripts"))
sys.path.insert(0, str(REPO / "tests"))
import lib_report as web  # noqa: E402
import lib_results as lib  # noqa: E402
import report  # noqa: E402
import split_results  # noqa: E402
from test_plots import COLUMNS, TWO_BY_TWO, make_study, result, write_log, write_results  # noqa: E402

ATTACKS = (
    "</script><script>pwned=1</script>",
    "<img src=x onerror=pwned=2>",
    '"><svg/onload=pwned=3>',
    "<!--<script>",
)


class Page(HTMLParser):
    """The elements of a page, its tables and its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        self.inside = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag in ("td", "th", "script", "style") else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.inside == "script":
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])

    def under(self, id_: str) -> bool:
        return any(a.get("id") == id_ for _, a in self.elements)


def written(tmp_path: Path, options: Sequence[str]) -> str:
    """The page that report.py writes with these options."""
    out = tmp_path / "report.html"
    report.main([*options, "--out", str(out)])
    return out.read_text()


def options_of(argv: Sequence[str], **given: object) -> argparse.Namespace:
    """Options as main() has them."""
    at = dict(zip(argv[::2], argv[1::2], strict=True))
    values = dict(
        results=[Path(at["--results"])],
        logs=Path(at["--logs"]),
        stages=None,
        curves=[],
        target=None,
    )
    return argparse.Namespace(**(values | dict(title="t", port=0, every=1) | given))


@pytest.fixture
def study(tmp_path) -> list[str]:
    return make_study(tmp_path)


# ----------------------------------------------------------------------------
# Numbers


def test_the_page_holds_the_table_of_the_csv_to_the_last_digit(tmp_path, study):
    results, logs = study[1], study[3]
    split_results.main(["--source", results, "--logs", logs, "--out-dir", str(tmp_path / "out")])
    expected = list(csv.reader(io.StringIO((tmp_path / "out/tables/stage1.csv").read_text())))
    assert len(expected) == 3 and len(expected[0]) > 40
    assert expected in Page(written(tmp_path, study)).tables


def test_the_page_holds_the_rounded_table_of_split_results(tmp_path, study):
    tables = Page(written(tmp_path, study)).tables
    rows, _ = lib.read_results(Path(study[1]))
    curves = lib.Curves(Path(study[3]))
    table = lib.make_table(rows, lib.Stage("stage1"), curves)
    for _, columns, lines in lib.pieces_of(lib.cells_of(table), table):
        wanted = [*table.keys, *columns]
        assert [wanted, *([line[c] for c in wanted] for line in lines)] in tables


def test_the_overview_says_what_is_settled(tmp_path):
    runs = [(f"{gate}{s}", s, base + s / 10000, gate) for gate, base in (("none", 3.3), ("elementwise", 3.2),
            ("const", 3.3001)) for s in (1, 2, 3)]  # fmt: skip
    runs[4] = (*runs[4][:2], 3.2005, "elementwise")
    runs[8] = (*runs[8][:2], 3.31, "const")
    page = Page(written(tmp_path, make_study(tmp_path, runs)))
    overview = next(t for t in page.tables if "verdict" in t[0])
    assert [row[1:3] for row in overview[1:]] == [
        ["elementwise", "better"],
        ["const", "not settled"],
    ]
    assert overview[1][3] == "-0.0999" and overview[1][8] == "3 / 3"
    assert "1 of 2 comparisons" in page.words


def test_one_seed_gets_no_interval_and_no_verdict(tmp_path):
    page = Page(written(tmp_path, make_study(tmp_path, TWO_BY_TWO[::2])))
    overview = next(t for t in page.tables if "verdict" in t[0])
    assert overview[1][2:6] == ["n=1: not tested", "-0.0500", "-", "-"]
    assert not [a for tag, a in page.elements if a.get("class") == "bar"]


# ----------------------------------------------------------------------------
# Curves and runs


def test_a_cells_curve_is_the_mean_of_its_runs_with_their_range(tmp_path, study):
    (stage,) = Page(written(tmp_path, study)).data["stages"]
    none, gate = stage["cells"]
    assert (none["label"], none["base"], gate["base"]) == ("none (n=2)", None, 0)
    val = gate["val"]
    assert val["s"] == list(range(0, 101, 10)) and (val["v"][0], val["v"][-1]) == (16, 3.265)
    assert (val["lo"][-1], val["hi"][-1], val["t"][-1], val["k"]) == (3.25, 3.28, 44, 524288)
    assert {"train_loss", "lr", "tokens_per_s", "grad_norm"} <= gate["trace"].keys()
    assert [r["label"] for r in stage["runs"]] == [
        f"{g} seed {s}" for g in ("none", "elementwise") for s in (1, 2)
    ]


def test_no_curve_has_more_than_200_points(tmp_path):
    options = make_study(tmp_path)
    for run in ("a1", "b1"):
        write_log(tmp_path / "logs", run, 3.2, steps=5000, every=1)
    (stage,) = Page(written(tmp_path, options)).data["stages"]
    sizes = [
        len(part["s"]) for c in stage["cells"] + stage["runs"] for part in (c["val"], c["trace"])
    ]
    assert 150 <= max(sizes) <= 200


def test_a_run_that_goes_on_is_shown_with_its_curve_and_a_silent_one_is_flagged(tmp_path, study):
    for run, heard in (("now", time.time()), ("dead", time.time() - 3600)):
        write_log(tmp_path / "logs", run, 3.4, steps=40)
        status = dict(
            run_id=run,
            status="running",
            step=40,
            num_iterations=100,
            tokens_per_s="1000",
            updated=heard,
        )
        (tmp_path / "logs" / run / "status.json").write_text(json.dumps(status))
    page = Page(written(tmp_path, study))
    running = next(t for t in page.tables if t[0][0] == "run")
    assert [row[:2] for row in running[1:]] == [["dead", "40/100"], ["now", "40/100"]]
    assert any("silent for over 120 s" in w and "dead" in w and "now" not in w for w in page.words)
    loose = next(s for s in page.data["stages"] if s["name"] == "no stage")
    assert {r["id"]: r["label"] for r in loose["runs"]}["now"] == "now running"


def test_run_details_have_the_knobs_and_the_environment_of_the_log(tmp_path, study):
    knobs = json.dumps(dict(lr=0.01, attngate="none", device="cuda"), indent=2)
    log = 'lines += ["hyperparameters:"]\nhyperparameters:\n{"lr": 0.5}\nRunning pytorch 1.0\n'  # an earlier start
    log += f"{'=' * 100}\ngit_commit: abc\ncommand: python train.py --lr 0.01\n"
    log += f"hyperparameters:\n{knobs}\nRunning pytorch 2.13\nnvidia-smi:\n{'GPU' * 40}\n{'=' * 100}\ndevice: 8 x H200\n"
    (tmp_path / "logs/a1.txt").write_text(log + "step:1/100 train_loss:3.5\n")
    data = Page(written(tmp_path, study)).data
    details = {d["line"].split(" | ")[0]: d for d in data["stages"][0]["details"]}
    assert details["a1"]["knobs"] == dict(lr="0.01", attngate="none", device="cuda")
    env = {k: data["pool"][v] if isinstance(v, int) else v for k, v in details["a1"]["env"].items()}
    assert env == {"git_commit": "abc", "command": "python train.py --lr 0.01", "torch": "Running pytorch 2.13",
                   "nvidia-smi": "GPU" * 40, "device": "8 x H200"}  # fmt: skip
    assert details["b1"]["knobs"] == {} and "loss 3.2500" in details["b1"]["line"]


# ----------------------------------------------------------------------------
# Nothing outside, nothing injected


def test_the_page_refers_to_nothing_outside(tmp_path, study):
    text = written(tmp_path, study)
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "#")[:1] in "#" or attributes[name].startswith("data:"), (
                tag,
                attributes,
            )
    assert [
        tag for tag, _ in page.elements if tag in ("iframe", "object", "embed", "base", "form")
    ] == []
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "@import" not in style and "url(" not in style
    own = page.scripts[2]
    assert own == web.PROGRAM and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", own)
    assert re.findall(r"fetch\(([^)]*)", own) == ['"live?have=" + encodeURIComponent(data.version']


def test_the_policy_allows_no_program_but_ours_and_no_address(tmp_path, study):
    policy = next(
        a["content"] for _, a in Page(written(tmp_path, study)).elements if "http-equiv" in a
    )
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";") if rule.strip()}
    assert rules["default-src"] == ["'none'"] and "connect-src" not in rules
    assert (
        all(word.startswith("'sha256-") for word in rules["script-src"])
        and len(rules["script-src"]) == 2
    )


@pytest.fixture
def attacked(tmp_path) -> list[str]:
    """A study whose names, notes, knobs and states are markup."""
    nasty = dict(notes=f"X={ATTACKS[1]} {ATTACKS[0]}", gpu_name=ATTACKS[2])
    rows = [result(run, seed, loss, gate, torch=ATTACKS[seed], **nasty)
            for run, seed, loss, gate in TWO_BY_TWO]  # fmt: skip
    rows.append(result("odd" + ATTACKS[1], 1, 3.4, ATTACKS[0]))
    rows.append(result("lost" + ATTACKS[2], 1, 3.4, status=ATTACKS[1]))
    path = write_results(tmp_path / "results.csv", rows)
    for run, _, loss, _ in TWO_BY_TWO:
        write_log(tmp_path / "logs", run, loss)
        log = f"x\nhyperparameters:\n{json.dumps({ATTACKS[1]: ATTACKS[0]})}\nRunning {ATTACKS[1]}\n"
        (tmp_path / f"logs/{run}.txt").write_text(log)
    name = "<img src=x onerror=pwned=4>"
    write_log(tmp_path / "logs", name, 3.5)
    status = dict(status="running", host=ATTACKS[1], step=ATTACKS[0], updated=time.time())
    (tmp_path / "logs" / name / "status.json").write_text(json.dumps(status))
    return ["--results", str(path), "--logs", str(tmp_path / "logs"), "--title", ATTACKS[0]]


def test_text_from_files_is_text_on_the_page(tmp_path, attacked):
    page = Page(written(tmp_path, attacked))
    assert len(page.scripts) == 3 and page.scripts[2] == web.PROGRAM
    assert not [
        tag
        for tag, a in page.elements
        if tag in ("img", "svg") or any(name.startswith("on") for name in a)
    ]
    assert ATTACKS[0] in "".join(page.words)  # shown, as text
    assert ATTACKS[1] in json.dumps(page.data)


def test_json_in_the_page_cannot_end_its_block():
    nasty = {"a": "</script>\u2028<!--&"}
    text = web.to_json(nasty)
    assert not set(text) & set("<>&\u2028") and json.loads(text) == nasty


# ----------------------------------------------------------------------------
# Broken files


def _torn(folder: Path) -> None:
    with open(folder / "results.csv", "a") as f:
        f.write("a9,2026")


def _nan(folder: Path) -> None:
    (folder / "logs/a1/metrics.csv").write_text(
        f"{COLUMNS}\n10,nan,nan,1,1,1,1,1,1,1\n20,3,3.5,1,2,1,1,1,1,1\n"
    )


def _set(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


BROKEN = {
    "an empty results file": (_set("results.csv", ""), "no rows yet"),
    "no results file": (lambda folder: (folder / "results.csv").unlink(), "No such file"),
    "a results file that is none": (_set("results.csv", "x,y\n1,2\n"), "not a header of results"),
    "a header only": (_set("results.csv", ",".join(lib.HEADER) + "\n"), "no rows yet"),
    "a torn row": (_torn, "2 fields where the header has"),
    "a missing log": (lambda folder: shutil.rmtree(folder / "logs/a1"), "no curve: 1 run, a1"),
    "no folder of logs": (lambda folder: shutil.rmtree(folder / "logs"), "no such folder of logs"),
    "metrics with a nan": (_nan, "1 validation without a finite loss"),
    "empty metrics": (_set("logs/a1/metrics.csv", ""), "metrics.csv: is empty"),
    "metrics without columns": (_set("logs/a1/metrics.csv", "a,b\n1,2\n"), "has no column step"),
    "metrics without validations": (
        _set("logs/a1/metrics.csv", COLUMNS + "\n1,3,,1,1,1,1,1,1,1\n"), "no validation yet"),
    "binary metrics": (_set("logs/a1/metrics.csv", "\0\ufffd\n" * 9), "has no column"),
    "a torn status": (_set("logs/a1/status.json", '{"status": "run'), "status.json: cannot be read"),
    "a status that is none": (_set("logs/a1/status.json", "[1]"), "expected an object"),
    "odd status values": (_set("logs/a1/status.json", '{"status": "running", "updated": null, "eta_s": []}'), "silent"),
    "a stage with one run": (
        lambda folder: write_results(folder / "results.csv", [result("b1", 1, 3.2, "elementwise")]), "no baseline"),
    "unfinished runs only": (
        lambda folder: write_results(folder / "results.csv", [result("a1", 1, "", status="failed")]), "1 failed: a1"),
    "a loss that is none": (
        lambda folder: write_results(folder / "results.csv", [result("a1", 1, "nan")]), "finished without a loss"),
    "a run in no stage": (
        lambda folder: write_results(
            folder / "results.csv", [result("a1", 1, 3, num_iterations=7, warmdown_iters=0)]), ""),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_input_gives_a_complete_page_that_names_it(tmp_path, study, what):
    spoil, message = BROKEN[what]
    spoil(tmp_path)
    text = written(tmp_path, study)
    page = Page(text)
    assert text.rstrip().endswith("</html>") and page.under("overview") and "stages" in page.data
    assert page.under("problems") == bool(message)
    assert any(message in word for word in page.words)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--out", "/proc/nothing.html"], "cannot be written"),
        (["--stages", "nowhere.toml"], "nowhere.toml: No such file"),
        (["--every", "0"], "at least 1 second"),
        (["--target", "-1"], "expected a loss above 0"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(tmp_path, study, options, message):
    command = [
        sys.executable,
        str(REPO / "scripts/report.py"),
        *study,
        "--out",
        str(tmp_path / "r.html"),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------
# Watching


@pytest.fixture
def served(tmp_path, study) -> Iterator[tuple[int, list[str]]]:
    """The port of a watched study, and its options."""
    server = report.server(options_of(study))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], study
    server.shutdown()
    server.server_close()


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def test_watch_listens_on_127_0_0_1_only(served):
    port, _ = served
    assert get(port, "/")[0] == 200
    for other in ("127.0.0.2", socket.gethostbyname(socket.gethostname())):
        if other != "127.0.0.1":
            with pytest.raises(OSError):
                socket.create_connection((other, port), timeout=2)


def test_watch_answers_no_foreign_name_and_no_other_path(served):
    port, _ = served
    assert get(port, "/", host="evil.example")[0] == 403
    assert [get(port, path)[0] for path in ("/results.csv", "/../plumbing.py", "/live/x")] == [
        404,
        404,
        404,
    ]


def test_watch_serves_what_has_changed_and_only_then(served, tmp_path):
    port, study = served
    page = Page(get(port, "/")[1])
    have = page.data["version"]
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert "connect-src 'self'" in policy
    time.sleep(1)
    assert get(port, f"/live?have={have}") == (204, "")
    rows, _ = lib.read_results(Path(study[1]))
    rows = [dict(r.values) for r in rows] + [result("c1", 1, 3.1, "const")]
    write_results(Path(study[1]), rows)
    time.sleep(1)
    status, body = get(port, f"/live?have={have}")
    fresh = json.loads(body)
    assert status == 200 and "const" in fresh["main"] and fresh["data"]["version"] != have
    assert "const" in get(port, "/")[1]


def test_watch_names_what_it_cannot_read(tmp_path, study):
    (tmp_path / "s.toml").write_text("[stage.a]\nnum_iterations = 1500\n")
    server = report.server(options_of(study, stages=tmp_path / "s.toml"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "s.toml").write_text("[")
    assert (
        get(server.server_address[1], "/")[0] == 500
        and "s.toml" in get(server.server_address[1], "/")[1]
    )
    server.shutdown()
    server.server_close()


def test_a_taken_port_is_one_line(study):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(lib.UserError, match="choose another, 0 takes a free one"):
            report.server(options_of(study, port=taken.getsockname()[1]))


# ----------------------------------------------------------------------------
# In a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-port=0"
)


class Browser:
    """One tab of a headless Chromium, through its DevTools."""

    def __init__(self, folder: Path):
        import websocket

        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        told, end = folder / "DevToolsActivePort", time.monotonic() + 30
        while not (told.exists() and "\n" in told.read_text()):
            assert time.monotonic() < end and self.process.poll() is None, "Chromium does not start"
            time.sleep(0.05)
        port = told.read_text().split("\n")[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
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
        end = time.monotonic() + 30
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
    rows, _ = lib.read_results(Path(study[1]))
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


# ----------------------------------------------------------------------------
# Large: python tests/test_report.py FOLDER writes the study that docs/report.md was measured with (1.5 GB)


def big_study(
    folder: Path, num_rows: int = 100_000, num_logs: int = 5_000, steps: int = 1_500
) -> None:
    """10 stages of 20 cells; runs with logs as train_gpt.py writes them, its own source in front."""
    source = "".join((REPO / name).read_text() for name in ("train_gpt.py", "plumbing.py"))
    draws, rows = random.Random(1), []
    for i in range(num_rows):
        cell, seed = divmod(i % 200, 20)[1], i // 200
        gate, rate = ("none", "elementwise", "headwise", "const")[cell % 4], 0.001 * (1 + cell // 4)
        loss = 3.5 - 0.01 * (cell % 4) + 0.02 * (cell // 4) + draws.gauss(0, 0.0013)
        ms, stage = 400 + 10 * (cell % 4) + draws.gauss(0, 1), f"s{i % 200 // 20}"
        more = dict(learning_rate=rate, warmdown_iters=400, ms_per_step=ms, stage=stage, epochs=0.3)
        rows.append(result(f"run{i:06d}", seed, loss, gate, **more))
        if i % (num_rows // num_logs) == 0:
            run = rows[-1]["run_id"]
            write_log(folder / "logs", run, loss, ms, steps, every=125)
            status = dict(run_id=run, status="finished", step=steps, updated=1.0)
            (folder / "logs" / run / "status.json").write_text(json.dumps(status))
            knobs = json.dumps(
                dict(attngate=gate, lr=rate, seed=seed, **{f"knob{k}": k for k in range(30)}),
                indent=2,
            )
            text = f"{source}\ncommand: train_gpt.py --seed {seed}\nhyperparameters:\n{knobs}\nRunning pytorch 2.13.0\n"
            text += f"nvidia-smi:\n{'GPU ' * 500}\n{'=' * 100}\ndevice: 8 x NVIDIA H200\n"
            (folder / f"logs/{run}.txt").write_text(
                text + "step:1/1500 train_loss:3.5 train_time:1ms\n" * steps
            )
    write_results(folder / "results.csv", rows)


if __name__ == "__main__":
    big_study(Path(sys.argv[1]))
