"""Runs that start from another run's checkpoint and go on with other knobs."""

import json
import re
import subprocess
from pathlib import Path

import forked
import pytest
from faults import small_runs
from support import (
    ONE,
    ROOT,
    environment,
    losses,
    metrics,
    newest_state,
    rows,
    run_here,
    same_tensors,
    write_data,
)  # fmt: skip

from plumbing import UserError
from plumbing.clock import Clock


@pytest.fixture
def trunk(monkeypatch, tmp_path) -> Path:
    """The checkpoint of a run that was stopped after half of its steps."""
    knobs = write_data(tmp_path)
    assert run_here(monkeypatch, tmp_path, **knobs, run_id="trunk", stop_after=6)[0] == 0
    return tmp_path / "logs/trunk/step_000006"


def fork(monkeypatch, folder: Path, trunk: Path, run_id: str, **knobs) -> tuple[int, str]:
    names = {"input_bin": f"{folder}/t_*.bin", "input_val_bin": f"{folder}/v_*.bin"}
    return run_here(monkeypatch, folder, **names, run_id=run_id, fork_from=trunk, **knobs)


def test_a_fork_with_the_same_knobs_ends_bitwise_as_the_whole_run(monkeypatch, tmp_path, trunk):
    assert run_here(monkeypatch, tmp_path, **write_data(tmp_path), run_id="whole")[0] == 0
    code, text = fork(monkeypatch, tmp_path, trunk, "same")
    assert code == 0 and "forked step:6 from trunk/step_000006" in text
    whole, same = newest_state(tmp_path, "whole"), newest_state(tmp_path, "same")
    assert same_tensors(whole["model"], same["model"])
    assert same_tensors(whole["adam"], same["adam"]) and same_tensors(whole["muon"], same["muon"])
    assert losses(tmp_path, "same")[-6:] == losses(tmp_path, "whole")[-6:]


def test_the_row_and_the_status_say_where_a_run_was_forked(monkeypatch, tmp_path, trunk):
    for run_id, lr in (("a", 0.01), ("b", 0.02)):
        assert fork(monkeypatch, tmp_path, trunk, run_id, lr=lr)[0] == 0
    stopped, *forks = rows(tmp_path)
    assert stopped["status"] == "stopped" and "FORK" not in stopped["notes"]
    words = [set(row["notes"].split()) for row in forks]
    shared = words[0] & words[1]
    assert "fork_run=trunk/step_000006" in shared
    assert any(word.startswith("FORK=step6-") for word in shared), "one key for all arms"
    status = json.loads((tmp_path / "logs/b/status.json").read_text())
    assert status["forked_from"] == "trunk/step_000006"


def test_rates_and_hyperparameters_are_those_of_the_fork(monkeypatch, tmp_path, trunk):
    assert fork(monkeypatch, tmp_path, trunk, "a", lr=0.02, warmdown_iters=6)[0] == 0
    steps = metrics(tmp_path, "a")
    assert list(steps) == list(range(7, 13)) and float(steps[7]["lr"]) == 0.02


def test_tokens_go_on_from_the_checkpoints_with_another_batch(monkeypatch, tmp_path, trunk):
    assert fork(monkeypatch, tmp_path, trunk, "a", batch_size=32)[0] == 0
    assert rows(tmp_path)[-1]["tokens_seen"] == str(6 * 16 * 16 + 6 * 32 * 16)


def test_what_does_not_fit_starts_anew_and_is_named(monkeypatch, tmp_path):
    gate = {"attngate": "elementwise", **write_data(tmp_path)}
    assert run_here(monkeypatch, tmp_path, **gate, run_id="trunk", stop_after=6)[0] == 0
    folder = tmp_path / "logs/trunk/step_000006"
    knobs = {"attngate": "elementwise", "gateopt": "adam"}
    code, text = fork(monkeypatch, tmp_path, folder, "a", **knobs)
    assert code == 0 and "start anew, as the checkpoint has none that fit: adam" in text


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"attngate": "headwise"}, "parameter blocks.0.attn.gate is (2, 32) here and nothing"),
        ({"n_embd": 64}, "other parameters"),
        ({"num_iterations": 6}, "only 6 steps"),
    ],
)
def test_a_fork_that_cannot_be_is_refused(monkeypatch, tmp_path, trunk, knobs, words):
    with pytest.raises(UserError, match=re.escape(words)):
        fork(monkeypatch, tmp_path, trunk, "a", **knobs)


def test_a_damaged_checkpoint_is_no_start(monkeypatch, tmp_path, trunk):
    state = trunk / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be used: state"):
        fork(monkeypatch, tmp_path, trunk, "a")


def test_a_fork_resumes_from_its_own_checkpoint_and_from_no_other(monkeypatch, tmp_path, trunk):
    assert fork(monkeypatch, tmp_path, trunk, "whole", lr=0.02)[0] == 0
    assert fork(monkeypatch, tmp_path, trunk, "a", lr=0.02, stop_after=10)[0] == 0
    with pytest.raises(UserError, match="started with FORK_FROM=trunk/step_000006, not nothing"):
        run_here(monkeypatch, tmp_path, **write_data(tmp_path), run_id="a", lr=0.02)
    code, text = fork(monkeypatch, tmp_path, trunk, "a", lr=0.02)
    assert code == 0 and "resumed step:10" in text
    assert same_tensors(newest_state(tmp_path, "a")["model"],
                        newest_state(tmp_path, "whole")["model"])  # fmt: skip
    whole, row = rows(tmp_path)[1], rows(tmp_path)[-1]
    assert "fork_run=trunk/step_000006" in row["notes"]
    assert row["tokens_seen"] == whole["tokens_seen"]


def test_a_fork_counts_the_time_of_its_trunk_and_the_speed_of_its_own_steps():
    clock = Clock(ONE)
    clock.load_state_dict({"timed_s": 10.0, "timed_steps": 10})
    clock.start_over(20)
    assert clock.train_s(20) == 10.0, "ten steps of a second, behind the ten that do not count"
    clock.timed_s, clock.timed_steps = 30.0, 10
    assert clock.step_avg_s == 3.0 and clock.train_s(30) == 10.0 + 30.0


# ----------------------------------------------------------------------------
# All trainers


def train(trainer: str, folder: Path, *changes: str) -> subprocess.CompletedProcess:
    """A small run in a process of its own; of two words for one knob the later one counts."""
    words = [*small_runs.flags(trainer, folder / "data", folder), *changes]
    last = {word.split("=")[0]: word for word in words}
    return forked.run([str(ROOT / f"{trainer}.py"), *last.values()], folder, environment())


@pytest.mark.parametrize("trainer", small_runs.TRAINERS)
def test_every_trainer_forks_to_the_same_end_and_to_another_with_another_rate(trainer, tmp_path):
    (tmp_path / "data").mkdir()
    small_runs.write_data(tmp_path / "data")
    start = f"--fork_from={tmp_path}/logs/trunk/step_000004"
    for run_id, *changes in (
        ("whole",),
        ("trunk", "--stop_after=4"),
        ("same", start),
        ("other", start, "--lr=0.02"),
    ):
        done = train(trainer, tmp_path, f"--run_id={run_id}", *changes)
        assert done.returncode == 0, done.stdout + done.stderr
    models = [newest_state(tmp_path, run_id)["model"] for run_id in ("whole", "same", "other")]
    assert same_tensors(models[0], models[1]) and not same_tensors(models[0], models[2])
    found = {row["run_id"]: row for row in rows(tmp_path)}
    assert found["trunk"]["status"] == "stopped" and found["other"]["status"] == "finished"
    assert "fork_run=trunk/step_000004" in found["other"]["notes"]
