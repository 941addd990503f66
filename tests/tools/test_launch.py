"""launch.sh: "started" is said of a run that trains, and of nothing that its checks refuse."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from support import ROOT, command, environment, flags


def launch(folder: Path, *words: str, wait_s: int = 200) -> subprocess.CompletedProcess:
    env = environment(LOGS_FOLDER=str(folder / "logs"), LAUNCH_WAIT_S=str(wait_s))
    return subprocess.run(
        [str(ROOT / "scripts/launch.sh"), *words],
        env=env, cwd=folder, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def test_a_run_that_is_past_its_checks_is_called_started_at_once(tmp_path):
    words = [*command(1), *flags(tmp_path, num_iterations=10**6, epochs_ok=1)]
    done = launch(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    pid = int(re.match(r"started, pid (\d+), past its checks\n", done.stdout)[1])
    os.killpg(pid, 15)


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        (dict(input_bin="/nowhere/*.bin"), "no token shards match /nowhere"),
        (dict(n_head=3), "N_EMBD=32 must be N_HEAD=3 times an even head width"),
    ],
)
def test_a_run_that_its_checks_refuse_is_not_called_started(tmp_path, knobs, problem):
    done = launch(
        tmp_path, *command(1), *flags(tmp_path), *(f"--{k}={v}" for k, v in knobs.items())
    )
    assert done.returncode == 2
    assert "started" not in done.stdout and problem in done.stdout


def test_another_command_is_called_started_when_it_outlives_the_wait(tmp_path):
    done = launch(tmp_path, "sleep", "600", wait_s=1)
    pid = int(re.match(r"started, pid (\d+), alive, but has not said", done.stdout)[1])
    os.killpg(pid, 15)
    ended = launch(tmp_path, "sh", "-c", "sleep 0.7; echo last words; exit 7")
    assert ended.returncode == 7 and "last words" in ended.stdout
