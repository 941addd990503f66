"""Runs that are killed, stopped, broken and resumed, alone, as ranks and under torchrun. What must
hold: nothing that was reported is lost, a resumed run ends as the undisturbed one does, all ranks
leave together, and the row is written.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from support import (
    ROOT,
    command,
    environment,
    flags,
    losses,
    newest_state,
    rows,
    run,
    run_here,
    same_tensors,
)

FAULTY = "scripts/faults/inject.py"


def status(folder: Path, run_id: str) -> str:
    return json.loads((folder / "logs" / run_id / "status.json").read_text())["status"]


def broken(folder: Path, nproc: int, fault: str, **knobs) -> subprocess.CompletedProcess:
    words = [str(ROOT / FAULTY), "train_gpt", *flags(folder, **knobs)]
    return forked.run(words, folder, environment(FAULT=fault), nproc)


def same_end(folder: Path, a: str, b: str) -> bool:
    """Whether two runs ended in bitwise the same model, moments and losses."""
    x, y = newest_state(folder, a), newest_state(folder, b)
    parts = ("model", "adam", "muon", "state", "step", "tokens")
    same_state = all(same_tensors(x[part], y[part]) for part in parts)
    kept = ("train_loss", "val_loss", "best_loss", "bad_evals", "validated_at")
    same_progress = all(x["progress"][name] == y["progress"][name] for name in kept)
    return same_state and same_progress and losses(folder, a) == losses(folder, b)


def rms(folder: Path, a: str, b: str) -> float:
    x, y = (np.array([float(t or v) for t, v in losses(folder, r)]) for r in (a, b))
    return float(np.sqrt(np.mean((x - y) ** 2)))


def test_a_run_killed_twice_and_resumed_ends_bitwise_as_the_straight_one(monkeypatch, tmp_path):
    run_here(monkeypatch, tmp_path, run_id="straight", attngate="headwise", early_stop_patience=9)
    for fault in ("kill:7", "kill:11"):
        done = broken(
            tmp_path, 1, fault, run_id="killed", attngate="headwise", early_stop_patience=9
        )
        assert done.returncode == -signal.SIGKILL
        assert status(tmp_path, "killed") == "running", "a killed process could not say more"
    done = run(1, tmp_path, run_id="killed", attngate="headwise", early_stop_patience=9)
    assert done.returncode == 0 and "resumed step:8 from a checkpoint" in done.stdout, done.stderr
    assert same_end(tmp_path, "straight", "killed")
    assert [r["status"] for r in rows(tmp_path)] == ["finished", "finished"]


def test_a_run_stopped_in_a_later_epoch_resumes_where_it_was(monkeypatch, tmp_path):
    knobs = dict(num_iterations=50, epochs_ok=1, data_seed=3, val_every=10, save_every=0)
    run_here(monkeypatch, tmp_path, run_id="straight", **knobs)
    assert (
        broken(tmp_path, 1, "term:41", run_id="stopped", **knobs).returncode == 128 + signal.SIGTERM
    )
    assert run_here(monkeypatch, tmp_path, run_id="stopped", **knobs)[0] == 0
    assert same_end(tmp_path, "straight", "stopped")
    assert newest_state(tmp_path, "stopped")["clock"]["timed_steps"] >= 31, (
        "the time of the first start still counts"
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """The folder of a run `two` that two ranks trained undisturbed."""
    folder = tmp_path_factory.mktemp("two")
    done = run(2, folder, run_id="two", device_batch_size=8, attngate="elementwise")
    assert done.returncode == 0, done.stderr
    return folder


def test_one_and_two_ranks_agree_within_rounding_and_each_resumes_the_other(
    monkeypatch, tmp_path, two_ranks
):
    """The head's gradient is summed chunk by chunk, so two micro-batches of one rank round
    otherwise than one of each of two; losses before the first update are bitwise the same.
    """
    shape = dict(batch_size=16, attngate="elementwise")
    run_here(monkeypatch, tmp_path, run_id="one", device_batch_size=8, **shape)
    shutil.copytree(two_ranks / "logs/two", tmp_path / "logs/two")
    assert (
        losses(tmp_path, "one")[:2] == losses(tmp_path, "two")[:2]
        and rms(tmp_path, "one", "two") <= 1e-3
    )

    assert broken(tmp_path, 1, "int:6", run_id="1to2", **shape).returncode == 128 + signal.SIGINT
    done = run(2, tmp_path, run_id="1to2", **shape)
    assert (
        done.returncode == 0
        and "resumed step:7 from a checkpoint written by 1 rank(s)" in done.stdout
    ), done.stderr
    assert rms(tmp_path, "one", "1to2") <= 1e-3

    stopped = broken(tmp_path, 2, "term:6:1", run_id="2to1", **shape)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert status(tmp_path, "2to1") == "preempted", "rank 1 alone was told, and both left together"
    _, out = run_here(monkeypatch, tmp_path, run_id="2to1", **shape)
    assert "written by 2 rank(s)" in out and rms(tmp_path, "one", "2to1") <= 1e-3


def test_torchrun_restarts_a_run_that_broke_and_it_ends_bitwise_as_the_undisturbed_one(
    tmp_path, two_ranks
):
    words = [*command(2, FAULTY, "--max-restarts=1"), "train_gpt"]
    words += flags(tmp_path, device_batch_size=8, attngate="elementwise")
    env = environment(FAULT="raise:10:1")
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    made = rows(tmp_path)
    assert made[-1]["status"] == "finished" and len({r["run_id"] for r in made}) == 1, (
        "one id for the whole launch"
    )
    assert "resumed step:8" in done.stdout
    shutil.copytree(two_ranks / "logs/two", tmp_path / "logs/two")
    assert same_end(tmp_path, "two", made[0]["run_id"])


# A run that would go on for long.
LONG = dict(
    run_id="a", num_iterations=10**6, epochs_ok=1, warmdown_iters=0, val_every=0, save_every=0
)


def started(folder: Path, line: str, **knobs) -> forked.Program:
    """A long run, once it has printed a line that starts with `line`."""
    words = [str(ROOT / "train_gpt.py"), *flags(folder, **(LONG | knobs))]
    program = forked.Program(words, folder, environment())
    program.wait_for(line)
    return program


def test_sigterm_to_torchrun_leaves_a_run_that_can_be_resumed(tmp_path):
    p = subprocess.Popen(
        [*command(2), *flags(tmp_path, **LONG)],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any(text.startswith("step:20/") for text in p.stdout), "it ended before"
    p.send_signal(signal.SIGTERM)
    p.stdout.read()
    assert p.wait(timeout=60) != 0
    row = rows(tmp_path)[-1]
    assert status(tmp_path, "a") == "preempted" == row["status"] and int(row["steps_done"]) >= 20
    assert newest_state(tmp_path, "a")["step"] == int(row["steps_done"])
    assert not [p for p in Path("/proc").glob("[0-9]*/environ") if _is_ours(p, tmp_path)], (
        "no worker is left behind"
    )


def _is_ours(environ: Path, folder: Path) -> bool:
    try:
        return f"PWD={folder}".encode() in environ.read_bytes().split(
            b"\0"
        ) and environ.parent.name != str(os.getpid())
    except OSError:
        return False


def test_a_loss_that_is_not_finite_stops_all_ranks_names_the_culprit_and_writes_the_row(tmp_path):
    done = broken(tmp_path, 2, "nan:7:1", run_id="a", attngate="headwise")
    assert done.returncode == 1
    assert (
        "step:7 not finite: loss nan on rank 1, first bad gradient wte; its update was not applied"
        in done.stdout
    )
    row = rows(tmp_path)[-1]
    assert row["status"] == status(tmp_path, "a") == "nan" and row["final_val_loss"] != "nan"
    assert newest_state(tmp_path, "a")["step"] == 4, "no checkpoint of broken weights"


def test_a_rate_that_blows_up_is_caught_at_the_step_it_happens(monkeypatch, tmp_path):
    code, out = run_here(monkeypatch, tmp_path, run_id="a", lr=1e30, warmup_iters=0)
    assert code == 1 and "not finite: loss" in out and rows(tmp_path)[0]["status"] == "nan"


def test_early_stop_ends_two_ranks_together_with_a_checkpoint_and_a_row(tmp_path):
    knobs = dict(early_stop_patience=2, early_stop_min_delta=100, val_every=2, num_iterations=30)
    done = run(2, tmp_path, run_id="a", **knobs)
    assert done.returncode == 0, done.stderr
    row = rows(tmp_path)[0]
    assert (row["status"], row["steps_done"], row["num_iterations"]) == ("early_stop", "4", "30")
    assert newest_state(tmp_path, "a")["step"] == 4 and float(row["final_val_loss"]) > 0


def test_an_error_in_the_loop_writes_the_row_and_keeps_its_traceback(tmp_path):
    done = broken(tmp_path, 1, "raise:6", run_id="a")
    assert done.returncode == 1 and "RuntimeError: injected at step 6" in done.stderr
    assert (
        status(tmp_path, "a") == rows(tmp_path)[0]["status"] == "failed"
        and rows(tmp_path)[0]["steps_done"] == "5"
    )


def test_a_rank_that_fails_alone_keeps_its_traceback_and_writes_the_row(tmp_path):
    """The other rank waits in another collective, so the failing one must not wait for it."""
    done = broken(tmp_path, 2, "raise:6", run_id="a")
    assert done.returncode == 1 and "RuntimeError: injected at step 6" in done.stderr
    assert status(tmp_path, "a") == rows(tmp_path)[0]["status"] == "failed"


def test_ctrl_c_that_torchrun_forwards_again_still_saves(tmp_path):
    p = started(tmp_path, "step:2/", data_order="stream", sequence_length=256, n_embd=256)
    p.send_signal(signal.SIGINT)
    time.sleep(0.1)
    # torchrun forwards the first one again at once: this is not yet a second one
    p.send_signal(signal.SIGINT)
    assert p.wait() == 128 + signal.SIGINT and status(tmp_path, "a") == "preempted"


def test_two_torchrun_agents_on_loopback_train_bitwise_as_two_ranks_of_one(tmp_path, two_ranks):
    shape = dict(device_batch_size=8, attngate="elementwise")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    agent = [
        "--nnodes=2",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=job",
    ]
    line = [c for c in command(2) if c not in ("--standalone", "--nproc_per_node=2")]
    line[3:3] = [*agent, "--nproc_per_node=1"]
    both = [
        subprocess.Popen(
            [*line, *flags(tmp_path, run_id="nodes", **shape)], cwd=tmp_path, env=environment()
        )
        for _ in range(2)
    ]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    shutil.copytree(two_ranks / "logs/two", tmp_path / "logs/two")
    assert same_end(tmp_path, "two", "nodes")


def test_a_schedulers_warning_signal_saves_and_leaves(tmp_path):
    p = started(tmp_path, "step:20/")
    p.send_signal(signal.SIGUSR1)
    assert p.wait() == 128 + signal.SIGUSR1 and status(tmp_path, "a") == "preempted"
