"""kernels.py -- kernels of other packages for an operator that a trainer writes out.

Promises: each equals the trainer's own form up to rounding (a GPU test compares them), and none is
used unless a knob asks for it.
"""

import importlib.util

from torch import Tensor


def check_kernel(kernel: str, device: str) -> None:
    """Raise ValueError where the kernels that KERNEL names cannot be used."""
    if kernel == "plain":
        return
    if device == "cpu":
        raise ValueError("KERNEL=fla needs a GPU; with DEVICE=cpu use plain")
    if importlib.util.find_spec("fla") is None:
        raise ValueError(
            "KERNEL=fla needs the package fla-core: pip install fla-core, or use plain"
        )


def fla_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk_length: int
) -> tuple[Tensor, Tensor]:
    """Gated linear attention by flash-linear-attention (Yang et al., arXiv 2312.06635): reads
    (B, H, T, E) and the state (B, H, S, E) after the last token, for q, k and log_decay
    (B, H, T, S) and v (B, H, T, E). The kernel chooses its own chunk_length.
    """
    from fla.ops.gla import chunk_gla

    options = dict(scale=1.0, initial_state=state, output_final_state=True)
    token_first = [x.transpose(1, 2) for x in (q.type_as(v), k.type_as(v), v, log_decay)]
    read, state = chunk_gla(*token_first, **options)
    return read.transpose(1, 2), state
