"""starts.py -- two ways to start a trainer with a fault, alone or as several ranks.

by_fork: each rank is forked from this process, in which the trainers are imported already, so that
a start costs a tenth of a second and not three. by_torchrun: processes of their own, as a user
starts them. Both return the exit code, and output and errors are appended to a file.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from faults import inject

TIMEOUT_S = 120
HANGS = 1000  # the exit code of a run that did not end


def by_torchrun(
    trainer: str,
    ranks: int,
    flags: list[str],
    fault: str,
    output: Path,
    kill_after_s: float = TIMEOUT_S,
) -> int:
    """Start `python`, or torchrun for several ranks; all are killed after `kill_after_s`."""
    command = [sys.executable, inject.__file__, trainer, *flags]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command[1:1] = launcher
    environ = os.environ | {"FAULT": fault, "OMP_NUM_THREADS": "1"}
    with open(output, "ab") as file:
        process = subprocess.Popen(
            command, env=environ, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(timeout=kill_after_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return HANGS if kill_after_s == TIMEOUT_S else -signal.SIGKILL


# same arguments as by_torchrun
def by_fork(
    trainer: str,
    ranks: int,
    flags: list[str],
    fault: str,
    output: Path,
    kill_after_s: float = TIMEOUT_S,
) -> int:
    """Fork the ranks. When one ends badly the others are asked to stop, as torchrun does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    running = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _be_rank(trainer, rank, ranks, port, flags, fault, output)
        running.add(child)
    first_bad = 0
    end = time.monotonic() + kill_after_s
    while running:
        for child in list(running):
            found, status = os.waitpid(child, os.WNOHANG)
            if found == 0:
                continue
            running.remove(child)
            code = os.waitstatus_to_exitcode(status)
            if code != 0 and first_bad == 0:
                first_bad = code
                end = min(end, time.monotonic() + 10)
                _signal(running, signal.SIGTERM)
        if time.monotonic() > end:
            _signal(running, signal.SIGKILL)
            if first_bad == 0 and kill_after_s == TIMEOUT_S:
                first_bad = HANGS
        time.sleep(0.005)
    return first_bad


def _signal(children: set[int], number: int) -> None:
    for child in children:
        os.kill(child, number)


def _be_rank(
    trainer: str, rank: int, ranks: int, port: int, flags: list[str], fault: str, output: Path
) -> NoReturn:
    """What a forked process does: it is the rank of a run, and ends with it."""
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if ranks > 1:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in group.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        sys.argv = [f"{trainer}.py", *flags]
        inject.run(trainer, fault)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
