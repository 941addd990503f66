"""count_layer.py -- FLOPs and bytes of one block of train_gpu.py per token, counted, not timed.

    python scripts/hamt/count_layer.py --preset 100m --lengths 1024,8192,65536

A forward and a backward pass of one block run on fake tensors, which have no data, so that no GPU
is needed and any size is counted in seconds. (Not on the meta device: autocast leaves its products
in fp32.) FLOPs are those of matrix products and attention (two for a multiplication with its
addition). Attention is a fused kernel that keeps no scores; half of its scores are masked and not
counted, and its backward pass has 2.5 times the FLOPs of its forward pass. Moved bytes are the
sizes of all inputs and outputs of every operation, as eager PyTorch runs them one by one; a
compiler that fuses operations moves less. Kept bytes are what the forward pass keeps for the
backward pass, as eager PyTorch runs the block, and as torch.compile cuts it into two graphs. Both
are what a second row adds, without weights.

Prints   a table: a row for each mixer and length
Units    FLOPs and bytes per token of a row
"""

from collections.abc import Sequence
from unittest import mock

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import torch
import torch.nn.functional as F
from comparison_flags import numbers
from comparison_tables import markdown, show
from one_block import block_flags, block_knobs, make_block
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import train_gpu
from plumbing.world import launch

COLUMNS = {
    "mixer": "mixer",
    "length": "tokens of a row",
    "flops": "MFLOPs",
    "moved": "moved, KiB",
    "kept": "kept, KiB",
    "compiled": "kept if compiled, KiB",
    "operations": "operations of a step",
}


class MovedBytes(TorchDispatchMode):
    """Counts operations that make new tensors, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.bytes, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        is_question = func.namespace == "prim"  # such as where a tensor is
        if not (func.is_view or is_question or "detach" in str(func)):
            self.operations += 1
            for t in tree_leaves((args, kwargs, made)):
                if isinstance(t, Tensor):
                    self.bytes += t.numel() * t.element_size()
        return made


def fused_attention(q, k, v, **_: object) -> Tensor:
    """On a CPU torch may take the form that writes all scores down."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]


def total_flops(counter: FlopCounterMode, cfg: train_gpu.Knobs, T: int) -> float:
    """Of T tokens. What torch may count for a fused kernel of the CPU is replaced by our own."""
    total = 0.0
    for operation, flops in counter.get_flop_counts()["Global"].items():
        if not str(operation).startswith("aten._scaled_dot_product"):
            total += flops
    if cfg.mixer == "attention":
        total += 3.5 * 2 * T * T * cfg.n_embd
    return total


def kept_bytes(cfg: train_gpu.Knobs, B: int, T: int, compiled: bool) -> int:
    """What B rows of T tokens keep for the backward pass, with copies of weights."""
    block, given = make_block(cfg, B, T)
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    if compiled:
        torch._dynamo.reset()
        block.compile(backend="aot_eager_decomp_partition", dynamic=False)
    kept: dict[int, int] = {}  # bytes by storage, because several operations may keep the same one
    alive = []  # so that no storage takes the place of one that is gone

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return t

    fused = mock.patch.object(F, "scaled_dot_product_attention", fused_attention)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with fused, hooks, train_gpu.autocast(given[0], train_gpu.DTYPES[cfg.precision]):
        block(*given)
    return sum(kept.values())


def kept_per_token(cfg: train_gpu.Knobs, T: int, compiled: bool) -> float:
    """Bytes; what two rows keep more than one does, so that no weight and no copy of one counts."""
    one, two = (kept_bytes(cfg, B, T, compiled) for B in (1, 2))
    return (two - one) / T


def count_pass(cfg: train_gpu.Knobs, B: int, T: int) -> tuple[MovedBytes, float]:
    """Moved bytes and operations, and FLOPs, of B rows of T tokens, forward and backward."""
    block, given = make_block(cfg, B, T)
    moved, flops = MovedBytes(), FlopCounterMode(display=False)
    fused = mock.patch.object(F, "scaled_dot_product_attention", fused_attention)
    with fused, moved, flops, train_gpu.autocast(given[0], train_gpu.DTYPES[cfg.precision]):
        y_BTC, _, _ = block(*given)
        y_BTC.sum().backward()
    return moved, total_flops(flops, cfg, T)


def count(cfg: train_gpu.Knobs, T: int) -> dict[str, object]:
    """Per token of one row of T tokens."""
    one, flops = count_pass(cfg, 1, T)
    two, _ = count_pass(cfg, 2, T)
    return {
        "mixer": cfg.mixer,
        "length": T,
        "flops": flops / T / 1e6,
        "moved": (two.bytes - one.bytes) / T / 1024,
        "kept": kept_per_token(cfg, T, compiled=False) / 1024,
        "compiled": kept_per_token(cfg, T, compiled=True) / 1024,
        "operations": one.operations,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = block_flags(__doc__)
    parser.add_argument("--lengths", type=numbers, default=[1024, 8192, 65536], help="of a row")
    flags = parser.parse_args(argv)
    rows = []
    for mixer in ("hamt", "attention"):
        cfg = block_knobs(flags, mixer)
        for T in flags.lengths:
            with FakeTensorMode():
                rows.append(count(cfg, T))
    show(markdown(rows, COLUMNS))


if __name__ == "__main__":
    launch(main)
