"""forked.py -- programs that are started in processes forked from one which has torch imported.

To import torch and its compiler takes four seconds of a core, and the tests start a hundred
programs. multiprocessing's fork server imports them once, and a start takes a tenth of a second.
What differs from a start by a shell: the libraries are there, no torchrun stands above the ranks,
and output goes to a file, not to a pipe. Tests of these things start processes of their own.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd
from pathlib import Path

from tqdm.std import TqdmDefaultWriteLock

LIBRARIES = "torch torch._dynamo torch.distributed numpy yaml filelock"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(LIBRARIES.split())
LONGEST_S = 280  # below pytest's own limit; what takes longer hangs, and is no slow machine


class Program:
    """`python WORDS...` in the folder `cwd`, with these environment variables and no others."""

    def __init__(self, words: list[str], cwd: Path, env: dict[str, str]):
        self.words = [str(word) for word in words]
        self.files = [tempfile.TemporaryFile() for _ in ("stdout", "stderr")]
        outputs = [DupFd(file.fileno()) for file in self.files]
        # A daemon: it does not outlive a test that fails.
        self.process = FORKS.Process(
            target=_become, args=(self.words, str(cwd), env, outputs), daemon=True
        )
        self.process.start()
        self.pid = self.process.pid

    @property
    def stdout(self) -> str:
        return self._text(0)

    @property
    def stderr(self) -> str:
        return self._text(1)

    def _text(self, number: int) -> str:
        # The offset of the file is the program's, so nothing is sought here.
        descriptor = self.files[number].fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def wait_for(self, line: str) -> None:
        """Until it has printed a line that starts with `line`."""
        end = time.monotonic() + LONGEST_S
        while f"\n{line}" not in f"\n{self.stdout}":
            assert self.process.is_alive(), f"it ended before: {self.stdout}\n{self.stderr}"
            assert time.monotonic() < end, f"not within {LONGEST_S} s: {self.stdout}"
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; a negative one is the signal that ended it."""
        self.process.join(LONGEST_S)
        assert self.process.exitcode is not None, f"not over within {LONGEST_S} s: {self.stdout}"
        return self.process.exitcode


def run(
    words: list[str], cwd: Path, env: dict[str, str], ranks: int = 1
) -> subprocess.CompletedProcess:
    """Run a program to its end, as several ranks where it is asked for. When a rank ends badly the
    others are asked to stop, as torchrun does it, and its exit code is that of the run.
    """
    group = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
    group["MASTER_PORT"] = _free_port()
    programs = []
    for rank in range(ranks):
        own = group | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
        programs.append(Program(words, cwd, env | {name: str(own[name]) for name in own}))
    code = 0
    running = {program.process.sentinel: program for program in programs}
    end = time.monotonic() + LONGEST_S
    while running:
        for sentinel in wait(list(running), timeout=max(0, end - time.monotonic())):
            found = running.pop(sentinel).wait()
            if found != 0 and code == 0:
                code = found
                end = min(end, time.monotonic() + 30)
                _signal(running.values(), signal.SIGTERM)
        if time.monotonic() > end:
            _signal(running.values(), signal.SIGKILL)
            assert code != 0, f"it did not end: {programs[0].stdout}\n{programs[0].stderr}"
    stdout = "".join(program.stdout for program in programs)
    stderr = "".join(program.stderr for program in programs)
    return subprocess.CompletedProcess(words, code, stdout, stderr)


def _signal(programs: Iterable[Program], number: int) -> None:
    for program in programs:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            program.send_signal(number)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _become(words: list[str], cwd: str, env: dict[str, str], outputs: list[DupFd]) -> None:
    """In the forked process: run the program and end with its exit code."""
    os.setsid()  # whoever presses Ctrl-C while tests run means pytest, which then ends this too
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.detach(), number)
    # A rank of several ends without cleaning up, and would leave this lock between processes behind.
    TqdmDefaultWriteLock.mp_lock = None
    tempfile.tempdir = None  # that of the new environment
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = words
    sys.orig_argv = [sys.executable, *words]
    sys.path[0] = str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")
