"""The page: the numbers of the tables, nothing from outside, no injection, bad files, --watch."""

import csv
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import report
import split_results
from lib.curves import Curves
from lib.page import PROGRAM, to_json
from lib.program import UserError
from lib.render import cells_of, pieces_of
from lib.results import HEADER, read_results
from lib.stages import Stage
from lib.tables import make_table
from page_support import ATTACKS, Page, get, options_of, written
from study_support import COLUMNS, ROOT, TWO_BY_TWO, make_study, result, write_log, write_results


def test_the_page_holds_the_table_of_the_csv_to_the_last_digit(tmp_path, study):
    results, logs = study[1], study[3]
    split_results.main(
        ["--results_file", results, "--logs_folder", logs, "--out-dir", str(tmp_path / "out")]
    )
    expected = list(csv.reader(io.StringIO((tmp_path / "out/tables/stage1.csv").read_text())))
    assert len(expected) == 3 and len(expected[0]) > 40
    assert expected in Page(written(tmp_path, study)).tables


def test_the_page_holds_the_rounded_table_of_split_results(tmp_path, study):
    tables = Page(written(tmp_path, study)).tables
    rows, _ = read_results(Path(study[1]))
    curves = Curves(Path(study[3]))
    table = make_table(rows, Stage("stage1"), curves)
    for _, columns, lines in pieces_of(cells_of(table), table):
        wanted = [*table.keys, *columns]
        assert [wanted, *([line[c] for c in wanted] for line in lines)] in tables


def test_the_page_opens_with_a_sentence_per_comparison_the_settled_ones_first(tmp_path):
    losses = {"none": 3.3, "elementwise": 3.2, "const": 3.3001}
    runs = [
        (f"{gate}{s}", s, loss + s / 10000, gate)
        for gate, loss in losses.items()
        for s in (1, 2, 3)
    ]
    runs[4] = (*runs[4][:2], 3.2005, "elementwise")
    runs[8] = (*runs[8][:2], 3.31, "const")
    page = Page(written(tmp_path, make_study(tmp_path, runs)))
    text = " ".join(" ".join(page.words).split())
    first, second = text.index("better stage1"), text.index("not settled stage1")
    assert text.index("What came out") < first < second < text.index("Runs 9 runs")
    assert (
        "elementwise lowers the final loss by 0.0999 nats per token (3.03%) against none; the 95% "
        "interval goes from -0.100" in text
    )
    assert "A step takes 10.0% longer" in text[first:second]
    assert "(n=3); at 5% this is settled, Holm p" in text[first:second]
    assert "1 of 2 comparisons settled" in text
    assert len([a for tag, a in page.elements if a.get("class") == "spark"]) == 2


def test_one_seed_gets_no_interval_and_no_verdict(tmp_path):
    page = Page(written(tmp_path, make_study(tmp_path, TWO_BY_TWO[::2])))
    text = " ".join(" ".join(page.words).split())
    assert "n=1: not tested stage1" in text and "lowers the final loss by 0.0500" in text
    assert "with a single seed nothing says how sure that is" in text
    assert not [a for tag, a in page.elements if a.get("class") == "bar"]


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
    # an earlier start
    log = 'lines += ["hyperparameters:"]\nhyperparameters:\n{"lr": 0.5}\nRunning pytorch 1.0\n'
    log += f"{'=' * 100}\ngit_commit: abc\ncommand: python train.py --lr 0.01\n"
    log += f"hyperparameters:\n{knobs}\nRunning pytorch 2.13\nnvidia-smi:\n{'GPU' * 40}\n"
    log += f"{'=' * 100}\ndevice: 8 x H200\n"
    (tmp_path / "logs/a1.txt").write_text(log + "step:1/100 train_loss:3.5\n")
    data = Page(written(tmp_path, study)).data
    details = {d["line"].split(" | ")[0]: d for d in data["stages"][0]["details"]}
    assert details["a1"]["knobs"] == dict(lr="0.01", attngate="none", device="cuda")
    env = {k: data["pool"][v] if isinstance(v, int) else v for k, v in details["a1"]["env"].items()}
    assert env == {
        "git_commit": "abc",
        "command": "python train.py --lr 0.01",
        "torch": "Running pytorch 2.13",
        "nvidia-smi": "GPU" * 40,
        "device": "8 x H200",
    }
    assert details["b1"]["knobs"] == {} and "loss 3.2500" in details["b1"]["line"]


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
    assert own == PROGRAM.read_text() and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", own)
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


def test_text_from_files_is_text_on_the_page(tmp_path, attacked):
    page = Page(written(tmp_path, attacked))
    assert len(page.scripts) == 3 and page.scripts[2] == PROGRAM.read_text()
    assert not [
        tag
        for tag, a in page.elements
        if tag == "img"
        or (tag == "svg" and a.get("class") != "spark")
        or any(name.startswith("on") for name in a)
    ]
    assert ATTACKS[0] in "".join(page.words)  # shown, as text
    assert ATTACKS[1] in json.dumps(page.data)


def test_json_in_the_page_cannot_end_its_block():
    nasty = {"a": "</script>\u2028<!--&"}
    text = to_json(nasty)
    assert not set(text) & set("<>&\u2028") and json.loads(text) == nasty


def _torn(folder: Path) -> None:
    with open(folder / "results.csv", "a") as f:
        f.write("a9,2026")


def _nan(folder: Path) -> None:
    (folder / "logs/a1/metrics.csv").write_text(
        f"{COLUMNS}\n10,nan,nan,1,1,1,1,1,1,1\n20,3,3.5,1,2,1,1,1,1,1\n"
    )


def _set(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def _only(*run, **given):
    """A results file of this run alone."""
    return lambda folder: write_results(folder / "results.csv", [result(*run, **given)])


ODD_STATUS = '{"status": "running", "updated": null, "eta_s": []}'
BROKEN = {
    "an empty results file": (_set("results.csv", ""), "no rows yet"),
    "no results file": (lambda folder: (folder / "results.csv").unlink(), "No such file"),
    "a results file that is none": (_set("results.csv", "x,y\n1,2\n"), "not a header of results"),
    "a header only": (_set("results.csv", ",".join(HEADER) + "\n"), "no rows yet"),
    "a torn row": (_torn, "2 fields where the header has"),
    "a missing log": (lambda folder: shutil.rmtree(folder / "logs/a1"), "no curve: 1 run, a1"),
    "no folder of logs": (lambda folder: shutil.rmtree(folder / "logs"), "no such folder of logs"),
    "metrics with a nan": (_nan, "1 validation without a finite loss"),
    "empty metrics": (_set("logs/a1/metrics.csv", ""), "metrics.csv: is empty"),
    "metrics without columns": (_set("logs/a1/metrics.csv", "a,b\n1,2\n"), "has no column step"),
    "metrics without validations": (
        _set("logs/a1/metrics.csv", COLUMNS + "\n1,3,,1,1,1,1,1,1,1\n"),
        "no validation yet",
    ),
    "binary metrics": (_set("logs/a1/metrics.csv", "\0\ufffd\n" * 9), "has no column"),
    "a torn status": (
        _set("logs/a1/status.json", '{"status": "run'),
        "status.json: cannot be read",
    ),
    "a status that is none": (_set("logs/a1/status.json", "[1]"), "expected an object"),
    "odd status values": (_set("logs/a1/status.json", ODD_STATUS), "silent"),
    "a stage with one run": (_only("b1", 1, 3.2, "elementwise"), "no baseline"),
    "unfinished runs only": (_only("a1", 1, "", status="failed"), "1 failed: a1"),
    "a loss that is none": (_only("a1", 1, "nan"), "finished without a loss"),
    "a run in no stage": (_only("a1", 1, 3, num_iterations=7, warmdown_iters=0), ""),
}


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
        str(ROOT / "scripts/report.py"),
        *study,
        "--out",
        str(tmp_path / "r.html"),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


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
    rows, _ = read_results(Path(study[1]))
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
        with pytest.raises(UserError, match="choose another, 0 takes a free one"):
            report.server(options_of(study, port=taken.getsockname()[1]))
