"""byte_scores.py -- the loss of a byte model on a text, and one pass of it to measure.

Promises: every scored byte counts once, the same for every number of ranks and of rows at a time.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import nn

from plumbing.byte_batches import ScoredBytes
from plumbing.byte_knobs import ByteRunKnobs
from plumbing.plan import count_flops
from plumbing.world import World

# A model(x_BT, y_BT, state) returns -log p of each target, (B, T), in nats, which is 0 where it is
# -1, and the state behind the last byte; state None is the beginning of a text.


def probe_backward(model: nn.Module, rows: int) -> None:
    """Forward and backward pass of a micro-batch of zeros, to measure its memory."""
    cfg, device = model.cfg, next(model.parameters()).device
    x_BT = torch.zeros(rows, cfg.sequence_length, dtype=torch.long, device=device)
    past = model.empty_state(rows) if cfg.carry_state else None
    model(x_BT, x_BT, past)[0].mean().backward()


@cache
def flops_per_byte(make_model: Callable[[ByteRunKnobs], nn.Module], cfg: ByteRunKnobs) -> float:
    """FLOPs of forward and backward, for MFU: all products of a row, without recomputation."""
    with torch.device("meta"):
        model = make_model(replace(cfg, recompute=False))
        return count_flops(partial(probe_backward, model, 1)) / cfg.sequence_length


@torch.no_grad()
def evaluate(model: nn.Module, val: ScoredBytes, rows: int, world: World) -> float:
    """Mean loss per byte of the validation text, in nats. With CARRY_STATE=1 the state is carried
    from window to window.
    """
    cfg = model.cfg
    loss_sum = torch.zeros((), device=world.device, dtype=torch.float64)
    model.eval()
    for x_BT, y_BT, begins in val.windows(world, rows, cfg.sequence_length):
        if begins or not cfg.carry_state:
            state = None
        nll_BT, state = model(x_BT.to(world.device), y_BT.to(world.device), state)
        loss_sum += nll_BT.double().sum()
    model.train()
    return world.all_reduce(loss_sum).item() / val.num_bytes
