"""docs/new_trainer.md: the trainer on that page trains, stops, resumes and is a trainer of this
house.
"""

import json
import re
import subprocess
from pathlib import Path

import forked
import pytest
from support import ROOT, environment, losses, metrics, rows

CODE = re.search(r"^```python\n(.*?)^```", (ROOT / "docs/new_trainer.md").read_text(), re.M | re.S)[
    1
]
SMALL = dict(num_iterations=12, val_every=6, save_every=6, val_tokens=1024, batch_size=8)
# It sends itself the signal that a scheduler would, between steps 7 and 8.
STOP = """
import os, signal
start = Session.start_clock
def start_and_signal(session):
    start(session)
    if session.step_now == 7 and "STOP" in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)
Session.start_clock = start_and_signal
"""


@pytest.fixture
def trainer(tmp_path) -> Path:
    path = tmp_path / "train_mix.py"
    path.write_text(CODE)
    return path


def run(trainer: Path, nproc: int = 1, stop: bool = False, **knobs) -> subprocess.CompletedProcess:
    folder = trainer.parent
    values = SMALL | dict(logs_folder=folder / "logs", results_file=folder / "results.csv") | knobs
    words = [str(trainer), *(f"--{name}={value}" for name, value in values.items())]
    env = environment(**({"STOP": "1"} if stop else {}))
    return forked.run(words, folder, env, nproc)


def test_it_is_about_150_lines_in_the_shape_of_the_house():
    assert sum(1 for line in CODE.splitlines() if line.strip()) <= 155
    assert all(len(line) <= 100 for line in CODE.splitlines())
    halves = re.findall(r"# -------- (\w+ \w+):.* --------", CODE)
    assert halves == ["clock stopped", "clock running"]


def test_it_learns_and_leaves_a_row_and_a_status(trainer):
    done = run(trainer, run_id="a", num_iterations=60)
    assert done.returncode == 0, done.stderr
    (row,) = rows(trainer.parent)
    assert float(row["final_val_loss"]) < 4.0 and row["hidden"] == "128"
    assert row["learning_rate"] == "0.003"
    status = json.loads((trainer.parent / "logs/a/status.json").read_text())
    assert status["status"] == "finished" and status["step"] == 60


def test_stopped_and_resumed_it_ends_bitwise_where_it_would_have(trainer):
    assert run(trainer, run_id="whole").returncode == 0
    trainer.write_text(CODE.replace("\n# ---------------- Knobs", STOP + "\n# ---- Knobs"))
    stopped = run(trainer, stop=True, run_id="parts")
    assert stopped.returncode == 128 + 15, stopped.stderr
    assert max(metrics(trainer.parent, "parts")) < 12
    resumed = run(trainer, run_id="parts")
    assert resumed.returncode == 0 and "resumed step:" in resumed.stdout
    assert losses(trainer.parent, "whole") == losses(trainer.parent, "parts")


def test_two_processes_train_as_one_does(trainer):
    for nproc in (1, 2):
        done = run(trainer, nproc, run_id=f"n{nproc}", device_batch_size=2)
        assert done.returncode == 0, done.stderr
    one, two = (losses(trainer.parent, f"n{nproc}")[-1][0] for nproc in (1, 2))
    assert float(one) == pytest.approx(float(two), abs=1e-4)


def test_its_dry_run_and_its_help_and_its_refusals_are_those_of_the_house(trainer):
    plan = run(trainer, dry_run=1)
    assert plan.returncode == 0 and "parameters:" in plan.stdout and "data:" in plan.stdout
    refused = run(trainer, dry_run=1, val_tokens=10**9)
    assert refused.returncode == 2 and "VAL_TOKENS" in refused.stdout
    typo = run(trainer, hiden=3)
    assert typo.returncode == 2 and "did you mean --hidden?" in typo.stderr
