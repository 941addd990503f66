"""Threads of a CPU run: as many as help now, said in the log, and the same after a resume."""

import forked
import pytest
import torch
from support import ROOT, environment, flags, newest_state

from plumbing import device


@pytest.fixture
def machine(monkeypatch):
    """Eight cores, on which n threads take table[n] for a step; the calls that set a number."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda pid: set(range(8)))
    chosen = []
    monkeypatch.setattr(device.torch, "set_num_threads", chosen.append)

    def with_times(**table: float) -> list[int]:
        monkeypatch.setattr(device, "_step_s", lambda threads: table[f"n{threads}"])
        return chosen

    return with_times


def test_more_threads_are_taken_as_long_as_they_help(machine):
    chosen = machine(n1=1.0, n2=0.6, n4=0.4, n8=0.39)
    words = device.choose_threads()
    assert chosen == [4] and words.startswith("4, 8 take 0.97 times as long")
    assert machine(n1=1.0, n2=0.6, n4=0.4, n8=0.3) is chosen
    assert device.choose_threads().startswith("8, measured at the start")


def test_on_a_busy_machine_one_thread_is_taken(machine):
    chosen = machine(n1=1.0, n2=16.0)
    assert device.choose_threads().startswith("1, 2 take 16.00 times as long") and chosen == [1]


def test_processes_share_the_cores(machine, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    chosen = machine(n1=1.0)
    assert device.choose_threads().startswith("1, one core each") and chosen == [1]


def test_the_users_own_number_is_kept(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    chosen = machine()
    assert "set by OMP_NUM_THREADS" in device.choose_threads()
    device.keep_threads(5)
    assert chosen == []


def test_the_log_says_how_many_and_a_resume_takes_the_checkpoints_number(tmp_path):
    env = environment()
    del env["OMP_NUM_THREADS"]
    done = forked.run([str(ROOT / "train_gpt.py"), *flags(tmp_path, run_id="a")], tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert f"threads: {newest_state(tmp_path, 'a')['threads']}, " in done.stdout


def test_a_resume_goes_on_with_the_threads_of_the_checkpoint(machine):
    chosen = machine()
    device.keep_threads(2)
    device.keep_threads(None)  # a checkpoint from before they were saved
    assert chosen == [2] and torch.get_num_threads() >= 1
