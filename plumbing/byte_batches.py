"""byte_batches.py -- which bytes each step trains on, and what a validation scores.

Promises: the bytes of a step are a function of the step, so that any number of ranks trains on the
same text and a resumed run needs no state of a reader; and a validation counts every byte of its
text once, whatever the number of ranks and of rows in a micro-batch.

Targets stand `ahead` bytes behind their inputs: a model that reads patches of 4 bytes predicts the
4 bytes of the next patch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from plumbing.data import TokenShards
from plumbing.knobs import ROOT, UserError
from plumbing.splits import NotFetched, open_byte_files
from plumbing.world import World

VALIDATION_STRIPS = 8  # parts of a validation text that are read side by side
MANY_EPOCHS = 20  # a run that reads its text more often than that is warned


class ByteKnobs(Protocol):
    """The knobs that the batches read."""

    data: str  # what open_byte_files takes
    batch_size: int  # rows of a step, over all ranks
    sequence_length: int  # bytes of a row
    num_iterations: int
    carry_state: bool
    seed: int


class ByteBatches:
    """The rows of every step. Raises UserError for a text or a batch that is too small.

    CARRY_STATE=1: row r reads its own strip of the text, one of BATCH_SIZE equal ones, window after
    window, and starts over at its end. CARRY_STATE=0: windows at random places.
    """

    def __init__(self, text: TokenShards, cfg: ByteKnobs, world: World, ahead: int):
        self.text, self.cfg, self.ahead = text, cfg, ahead
        self.rows = world.share(cfg.batch_size)
        num_strips = cfg.batch_size if cfg.carry_state else 1
        needed = num_strips * cfg.sequence_length + ahead
        if cfg.sequence_length % ahead:
            raise UserError(
                f"SEQUENCE_LENGTH={cfg.sequence_length} must be a multiple of {ahead} bytes"
            )
        if cfg.batch_size < world.size:
            raise UserError(
                f"BATCH_SIZE={cfg.batch_size} leaves some of {world.size} ranks without a row; "
                f"set BATCH_SIZE={world.size} or more, or use fewer ranks"
            )
        if text.total < needed:
            raise UserError(
                f"{text.pattern}: {text.total:,} bytes of training text, {num_strips} row(s) of "
                f"SEQUENCE_LENGTH={cfg.sequence_length} need {needed:,}; use more text or shorter "
                f"rows"
            )
        self.strip_bytes = (text.total - ahead) // num_strips
        self.num_windows = self.strip_bytes // cfg.sequence_length  # of a strip

    def starts(self, step: int) -> list[int]:
        """Positions in the text of all rows' windows."""
        cfg = self.cfg
        if cfg.carry_state:
            window = step % self.num_windows * cfg.sequence_length
            return [row * self.strip_bytes + window for row in range(cfg.batch_size)]
        last = self.text.total - cfg.sequence_length - self.ahead
        draw = np.random.default_rng([cfg.seed, step])
        return draw.integers(0, last + 1, cfg.batch_size).tolist()

    def starts_over(self, step: int) -> bool:
        return not self.cfg.carry_state or step % self.num_windows == 0

    def make(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets, (rows, T) uint8."""
        length = self.cfg.sequence_length + self.ahead
        rows = [self.text.read(at, length) for at in self.starts(step)[self.rows]]
        text = torch.from_numpy(np.stack(rows).astype(np.uint8))
        return text[:, : -self.ahead].contiguous(), text[:, self.ahead :].contiguous()

    def facts(self, val: TokenShards) -> dict[str, object]:
        """Of the text, for the log and --dry_run; a warning where it is read too often."""
        cfg = self.cfg
        step_bytes = cfg.batch_size * cfg.sequence_length
        total_bytes = step_bytes * cfg.num_iterations
        epochs = total_bytes / self.text.total
        found: dict[str, object] = {
            "step": f"{step_bytes:,} bytes",
            "training tokens": f"{total_bytes:,} in {cfg.num_iterations} steps",
            "data": f"{self.text.total:,} bytes, {val.total:,} to validate",
            "epochs": f"{epochs:.2f}",
        }
        if epochs > MANY_EPOCHS:
            found["warning"] = (
                f"this run would read {self.text.total / 1e6:.1f} MB of text {epochs:.0f} times; "
                f"name more text with DATA=wikipedia:tr or DATA=FOLDER, or lower NUM_ITERATIONS"
            )
        return found


def text_facts(cfg: ByteKnobs, world: World, ahead: int) -> dict[str, object]:
    """Of a run's text, for the log and --dry_run. One that would have to be downloaded stays where
    it is, and is a fact as well.
    """
    try:
        text, val, sha = open_byte_files(cfg.data, ROOT / "data", ahead, download=False)
    except NotFetched as error:
        return {"data": error}
    found = {"embedded corpus": f"sha256 {sha}"} if sha else {}
    return found | ByteBatches(text, cfg, world, ahead).facts(val)


@dataclass
class ScoredBytes:
    """What a validation scores of its text: the first `limit` bytes (None: all) of those behind the
    first `ahead`.
    """

    text: TokenShards
    ahead: int
    limit: int | None

    @property
    def num_bytes(self) -> int:
        total = self.text.total - self.ahead
        return total if self.limit is None else min(total, self.limit)

    @property
    def characters_per_byte(self) -> float:
        scored = self.text.read(self.ahead, self.num_bytes)
        return float(np.mean(scored & 0xC0 != 0x80))  # other bytes go on with a character

    def windows(self, world: World, rows: int, T: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """This rank's inputs and targets (rows, T), int64, -1 where there is no target, and whether
        other strips begin here.

        The text is cut into 8 strips of whole patches, read side by side in windows that do not
        overlap; each scored byte is a target once.
        """
        ahead = self.ahead
        strip_bytes = -(-self.num_bytes // (VALIDATION_STRIPS * ahead)) * ahead
        strips = range(VALIDATION_STRIPS)[world.share(VALIDATION_STRIPS)]
        for first in range(0, len(strips), rows):
            for at in range(0, strip_bytes, T):
                x_BT = np.zeros((rows, T), np.int64)
                y_BT = np.full((rows, T), -1)
                for i, strip in enumerate(strips[first : first + rows]):
                    start = strip * strip_bytes + at
                    num_targets = min(T, strip_bytes - at, self.num_bytes - start)
                    if num_targets <= 0:
                        continue
                    text = self.text.read(start, num_targets + ahead)
                    num_inputs = -(-num_targets // ahead) * ahead  # whole patches
                    x_BT[i, :num_inputs] = text[:num_inputs]
                    y_BT[i, :num_targets] = text[ahead:]
                yield torch.from_numpy(x_BT), torch.from_numpy(y_BT), at == 0
