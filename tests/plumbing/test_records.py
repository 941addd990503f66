"""A run's log, metrics, status, clock and trackers."""

import csv
import json
import math
import re
import sys
import time

import pytest
import torch
from support import ONE, ROOT, metrics, run_here, write_data

import plumbing.trackers
from plumbing import UserError
from plumbing.clock import Clock
from plumbing.exchange import StepStats
from plumbing.records import RULE, RunLog, read_sources, sources_sha256
from plumbing.run_ids import read_status
from train_gpt import Knobs


def stats(step: int, **metrics: float) -> StepStats:
    return StepStats(step, 0.1, 2.0, 0.5, metrics, False, 0.0, 0, "")


def open_log(folder, cfg=None, columns=()) -> RunLog:
    log = RunLog(folder, "r", ONE, 9, 100, columns)
    log.header(cfg or Knobs(), {}, 1.0, {})
    return log


def running_clock() -> Clock:
    clock = Clock(ONE)
    clock.start()
    return clock


def test_a_torn_row_is_cut_off_before_the_next_one(monkeypatch, tmp_path):
    run_here(monkeypatch, tmp_path, run_id="a", num_iterations=4, warmdown_iters=0)
    path = tmp_path / "logs/a/metrics.csv"
    whole = path.read_text()
    path.write_text(whole + "5,1.2")
    (tmp_path / "logs/a/status.json").unlink()
    log = RunLog(tmp_path / "logs", "a", ONE, 4, 100)
    log.csv.write("next\n")
    log.close()
    assert path.read_text() == whole + "next\n"


def test_a_trainers_own_columns_are_in_metrics(tmp_path):
    log = open_log(tmp_path, columns=("aux_loss", "val_bpc"))
    clock = running_clock()
    log.step(stats(1, aux_loss=0.25), clock, "a line of its own")
    log.validation(1, 1.5, clock, " val_bpc:2.164", {"val_bpc": 2.164})
    log.step(stats(2, aux_loss=math.nan), clock, "")
    log.close()
    with open(tmp_path / "r/metrics.csv") as file:
        first, second = csv.DictReader(file)
    assert (first["aux_loss"], first["val_bpc"], first["val_loss"]) == ("0.25", "2.164", "1.500000")
    assert (second["aux_loss"], second["val_bpc"]) == ("", "")
    text = (tmp_path / "r.txt").read_text()
    assert "a line of its own\n" in text and "val_bpc:2.164\n" in text and "step:2" not in text


def test_a_new_logged_figure_leaves_the_gradient_norm_alone(tmp_path):
    """The columns of the exchange are told apart by name and number, not by where they stand."""
    from plumbing.exchange import StepExchange

    exchange = StepExchange(ONE)
    norms = torch.tensor([3.0, 4.0])
    more = {"accuracy": torch.tensor(0.5), "entropy": torch.tensor(7.0)}
    for extra in ({}, more):
        exchange.send(1, torch.tensor(2.0), 0.1, norms, None, extra, 0.0)
        (found,) = exchange.read(["a", "b"], keep=0)
        assert found.grad_norm == 5.0 and found.loss == 2.0
        assert found.metrics == {name: value.item() for name, value in extra.items()}


TRACKERS = {
    "works": (
        "class Run:\n"
        "    def log(self, values, step): sent.append((step, values))\n"
        "    def finish(self): sent.append('end')\n"
        "sent = []\n"
        "def init(**facts):\n"
        "    sent.append(facts)\n"
        "    return Run()\n"
    ),
    "raises": "def init(**facts): raise RuntimeError('no key')\n",
    "hangs": "import threading\ndef init(**facts): threading.Event().wait()\n",
    "exits": "def init(**facts): raise SystemExit(3)\n",
}
WORDS = {"absent": "is not installed", "raises": "no key", "hangs": "has not finished"}
WORDS["exits"] = "SystemExit"


@pytest.mark.parametrize("kind", [*TRACKERS, "absent"])
def test_a_tracker_gets_every_value_and_never_stops_a_run(monkeypatch, tmp_path, capsys, kind):
    name = f"tracker_that_{kind}"
    if kind in TRACKERS:
        (tmp_path / f"{name}.py").write_text(TRACKERS[kind])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plumbing.trackers.Tracker.close, "__defaults__", (0.5,))
    log = open_log(tmp_path, Knobs(tracker=name))
    clock = running_clock()
    log.step(stats(1), clock, "")
    log.validation(1, 1.5, clock, "", {})
    log.close()
    out = capsys.readouterr().out
    assert WORDS.get(kind, "") in out
    if kind == "works":
        facts, first, second, end = sys.modules[name].sent
        assert facts["project"] == "flatrun" and facts["config"]["n_layer"] == 12
        assert first[0] == 1 and first[1]["train_loss"] == 2.0
        assert second == (1, {"val_loss": 1.5}) and end == "end"
        assert "tracker:" not in out


def test_a_finished_run_id_is_refused(monkeypatch, tmp_path):
    short = {"run_id": "a", "num_iterations": 2, "warmup_iters": 0, "warmdown_iters": 0}
    assert run_here(monkeypatch, tmp_path, **short)[0] == 0
    with pytest.raises(UserError, match=r"run a is complete .*choose another RUN_ID"):
        run_here(monkeypatch, tmp_path, **short)


def test_a_run_id_in_use_is_refused(monkeypatch, tmp_path):
    log = RunLog(tmp_path / "logs", "a", ONE, 1, 100)
    with pytest.raises(UserError, match="run a is being trained by another process"):
        run_here(monkeypatch, tmp_path, run_id="a")
    log.lock.release()


def test_a_log_folder_that_cannot_be_used_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"cannot be used .*; set LOGS_FOLDER or RUN_ID to another"):
        run_here(monkeypatch, tmp_path, logs_folder="/dev/null/x")


@pytest.mark.parametrize("run_id", ["../x", "a/b", "-x", "\u00fcber", "a b"])
def test_a_run_id_that_is_no_plain_name_is_refused(tmp_path, run_id):
    with pytest.raises(UserError, match=r"RUN_ID=.*use letters, digits"):
        RunLog(tmp_path, run_id, ONE, 1, 100)


def test_the_log_holds_every_source_and_the_speedrun_lines(monkeypatch, tmp_path):
    run_here(monkeypatch, tmp_path, run_id="a")
    text = (tmp_path / "logs/a.txt").read_text()
    sources = read_sources([ROOT / "train_gpt.py"])
    assert "train_gpt.py" in sources and "plumbing/session.py" in sources
    for name, source in sources.items():
        assert f"{RULE}\nsource: {name}\n{RULE}\n{source.rstrip()}\n{RULE}\n" in text, name
    assert f"code_sha256: {sources_sha256(sources)}\n" in text
    lines = text.split(f"{RULE}\n")[-1]
    step = r"step:\d+/12 {}_loss:\d+\.\d{{4}} train_time:\d+ms( step_avg:\d+\.\d\d)?"
    assert len(re.findall(step.format("train"), lines)) == 12
    assert len(re.findall(step.format("val"), lines)) == 4
    assert "nan" not in lines


def test_status_holds_numbers_as_numbers(monkeypatch, tmp_path):
    run_here(monkeypatch, tmp_path, run_id="a")
    status = read_status(tmp_path / "logs/a/status.json")
    assert status["status"] == "finished" and status["step"] == status["num_iterations"] == 12
    assert isinstance(status["train_loss"], float) and isinstance(status["tokens_per_s"], float)
    assert json.loads((tmp_path / "logs/a/status.json").read_text()) == status


def test_a_full_disk_costs_lines_and_not_the_run(monkeypatch, tmp_path, capsys):
    """Log lines cannot be written from step 3 on; the run trains on, says so once, and finishes."""
    write = RunLog._write
    calls = []

    class Full:
        name = "a.txt"

        def write(self, text):
            raise OSError(28, "No space left on device")

    def sometimes(self, file, text):
        calls.append(text)
        write(self, Full() if "step:" in text and len(calls) > 20 else file, text)

    monkeypatch.setattr(RunLog, "_write", sometimes)
    assert run_here(monkeypatch, tmp_path, run_id="a")[0] == 0
    assert capsys.readouterr().err.count("training goes on without it; free space") == 1
    assert max(metrics(tmp_path, "a")) == 12


def test_names_that_an_ascii_locale_cannot_print_do_not_stop_a_run(monkeypatch, tmp_path):
    import subprocess

    from support import command, environment, flags

    write_data(tmp_path)
    environ = environment(LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    line = [*command(1), *flags(tmp_path, run_id="a", stage="\u00fcber")]
    done = subprocess.run(line, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_clock_leaves_out_pauses_and_the_first_ten_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(ONE)
    clock.start()
    for step in range(1, 31):
        now[0] += 100 if step <= 10 else 2
        clock.tick()
        if step % 5 == 0:
            clock.stop()
            now[0] += 1000
            clock.start()
    assert clock.step_avg_s == 2 and clock.train_s(30) == 40 and clock.train_s(5) == 0
    resumed = Clock(ONE)
    resumed.load_state_dict(clock.state_dict())
    resumed.start()
    for _ in range(20):
        now[0] += 2
        resumed.tick()
    assert resumed.step_avg_s == 2
    assert resumed.train_s(50) == 80, "as if the run had not been interrupted"
