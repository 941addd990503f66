"""device.py -- what the device can do: its peak, its precisions, its compiler, its memory.

Promises: what a device does not have is refused with one line before training, and nothing falls
back to something slower in silence.
"""

import importlib.util
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from plumbing.knobs import UserError

if TYPE_CHECKING:
    from plumbing.world import World

    class BatchKnobs(Protocol):
        """The knobs that choose_rows reads."""

        batch_size: int
        device_batch_size: int | None

    class MachineKnobs(Protocol):
        """The knobs that check_machine reads."""

        compile: bool
        device: str
        precision: str


# Dense bf16 (T4, V100: fp16) tensor-core peaks in FLOP/s, from the vendors' data sheets. The first
# name that occurs in the device's name counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """The best FLOP/s of a device by its name; None where it is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


# ----------------------------------------------------------------------------
# Threads of a CPU run


def choose_threads() -> str:
    """Set the number of threads with which this process computes on a CPU; what it is, and why.

    OMP_NUM_THREADS decides where it is set. Otherwise the number is doubled, up to this process's
    share of the cores, as long as that makes a small step at least a tenth faster now: threads wait
    for each other, and where other programs hold the cores, two can be slower than one by far.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return f"{torch.get_num_threads()}, set by OMP_NUM_THREADS"
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    most = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    threads, step_s = 1, _step_s(1)
    reason = "one core each"
    while 2 * threads <= most:
        doubled_s = _step_s(2 * threads)
        reason = f"{2 * threads} take {doubled_s / step_s:.2f} times as long for a small step now"
        if doubled_s > 0.9 * step_s:
            break
        threads, step_s = 2 * threads, doubled_s
        reason = "measured at the start"
    torch.set_num_threads(threads)
    return f"{threads}, {reason}; OMP_NUM_THREADS sets it"


def _step_s(threads: int) -> float:
    """Median time of what a small model's step is made of, over about a tenth of a second."""
    torch.set_num_threads(threads)
    x = torch.ones(1024, 128)
    up, down = torch.ones(128, 512) / 128, torch.ones(512, 128) / 512
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.1 and len(times) < 50):
        start = time.perf_counter()
        x = torch.nn.functional.rms_norm(x + (x @ up).relu() @ down, (128,))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one starts the threads


def keep_threads(threads: int | None) -> None:
    """Go on with the threads of the run that is resumed: another number rounds sums otherwise."""
    if threads and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(threads)


# ----------------------------------------------------------------------------
# Compiler, precision, memory


def check_compiler(compile: bool, device_kind: str) -> None:
    """Raise UserError when torch.compile is asked for and its code generator is not usable."""
    if not compile:
        return
    # A plan for a GPU may be made on a machine without one, and without its compiler.
    needs_triton = device_kind == "cuda" and torch.cuda.is_available()
    if needs_triton and importlib.util.find_spec("triton") is None:
        raise UserError("COMPILE=1 on a GPU needs the package triton; install it, or set COMPILE=0")
    if device_kind == "cpu":
        candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        if not any(shutil.which(name) for name in candidates):
            raise UserError(
                f"COMPILE=1 on a CPU needs a C++ compiler, and {' or '.join(candidates)} is not "
                f"here; install one, set CXX to another, or set COMPILE=0"
            )


def settle_device(
    device: str, fp16: bool, gpu_only: bool, say: Callable[[str], None] = print
) -> str:
    """The device to train on, for a trainer that may fall back to the CPU. Raises RuntimeError
    where GPU-only mode or fp16 cannot be kept; without GPU-only mode the way to the CPU is one
    line. The words, and their order, are those of github.com/Nishal14's original.
    """
    if gpu_only and device != "cuda":
        raise RuntimeError(
            "GPU-only mode requires --device cuda. Aborting to prevent accidental CPU training."
        )
    if gpu_only and not torch.cuda.is_available():
        raise RuntimeError(
            "CUDA requested but not available. GPU-only mode cannot fall back to CPU. Aborting."
        )
    if gpu_only:
        rule = "=" * 60
        say(f"{rule}\nGPU-ONLY MODE ENABLED")
        say(f"CPU training is disabled. Will abort if GPU unavailable.\n{rule}")
    if device == "cuda" and not torch.cuda.is_available():
        say("CUDA not available, using CPU")
        device = "cpu"
    if fp16 and device != "cuda":
        raise RuntimeError("FP16 mixed precision requires CUDA device")
    return device


def choose_precision(wanted: str, device: torch.device) -> str:
    """The precision of matrix products: bf16, fp16 or fp32.

    auto is fp32 on a CPU, bf16 from compute capability 8.0 on, and fp16 below, where bf16 would be
    emulated (torch.cuda.is_bf16_supported() calls that support). Raises UserError for a precision
    that the device does not have.
    """
    if device.type == "cpu":
        if wanted == "fp16":
            raise UserError("PRECISION=fp16 needs a GPU; with DEVICE=cpu use bf16 or fp32")
        return "fp32" if wanted == "auto" else wanted
    major, minor = torch.cuda.get_device_capability(device)
    where = f"this GPU has compute capability {major}.{minor}"
    if wanted == "auto":
        return "bf16" if major >= 8 else "fp16"
    if wanted == "bf16" and major < 8:
        raise UserError(f"PRECISION=bf16: {where} and would emulate it; use PRECISION=fp16")
    if wanted == "fp16" and major < 7:
        raise UserError(f"PRECISION=fp16: {where} and no fp16 units; use PRECISION=fp32")
    return wanted


def check_machine(cfg: "MachineKnobs", device: torch.device) -> None:
    """Raise UserError for a compiler or a precision that this machine does not have. A plan that is
    made on another machine's CPU cannot know the precisions of the run's GPU.
    """
    check_compiler(cfg.compile, cfg.device)
    if device.type == cfg.device:
        choose_precision(cfg.precision, device)


def choose_rows(
    cfg: "BatchKnobs", world: "World", model: nn.Module, run_step: Callable[[nn.Module, int], None]
) -> int:
    """Rows of a micro-batch: DEVICE_BATCH_SIZE, but no more than a rank's share of BATCH_SIZE.

    auto (None) is the largest power of two whose forward and backward pass, run_step(model, rows),
    fits: tried out on CUDA; on a CPU its estimate must fit into half of the free memory. It changes
    memory and speed, not the training. Gradients that it leaves behind are the caller's to zero.
    """
    most = max(1, -(-cfg.batch_size // world.size))
    if cfg.device_batch_size is not None:
        return min(cfg.device_batch_size, most)
    num_params = sum(p.numel() for p in model.parameters())
    rows = 2 ** int(math.log2(most))
    while rows > 1 and not _step_fits(rows, num_params, partial(run_step, model), world.device):
        rows //= 2
    return min(world.gather(rows))


def estimate_mib(num_params: int, rows: int, run_step: Callable[[int], None]) -> int:
    """Rough peak of a rank: 18 bytes per parameter (weight, gradient, two moments, a copy for the
    products), and what one row keeps for its backward pass, counted, times the rows.
    """
    saved_bytes = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved_bytes
        if not isinstance(tensor, torch.nn.Parameter):
            saved_bytes += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        run_step(1)
    return (18 * num_params + rows * saved_bytes) // 2**20


def _step_fits(
    rows: int, num_params: int, run_step: Callable[[int], None], device: torch.device
) -> bool:
    if device.type == "cpu":
        lines = Path("/proc/meminfo").read_text().splitlines()
        free_kib = next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return estimate_mib(num_params, rows, run_step) * processes <= free_kib // 2048
    try:
        run_step(rows)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def compile_parts(
    parts: Sequence[nn.Module | None], run_step: Callable[[], None], world: "World"
) -> str:
    """Compile the forward passes of some modules, and run one step to see whether that works. None
    is a part that the model does not have.

    Returns ''. Where the compiler fails on any rank, it returns what went wrong, and nothing is
    compiled on any rank: training does not depend on it.
    """
    parts = [part for part in parts if part is not None]
    problem = ""
    try:
        for part in parts:
            part.forward = torch.compile(part.forward, dynamic=False)
        run_step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler fails in any way
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    problems = [p for p in world.gather(problem) if p]
    if not problems:
        return ""
    for part in parts:
        vars(part).pop("forward", None)  # the class's own again
    return problems[0]


class CudaGraph:
    """`work` on CUDA as one launch, for work that is made of many small ones.

    Its arguments are tensors and numbers, each of one shape and type in all calls. The work may not
    wait for the device (.item(), a branch on a value), read a Python value that changes, or put
    another tensor in the place of one that it reads, such as p.grad: it writes to that in place.
    The first WARMUP calls run as they are; then the work is recorded once, and from there on
    replayed. Arguments are copied to where the recorded work reads them. What is returned is
    overwritten by the next call.
    """

    WARMUP = 3  # lets libraries, compiler and allocator settle

    def __init__(self, work: Callable[..., object], device: torch.device):
        self.work, self.device = work, device
        self.calls = 0
        self.stream = torch.cuda.Stream(device)

    def __call__(self, *arguments: torch.Tensor | float) -> object:
        if self.calls == 0:
            self.own = [torch.as_tensor(x, device=self.device).clone() for x in arguments]
        for own, new in zip(self.own, arguments, strict=True):
            if isinstance(new, torch.Tensor):
                own.copy_(new)
            else:
                own.fill_(new)
        self.calls += 1
        if self.calls <= self.WARMUP:
            return self.run_apart()
        if self.calls == self.WARMUP + 1:
            self.record()
        self.graph.replay()
        return self.returned

    def run_apart(self) -> object:
        """The work on a stream of its own, as recording wants it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            returned = self.work(*self.own)
        torch.cuda.current_stream().wait_stream(self.stream)
        return returned

    def record(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, as those that make batches, may use the device meanwhile.
        options = dict(stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.graph(self.graph, **options):
            self.returned = self.work(*self.own)
