"""count_kernels.py -- kernels of a compiled block of train_gpu.py and the bytes that they move.

    python scripts/hamt/count_kernels.py --preset 100m

torch.compile joins operations into kernels. Its scheduler decides which ones, by rules that look at
shapes and at the kind of device, and counts what every kernel reads and writes. This program lets
it decide as for a GPU and stops before code is written, so no GPU is needed. It says how much there
is to move, and not how long that takes; compare forms of the layer with it before a GPU decides.
Attention itself is the fused kernel of the CPU, and counts as one that keeps no scores.

Bytes are those of a forward and a backward pass, and what a second row adds, without weights. The
hooks into the compiler are internal to torch: written for torch 2.13, they may fail in another.

Prints   a table: a row for each mixer
Units    bytes per token of a row
"""

from collections.abc import Callable, Sequence

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import torch
from comparison_flags import one_number
from comparison_tables import markdown, show
from one_block import block_flags, block_knobs, make_block
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import compile_fx, config
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

import train_gpu
from plumbing.world import launch

COLUMNS = {
    "mixer": "mixer",
    "length": "tokens of a row",
    "moved": "moved if compiled, KiB",
    "kernels": "kernels",
}


class FusedKernels:
    """A backend of torch.compile that counts kernels in place of writing them."""

    def __init__(self):
        self.bytes, self.kernels = 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        return compile_fx.compile_fx(graph, inputs, inner_compile=self.count)

    def count(
        self, graph: torch.fx.GraphModule, inputs: list, is_backward: bool = False, **_: object
    ) -> Callable:
        """The steps of compile_fx_inner up to the scheduler; then runs the graph uncompiled."""
        fake_mode = compile_fx.fake_tensor_prop(graph, inputs)
        compile_fx._recursive_record_original_output_strides(graph)
        as_for_a_gpu = config.patch(cpu_backend="triton")
        with V.set_fake_mode(fake_mode), as_for_a_gpu:
            compile_fx._recursive_post_grad_passes(graph, is_inference=False)
            lowered = GraphLowering(graph, shape_env=fake_mode.shape_env, is_backward=is_backward)
            with (
                V.set_graph_handler(lowered),
                V.set_extern_kernel_nodes([]),
                V.set_real_inputs(inputs),
                DebugContext(),
            ):
                lowered.run(*inputs)
                lowered._update_scheduler()
                num_bytes, kernels, _ = lowered.count_bytes()
        self.bytes += num_bytes
        self.kernels += len(kernels)
        return make_boxed_func(graph.forward)


def count_pass(cfg: train_gpu.Knobs, B: int, T: int) -> FusedKernels:
    """Of B rows of T tokens, forward and backward."""
    torch._dynamo.reset()
    block, given = make_block(cfg, B, T)
    fused = FusedKernels()
    block.compile(backend=fused, dynamic=False)
    with train_gpu.autocast(given[0], train_gpu.DTYPES[cfg.precision]):
        y_BTC, _, _ = block(*given)
        y_BTC.sum().backward()
    return fused


def count(cfg: train_gpu.Knobs, T: int) -> dict[str, object]:
    one, two = count_pass(cfg, 1, T), count_pass(cfg, 2, T)
    return {
        "mixer": cfg.mixer,
        "length": T,
        "moved": (two.bytes - one.bytes) / T / 1024,
        "kernels": two.kernels,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = block_flags(__doc__)
    parser.add_argument("--length", type=one_number, default=1024, help="tokens of a row (1024)")
    flags = parser.parse_args(argv)
    mixers = ("hamt", "attention")
    rows = [count(block_knobs(flags, mixer), flags.length) for mixer in mixers]
    show(markdown(rows, COLUMNS))


if __name__ == "__main__":
    launch(main)
