"""device.py -- what the device can do: its peak, its precisions, its compiler, its memory.

Promises: what a device does not have is refused with one line before training, and nothing falls
back to something slower in silence.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plumbing.knobs import UserError

if TYPE_CHECKING:
    from plumbing.world import World

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


def check_compiler(compile: bool, device_kind: str) -> None:
    """Raise UserError when torch.compile is asked for and its code generator is not usable."""
    if not compile:
        return
    if device_kind == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("COMPILE=1 on a GPU needs the package triton; install it, or set COMPILE=0")
    if device_kind == "cpu":
        candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        if not any(shutil.which(name) for name in candidates):
            raise UserError(
                f"COMPILE=1 on a CPU needs a C++ compiler, and {' or '.join(candidates)} is not "
                f"here; install one, set CXX to another, or set COMPILE=0"
            )


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The precision of matrix products, bf16, fp16 or fp32, and why it was chosen.

    auto is fp32 on a CPU, bf16 from compute capability 8.0 on, and fp16 below, where bf16 would be
    emulated (torch.cuda.is_bf16_supported() calls that support). Raises UserError for a precision
    that the device does not have.
    """
    if device.type == "cpu":
        if wanted == "fp16":
            raise UserError("PRECISION=fp16 needs a GPU; with DEVICE=cpu use bf16 or fp32")
        if wanted == "auto":
            return "fp32", "auto, CPU"
        return wanted, "as asked, CPU"
    major, minor = torch.cuda.get_device_capability(device)
    where = f"compute capability {major}.{minor}"
    if wanted == "auto":
        return ("bf16" if major >= 8 else "fp16"), f"auto, {where}"
    if wanted == "bf16" and major < 8:
        raise UserError(
            f"PRECISION=bf16: this GPU has {where} and would emulate it; use PRECISION=fp16"
        )
    if wanted == "fp16" and major < 7:
        raise UserError(f"PRECISION=fp16: this GPU has {where} and no fp16 units; use fp32")
    return wanted, f"as asked, {where}"


def choose_rows(
    device_batch_size: int | None,
    batch_size: int,
    attempt: Callable[[int], None],
    estimate_mib: Callable[[int], int],
    world: "World",
) -> int:
    """Rows of a micro-batch: DEVICE_BATCH_SIZE, but no more than a rank's share of the batch. None
    (auto) is the largest whose step fits; it changes memory and speed, not the training.
    """
    most = max(1, -(-batch_size // world.size))
    if device_batch_size is not None:
        return min(device_batch_size, most)
    return largest_that_fits(most, attempt, estimate_mib, world)


def largest_that_fits(
    n: int, attempt: Callable[[int], None], estimate_mib: Callable[[int], int], world: "World"
) -> int:
    """The largest divisor of n whose step fits into memory on every rank, at least 1.

    On CUDA it is tried out, from where a third of the estimate would fit; on a CPU the estimate
    must need no more than half of the memory that is free.
    """
    fits = 1
    for size in range(n, 0, -1):
        if n % size == 0 and _step_fits(size, attempt, estimate_mib(size), world.device):
            fits = size
            break
    return min(world.gather(fits))


def _step_fits(
    size: int, attempt: Callable[[int], None], estimate_mib: int, device: torch.device
) -> bool:
    if device.type == "cpu":
        lines = Path("/proc/meminfo").read_text().splitlines()
        available_kib = next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return estimate_mib * processes <= available_kib // 2048
    if estimate_mib // 3 * 2**20 > torch.cuda.get_device_properties(device).total_memory:
        return False
    try:
        attempt(size)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True
