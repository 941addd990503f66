"""Timing two sides by turns, and what a benchmark leaves behind.

Times are the process's CPU time on a CPU, which on a shared machine says what was done and not who
else was there, and the time between two CUDA events on a GPU. Each part of a benchmark is a JSON
file as soon as it is done, with what is needed to trust it; a benchmark stops at once when told to.
Needs torch.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from lib.program import ROOT
from plumbing.checkpoints import write_whole
from plumbing.world import World


@dataclass(frozen=True)
class Meter:
    """Measures `steps` turns of each side, after `warmup` turns that do not count."""

    world: World
    steps: int
    warmup: int

    def time_ms(self, work: Callable[[], object]) -> float:
        self.world.synchronize()
        if self.world.device.type == "cpu":
            before = time.process_time()
            work()
            return 1000 * (time.process_time() - before)
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def take_turns(self, turns: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
        """A B A B; each turn returns its own milliseconds."""
        ms: dict[str, list[float]] = {name: [] for name in turns}
        for turn in range(self.warmup + self.steps):
            for name, take_turn in turns.items():
                spent_ms = take_turn()
                if turn >= self.warmup:
                    ms[name].append(spent_ms)
        return ms

    def compare(self, functions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """The same for functions of which the whole call counts."""
        return self.take_turns({n: lambda f=f: self.time_ms(f) for n, f in functions.items()})


def peak_bytes(work: Callable[[], object], world: World) -> int:
    """The most bytes of tensors that were alive at once in `work`, beyond those alive before."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(max(np.cumsum([event.nbytes() for event in events]), default=0))


# ----------------------------------------------------------------------------
# The table


def print_row(name: str, *cells: str) -> None:
    print(f"{name:40s}" + "".join(f"{cell:>24s}" for cell in cells), flush=True)


def print_times(title: str, ms: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """A row for each side: the median of its turns and its ratio to the first side, turn by turn,
    each followed by the quartiles. Returns the medians of the ratios.
    """
    first = next(iter(ms.values()))
    ratios = {}
    for name, values in ms.items():
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        ratio_low, ratio, ratio_high = np.quantile(np.divide(values, first), [0.25, 0.5, 0.75])
        ratios[name] = float(ratio)
        print_row(
            f"{title} {name}, ms, n={len(values)}",
            f"{middle:.1f} [{low:.1f} {high:.1f}]",
            f"{ratio:.3f} [{ratio_low:.3f} {ratio_high:.3f}]",
        )
    return ratios


# ----------------------------------------------------------------------------
# Where the milliseconds go

KINDS = {  # words in the names of kernels, and on a CPU of operators
    "attention": "attention sdpa flash fmha",
    "matrix products": (
        "gemm nvjet cutlass xmma splitk aten::mm aten::addmm aten::bmm aten::baddbmm"
    ),
    "copies": "memcpy memset aten::copy_ aten::cat catarray",
}


def kind_of(name: str, operators: Sequence[str]) -> str:
    """What a kernel is for, by its name and by the operators that it was started in."""
    if any(operator.startswith("Optimizer.step#") for operator in operators):
        return "optimizers"
    if any(operator.startswith("LinearCrossEntropy") for operator in operators):
        return "cross-entropy head"
    for kind, words in KINDS.items():
        if any(word in name.lower() for word in words.split()):
            return kind
    return "pointwise and reductions"


def profile_steps(step: Callable[[], float], num_steps: int, world: World) -> dict[str, object]:
    """Some steps, each of which returns its milliseconds, under torch.profiler: a row for each kind
    of kernel with its milliseconds, its share and its calls, per step.
    """
    with torch.profiler.profile() as profiler:
        step_ms = sum(step() for _ in range(num_steps)) / num_steps
    ms: Counter = Counter()
    calls: Counter = Counter()
    by_name: Counter = Counter()
    for event in profiler.events():
        operators, operator = [], event
        while operator is not None:
            operators.append(operator.name)
            operator = operator.cpu_parent
        kernels = [(kernel.name, kernel.duration) for kernel in event.kernels]
        if world.device.type == "cpu":
            kernels = [(event.name, event.self_cpu_time_total)]
        for name, microseconds in kernels:
            kind = kind_of(name, operators)
            ms[kind] += microseconds / 1000 / num_steps
            by_name[name] += microseconds / 1000 / num_steps
            calls[kind] += 1 / num_steps
    # The device waits for the host, or the profiler knows of no operator that started a kernel.
    ms["idle or not attributed"] = max(0.0, step_ms - sum(ms.values()))
    total_ms = sum(ms.values())  # on a busy CPU more than step_ms: operators have wall time
    for kind, spent_ms in ms.most_common():
        share = f"{spent_ms / total_ms:.1%}"
        print_row(f"{kind}: ms, share, calls", f"{spent_ms:.1f}", share, f"{calls[kind]:.0f}")
    largest = dict(by_name.most_common(25))
    return dict(step_ms=step_ms, ms_per_step=ms, calls_per_step=calls, largest_ms_per_step=largest)


# ----------------------------------------------------------------------------
# Files


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    return done.stdout.strip()


def machine_facts(world: World) -> dict[str, object]:
    """What every file begins with: command, commit, machine and versions."""
    on_gpu = world.device.type == "cuda"
    return {
        "command": shlex.join(sys.orig_argv),
        "git_commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "-uno")),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}",
        "device": world.device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "load": os.getloadavg(),
        "clock": "CUDA events" if on_gpu else "process CPU time",
    }


def write_part(path: Path, found: Mapping[str, object]) -> None:
    """One JSON file, a line per key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_whole(path, text.encode())


# ----------------------------------------------------------------------------
# Stopping


def stop_at_once(
    folder: Path, children: list[subprocess.Popen], done: list[str], deadline_s: float | None
) -> None:
    """From now on, Ctrl-C, SIGTERM and the deadline end the process where it stands.

    It waits for no thread, kernel or compilation. The temporary `folder` is removed, and `children`
    (each the leader of its own group) are killed; parts in `done` have their files. The exit code
    is 0 at the deadline, and 128 + the signal's number otherwise.
    """

    def stop(number: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        at_deadline = number == signal.SIGALRM
        why = "the deadline" if at_deadline else signal.Signals(number).name
        os.write(2, f"stopped by {why}; done: {', '.join(done) or 'nothing'}\n".encode())
        os._exit(0 if at_deadline else 128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, stop)
    if deadline_s is not None:
        signal.setitimer(signal.ITIMER_REAL, deadline_s)
