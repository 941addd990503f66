"""Trackers: every trainer sends all its figures through the one adapter, and none can stop a run."""

import csv
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from tiny_runs import TINY, run_tiny

import plumbing.trackers


def service(kind: str = "good") -> tuple[ModuleType, list]:
    """A package as wandb and trackio are, and the list of what it is sent."""
    sent: list = []
    module = ModuleType(kind)

    def init(**options):
        if kind == "refuses":
            raise RuntimeError("no account")
        if kind == "leaves":
            sys.exit(3)
        if kind == "hangs":
            threading.Event().wait()
        sent.append(options)
        return module

    module.init, module.finish = init, lambda: sent.append("finished")
    module.log = lambda values, step: sent.append((step, values))
    return module, sent


@pytest.mark.parametrize("trainer", TINY)
@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_every_trainer_sends_what_its_metrics_file_has(trainer, kind, tmp_path, monkeypatch):
    module, sent = service()
    monkeypatch.setitem(sys.modules, kind, module)
    code, said = run_tiny(monkeypatch, trainer, tmp_path, tracker=kind)
    assert code == 0 and "tracker:" not in said, said
    assert sent[0]["name"] == "tiny" and sent[0]["config"]["lr"] == 0.01 and sent[-1] == "finished"
    rows = {}
    with open(tmp_path / "logs/tiny/metrics.csv") as file:
        for row in csv.DictReader(file):
            rows[int(row["step"])] = row
    found = {name: {step: v[name] for step, v in sent[1:-1] if name in v}
             for name in ("train_loss", "val_loss")}  # fmt: skip
    for name, values in found.items():
        expected = {step: float(row[name]) for step, row in rows.items() if row[name]}
        assert expected and values == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize("trainer", TINY)
@pytest.mark.parametrize("kind", ["refuses", "leaves", "hangs"])
def test_no_tracker_can_stop_a_run(trainer, kind, tmp_path, monkeypatch):
    module, _ = service(kind)
    monkeypatch.setitem(sys.modules, "wandb", module)
    if kind == "hangs":  # the others have said so by then, however busy the machine is
        monkeypatch.setattr(plumbing.trackers.Tracker.close, "__defaults__", (0.3,))
    code, said = run_tiny(monkeypatch, trainer, tmp_path, tracker="wandb")
    assert code == 0 and "finished: step:4/4" in said
    problem = "has not finished" if kind == "hangs" else "failed, nothing more is sent"
    assert f"tracker: wandb {problem}" in said


@pytest.mark.parametrize("trainer", TINY)
def test_tensorboard_reads_the_losses_from_the_runs_folder(trainer, tmp_path, monkeypatch):
    name = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(name, reason="pip install tensorboard")
    code, said = run_tiny(monkeypatch, trainer, tmp_path, tracker="tensorboard")
    assert code == 0 and "tracker:" not in said, said
    events = accumulator.EventAccumulator(str(tmp_path / "logs/tiny/tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("val_loss")}
    with open(Path(tmp_path) / "logs/tiny/metrics.csv") as file:
        rows = {int(r["step"]): float(r["val_loss"]) for r in csv.DictReader(file) if r["val_loss"]}
    assert losses and losses == pytest.approx(rows, abs=1e-5)


def test_a_package_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    code, said = run_tiny(monkeypatch, "train_gpt", tmp_path, tracker="trackio")
    assert code == 0
    lines = [line for line in said.splitlines() if line.startswith("tracker:")]
    assert len(lines) == 1 and lines[0].endswith("pip install trackio")
