"""exchange.py -- the figures that all ranks exchange at every step, read one step late.

Promises: all ranks see the same numbers, and therefore decide alike. Sending waits for nothing, and
the host reads a step's numbers only after it has queued the next step, so the device never idles
because somebody looks at a loss. Still no bad update is ever applied: `send` returns a flag on the
device that falls with the first number that is not finite on any rank, and stays down.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plumbing.world import World

NUM_HOST_FIGURES = 2  # the first columns of the table: signal, clock; then overflow, then the loss


@dataclass(frozen=True)
class StepStats:
    """What all ranks know of one finished optimizer step."""

    step: int
    lr: float
    loss: float  # mean over the batch
    grad_norm: float
    metrics: dict[str, float]
    skipped: bool  # fp16 overflowed and the update was left out
    spent_s: float  # training time on rank 0's clock when the step was queued
    signal: int  # number of a signal that any rank has caught; 0 for none
    problem: str  # which figure was not finite; empty where all are

    def line(self, total_steps: int) -> str:
        """The words of a log line, where a trainer has none of its own."""
        words = f"step:{self.step}/{total_steps} train_loss:{self.loss:.4f}"
        for name, value in self.metrics.items():
            words += f" {name}:{value:.4g}"
        if self.skipped:
            words += " skipped: fp16 overflow"
        return words


class StepExchange:
    """The queue of steps whose figures were sent and not yet read.

    Shapes: W ranks, P parameters, X figures of a step.
    """

    def __init__(self, world: World):
        self.world = world
        self.queue: list[_QueuedStep] = []
        self.all_finite = torch.ones((), dtype=torch.bool, device=world.device)

    def send(
        self,
        step: int,
        loss: Tensor,
        lr: float,
        grad_norms_P: Tensor,
        overflow: Tensor | None,
        metrics: Mapping[str, Tensor],
        spent_s: float,
    ) -> Tensor:
        """Queue one all-gather; returns a device bool: the update may be applied.

        loss and metrics are this rank's shares, which add up over the ranks. grad_norms_P are those
        of the summed gradients, the same on every rank. Where `overflow` is set, fp16 has
        overflowed: the update is left out, and infinite norms are no fault.
        """
        world = self.world
        if overflow is None:
            overflow = torch.zeros((), dtype=torch.bool, device=world.device)
        signal_now = world.signals[0] if world.signals else 0
        host = torch.tensor([signal_now, spent_s], dtype=torch.float32)
        scalars = [overflow, loss, *metrics.values()]
        figures = torch.stack([scalar.detach().float() for scalar in scalars])
        norms_P = grad_norms_P.masked_fill(overflow, 0.0)
        own = torch.cat([host.to(world.device, non_blocking=True), figures, norms_P])
        table_WX = world.all_gather(own)
        self.all_finite = self.all_finite & table_WX.isfinite().all()
        self.queue.append(_QueuedStep(step, lr, list(metrics), table_WX))
        return self.all_finite & ~overflow

    def read(self, parameter_names: Sequence[str], keep: int) -> list[StepStats]:
        """The stats of all queued steps but the newest `keep`; with keep=0 it waits for them."""
        stats = []
        while len(self.queue) > keep:
            stats.append(self.queue.pop(0).stats(parameter_names))
        return stats


class _QueuedStep:
    """A step whose figures are on their way to the host."""

    def __init__(self, step: int, lr: float, metric_names: list[str], table_WX: Tensor):
        self.step, self.lr, self.metric_names = step, lr, metric_names
        self.table_WX = table_WX
        self.copied: torch.cuda.Event | None = None
        if table_WX.device.type == "cuda":
            pinned = torch.empty_like(table_WX, device="cpu", pin_memory=True)
            self.table_WX = pinned.copy_(table_WX, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def stats(self, parameter_names: Sequence[str]) -> StepStats:
        if self.copied is not None:
            self.copied.synchronize()
        table = self.table_WX.double()
        host, overflow, shares, norms = table.split(
            [NUM_HOST_FIGURES, 1, 1 + len(self.metric_names), len(parameter_names)], dim=1
        )
        loss, *metrics = shares.sum(dim=0).tolist()
        return StepStats(
            step=self.step,
            lr=self.lr,
            loss=loss,
            grad_norm=norms[0].norm().item(),
            metrics=dict(zip(self.metric_names, metrics, strict=True)),
            skipped=bool(overflow[0, 0]),
            spent_s=host[0, 1].item(),
            signal=int(host[:, 0].max()),
            problem=_what_is_not_finite(shares, norms, parameter_names),
        )


def _what_is_not_finite(shares_WX: Tensor, norms_WP: Tensor, names: Sequence[str]) -> str:
    """Names the first rank and the first gradient that are not finite; empty where all are."""
    is_bad_W = ~torch.cat([shares_WX, norms_WP], dim=1).isfinite().all(dim=1)
    if not is_bad_W.any():
        return ""
    rank = is_bad_W.tolist().index(True)
    norms = zip(names, norms_WP[rank].tolist(), strict=True)
    bad_gradients = [name for name, norm in norms if not math.isfinite(norm)]
    gradient = bad_gradients[0] if bad_gradients else "none"
    return f"loss {shares_WX[rank, 0]:g} on rank {rank}, first bad gradient {gradient}"
