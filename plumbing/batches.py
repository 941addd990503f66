"""batches.py -- which tokens a step trains on, and rows of tokens as tensors.

Promises: the tokens of a step are a function of the step and the batch, never of the number of
ranks, of a resume or of the micro-batch; the ranks' shares together are the batch. Validation meets
the same tokens in one tensor shape. It is the one part of plumbing that a loss depends on, so its
orders are tested against an independent rewriting of the record's loader.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from plumbing.data import TokenShards
from plumbing.knobs import UserError
from plumbing.world import World

VIRTUAL_RANKS = 8  # of the record order


class BatchKnobs(Protocol):
    """The knobs that TokenBatches reads."""

    batch_size: int  # sequences, over all ranks
    sequence_length: int
    num_iterations: int
    data_order: str
    data_seed: int | None
    epochs_ok: bool


class TokenBatches:
    """Batches of BATCH_SIZE sequences of SEQUENCE_LENGTH tokens, by step.

    stream: one clean pass over the shards. record: what the 8-GPU record of 2024-10 trains on,
    quirks included: each of 8 virtual ranks strides through a shard by itself and leaves it when
    less than a whole batch is left behind its own position (so ranks 6 and 7 leave FineWeb's shards
    one batch early), and the first batch is used twice. DATA_SEED shuffles the order of the
    batches, anew in each epoch. Raises UserError when a shard is too short.
    """

    def __init__(self, shards: TokenShards, cfg: BatchKnobs, world: World):
        self.shards, self.world, self.data_seed = shards, world, cfg.data_seed
        self.batch_size, self.sequence_length = cfg.batch_size, cfg.sequence_length
        self.batch_tokens = cfg.batch_size * cfg.sequence_length
        self.epochs_ok, self.num_iterations = cfg.epochs_ok, cfg.num_iterations
        self.is_record = cfg.data_order == "record"
        self.shuffled = lru_cache(maxsize=2)(self._shuffled)
        # Of each span of the batch: the stream positions where its part of each batch begins.
        if self.is_record:
            self.positions = [self._record_positions(rank) for rank in range(VIRTUAL_RANKS)]
        else:
            self.positions = [np.arange(0, shards.total - self.batch_tokens, self.batch_tokens)]
        self.epoch_steps = min(len(positions) for positions in self.positions)
        # Steps without starting over; the record's first batch counts twice.
        self.num_steps = self.epoch_steps + int(self.is_record and self.epoch_steps > 0)

    def _record_positions(self, virtual_rank: int) -> np.ndarray:
        shards, tokens = self.shards, self.batch_tokens
        offset = virtual_rank * tokens // VIRTUAL_RANKS
        parts = []
        for path, start, length in zip(shards.paths, shards.starts, shards.lengths, strict=False):
            if length < tokens + 1:
                raise UserError(
                    f"{path}: {length:,} tokens, a batch in record order takes {tokens + 1:,}; use "
                    f"larger shards, a smaller BATCH_SIZE, or DATA_ORDER=stream"
                )
            num_batches = max(1, (length - 1 - offset) // tokens)
            parts.append(start + offset + tokens * np.arange(num_batches))
        return np.concatenate(parts)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.data_seed, epoch]).permutation(self.epoch_steps)

    def starts(self, step: int) -> list[int]:
        """Stream positions at which the batch's spans of sequences begin, in order."""
        i = max(0, step - 1) if self.is_record else step
        if self.data_seed is not None:
            i = int(self.shuffled(i // self.epoch_steps)[i % self.epoch_steps])
        return [int(positions[i % len(positions)]) for positions in self.positions]

    def make(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the step, (its share of the batch, T) int32."""
        starts = self.starts(step)
        rows_per_span = self.batch_size // len(starts)
        share = self.world.share(self.batch_size)
        positions = []
        for row in range(share.start, share.stop):
            span, row_in_span = divmod(row, rows_per_span)
            positions.append(starts[span] + row_in_span * self.sequence_length)
        return read_rows(self.shards, positions, self.sequence_length)

    def check(self, vocab_size: int) -> None:
        """Raise UserError when the shards do not feed the run, or hold ids beyond the vocabulary
        where the run reads them.
        """
        if self.epoch_steps == 0 or self.used_up(self.num_iterations - 1):
            raise UserError(
                f"{len(self.shards.paths)} shard(s) match {self.shards.pattern}; their "
                f"{self.shards.total:,} tokens feed {self.num_steps} steps, "
                f"NUM_ITERATIONS={self.num_iterations}; download more, lower NUM_ITERATIONS, or "
                f"set EPOCHS_OK=1 to start over when they run out"
            )
        last = None
        if self.data_seed is None and self.num_iterations <= self.num_steps:
            last = max(self.starts(max(self.num_iterations - 1, 0))) + self.batch_tokens + 1
        self.shards.check_ids(vocab_size, self.world, last)

    def used_up(self, step: int) -> bool:
        """Whether a step would have to start over, and must not."""
        return step >= self.num_steps and not self.epochs_ok

    @property
    def summary(self) -> str:
        epochs = self.num_iterations / self.epoch_steps
        words = f"{self.shards.total:,} tokens in {len(self.shards.paths)} shard(s)"
        if gaps := self.shards.gaps():
            words += f", whose numbering lacks {gaps}"
        return f"{words}, {epochs:.2f} epochs"


def read_rows(shards: TokenShards, starts: Sequence[int], T: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (rows, T) int32: T tokens from each position, and those behind them."""
    rows = np.empty((len(starts), T + 1), np.int32)
    for row, start in zip(rows, starts, strict=True):
        row[:] = shards.read(start, T + 1)
    tokens = torch.from_numpy(rows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def padded_batches(
    shards: TokenShards, share: slice, T: int, num_rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, (num_rows, T) int64, of the rows `share` of the stream, which is cut into
    rows of T tokens. The last batch is filled up with targets of -1, which are not to count.
    """
    for first in range(share.start, share.stop, num_rows):
        rows = range(first, min(first + num_rows, share.stop))
        x, y = read_rows(shards, [row * T for row in rows], T)
        padded_x = torch.zeros(num_rows, T, dtype=torch.long)
        padded_y = torch.full((num_rows, T), -1)
        padded_x[: len(rows)] = x
        padded_y[: len(rows)] = y
        yield padded_x, padded_y
