"""Processes, signals and devices."""

import os
import signal
import subprocess
import sys
import time

import forked
import pytest
import torch
from support import ROOT, environment, flags, run_here, write_data

from plumbing import UserError, World
from plumbing.device import check_compiler, choose_precision

TRAINERS = ("train_gpt", "train_scaled", "train_gpu", "train_arith")
CPU = torch.device("cpu")


@pytest.mark.parametrize("size", range(1, 9))
def test_shares_are_even_in_order_and_together_everything(size):
    for n in (0, 1, 7, 32, 512):
        shares = [World(rank, size, CPU).share(n) for rank in range(size)]
        rows = [row for share in shares for row in range(share.start, share.stop)]
        lengths = [share.stop - share.start for share in shares]
        assert rows == list(range(n)) and max(lengths) - min(lengths) <= 1


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path):
    env = environment(ATTNGATE="headwize")
    done = forked.run([str(ROOT / "train_gpt.py")], tmp_path, env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train_gpt.py: error: ATTNGATE='headwize'")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_traceback(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(ROOT / "train_gpt.py"), "--preset=demo", "--dry_run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_trainers_starts_nothing(tmp_path):
    code = "import os, torch.distributed as d\n"
    for trainer in TRAINERS:
        code += f"import {trainer}\nassert not d.is_initialized(), {trainer!r}\n"
    code += "print(os.listdir('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(ATTNGATE="bogus"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "[]\n", done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_way_out_is_named(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="sees no CUDA GPU; set DEVICE=cpu; PRESET=demo"):
        run_here(monkeypatch, tmp_path, device="cuda")


def test_a_compiler_that_is_not_there_is_named_before_training(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(UserError, match=r"/nonexistent/g\+\+ is not here; install one, set CXX"):
        check_compiler(True, "cpu")
    check_compiler(False, "cpu")


def test_a_precision_that_a_device_does_not_have_is_refused(monkeypatch):
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", CPU)
    assert choose_precision("auto", CPU) == "fp32" and choose_precision("bf16", CPU) == "bf16"
    gpu = torch.device("cuda")
    for capability, auto in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert choose_precision("auto", gpu) == auto
    with pytest.raises(UserError, match=r"compute capability 7.5 and would emulate it"):
        choose_precision("bf16", gpu)


LONG = dict(run_id="a", num_iterations=10**6, epochs_ok=1, warmdown_iters=0, val_every=0)


def long_run(folder, *before: str) -> subprocess.Popen:
    """A run that would go on for long, once it has trained some steps."""
    write_data(folder)
    process = subprocess.Popen(
        [*before, *flags(folder, **LONG, save_every=0)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any(text.startswith("step:5/") for text in process.stdout), "it ended before"
    return process


def test_a_terminal_that_is_closed_leaves_a_saved_run(tmp_path):
    words = [str(ROOT / "train_gpt.py"), *flags(tmp_path, **LONG, save_every=0)]
    program = forked.Program(words, tmp_path, environment())
    program.wait_for("step:5/")
    program.send_signal(signal.SIGHUP)
    assert program.wait() == 128 + signal.SIGHUP
    assert "preempted" in (tmp_path / "logs/a/status.json").read_text()


def test_nohup_keeps_a_run_alive_when_the_terminal_is_closed(tmp_path):
    process = long_run(tmp_path, "nohup", sys.executable, str(ROOT / "train_gpt.py"))
    process.send_signal(signal.SIGHUP)
    assert any(text.startswith("step:50/") for text in process.stdout), "it trains on"
    process.terminate()
    process.stdout.read()
    assert process.wait(timeout=200) == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's PR_SET_PDEATHSIG")
def test_workers_end_when_their_launcher_was_killed(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node=2", str(ROOT / "train_gpt.py")]
    agent = long_run(tmp_path, *torchrun)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True)
    workers = [int(pid) for pid in children.stdout.split()]
    assert len(workers) == 2
    agent.kill()
    deadline = time.monotonic() + 200
    while workers and time.monotonic() < deadline:
        workers = [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
        time.sleep(0.2)
    assert not workers, "workers train on unseen"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_that_a_cpu_step_frees_is_kept_for_the_next():
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, plumbing\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(2**25)\n"  # 128 MiB, 32,768 pages
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first = faults(), faults()\n"
        "with plumbing.join_world('cpu'):\n"
        "    print(*first, *[faults() for _ in range(40)])\n"
    )
    line = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=True)
    usual, again, *inside = map(int, done.stdout.split())
    if min(usual, again) < 10_000:
        pytest.skip("this system does not give freed memory back in the first place")
    assert max(inside[-10:]) < 1000, "the heap settles; then nothing is cleared again"
