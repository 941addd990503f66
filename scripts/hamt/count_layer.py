"""count_layer.py -- FLOPs and bytes of one block of train_gpu.py per token, counted, not timed.

    python scripts/hamt/count_layer.py --preset 100m --lengths 1024,8192,65536

A forward and a backward pass of one block run on tensors without data (the meta device), so that no
GPU is needed and any size is counted in a second. FLOPs are those of matrix products, attention and
the convolution (two for a multiplication with its addition). Attention is a fused kernel that keeps
no scores; half of its scores are masked and not counted, and its backward pass has 2.5 times the
FLOPs of its forward pass. Moved bytes are the sizes of all inputs and outputs of every
operation, as eager PyTorch runs them one by one; a compiler that fuses operations moves less. Kept
bytes are what the forward pass keeps for the backward pass. Weights are left out of both.

Prints   a table: a row for each mixer and length
Units    FLOPs and bytes per token of a row
"""

import argparse
from collections.abc import Sequence
from unittest import mock

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import torch
import torch.nn.functional as F
from comparison_flags import numbers
from comparison_tables import markdown, show
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import train_gpu
from plumbing import read_knobs
from plumbing.world import launch

COLUMNS = {
    "mixer": "mixer",
    "length": "tokens of a row",
    "flops": "MFLOPs",
    "moved": "moved, KiB",
    "kept": "kept, KiB",
    "operations": "operations of a step",
}


class MovedBytes(TorchDispatchMode):
    """Counts operations that make new tensors, and the bytes that they read and write."""

    def __init__(self, weights: Sequence[Tensor]):
        super().__init__()
        self.weights = {id(p) for p in weights}
        self.bytes, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not func.is_view and "detach" not in str(func):
            self.operations += 1
            for t in tree_leaves((args, kwargs, made)):
                if isinstance(t, Tensor) and id(t) not in self.weights:
                    self.bytes += t.numel() * t.element_size()
        return made


def fused_attention(q, k, v, **_: object) -> Tensor:
    """On the meta device torch would take the form that writes all scores down."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]


def total_flops(counter: FlopCounterMode, cfg: train_gpu.Knobs, T: int) -> float:
    """Of T tokens. torch counts a convolution's backward pass as if it had one group, and a fused
    kernel of the CPU not at all: both are put right here.
    """
    total = 0.0
    for operation, flops in counter.get_flop_counts()["Global"].items():
        name = str(operation)
        if name.startswith("aten.convolution") and "backward" not in name:
            total += 3 * flops
        elif not name.startswith(("aten.convolution", "aten._scaled_dot_product")):
            total += flops
    if cfg.mixer == "attention":
        total += 3.5 * 2 * T * T * cfg.n_embd
    return total


def count(cfg: train_gpu.Knobs, T: int) -> dict[str, object]:
    """Per token of one row of T tokens, forward and backward."""
    with torch.device("meta"):
        model = train_gpu.Model(cfg)
        block = model.blocks[0]
        x_BTC = torch.empty(1, T, cfg.n_embd, requires_grad=True)
        zero = torch.zeros((), dtype=torch.long)
        angles = train_gpu.angles_at(cfg, zero, T, torch.float32)
        seed_B = torch.zeros(1, dtype=torch.long)
    state = block.mixer.empty_state(1)
    weights = list(block.parameters())
    kept: dict[int, int] = {}  # bytes by storage, because several operations may keep the same one
    own = {p.untyped_storage()._cdata for p in weights}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return t

    alive = []  # so that no storage takes the place of one that is gone

    moved, flops = MovedBytes(weights), FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    fused = mock.patch.object(F, "scaled_dot_product_attention", fused_attention)
    with fused, hooks, moved, flops, train_gpu.autocast(x_BTC, model.dtype):
        y_BTC, _, _ = block(x_BTC, state, angles, seed_B, (None, None))
        y_BTC.sum().backward()
    return {
        "mixer": cfg.mixer,
        "length": T,
        "flops": total_flops(flops, cfg, T) / T / 1e6,
        "moved": moved.bytes / T / 1024,
        "kept": sum(kept.values()) / T / 1024,
        "operations": moved.operations,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    presets = tuple(train_gpu.PRESETS)
    parser.add_argument("--preset", choices=presets, default="100m", help="of train_gpu.py (100m)")
    parser.add_argument("--lengths", type=numbers, default=[1024, 8192, 65536], help="of a row")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(bf16)")
    a = parser.parse_args(argv)
    rows = []
    for mixer in ("hamt", "attention"):
        for T in a.lengths:
            given = dict(preset=a.preset, mixer=mixer, precision=a.precision, dropout=0.0)
            flags = [f"--{name}={value}" for name, value in given.items()]
            cfg = read_knobs(train_gpu.Knobs, train_gpu.PRESETS, flags, {})
            rows.append(count(cfg, T))
    show(markdown(rows, COLUMNS))


if __name__ == "__main__":
    launch(main)
