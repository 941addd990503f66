"""text_batches.py -- sequences of a text for training, windows of it for evaluation, and scores.

Promises: the sequences of a step are a function of the step and the batch, never of the number of
ranks or of the micro-batch, and so are the seeds of what is drawn at random for a row. Evaluation
scores every token of a split but the first exactly once. A score is never without the number of
tokens, words and bytes that it stands for.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing.batches import read_rows
from plumbing.data import TokenShards
from plumbing.knobs import UserError
from plumbing.splits import Split
from plumbing.world import World


class TextKnobs(Protocol):
    """The knobs that TextBatches reads."""

    batch_size: int  # sequences, over all ranks
    sequence_length: int
    num_iterations: int | None
    num_epochs: int
    max_train_samples: int | None
    carry_state: bool
    seed: int


class TextBatches:
    """Batches of BATCH_SIZE sequences of SEQUENCE_LENGTH tokens of one text, by step.

    The text is cut into sequences, shuffled anew in each epoch; an epoch is as many whole batches
    as there are. With CARRY_STATE, row b of all batches reads the b-th part of the text from front
    to back instead. Raises UserError when the text is too short.
    """

    def __init__(self, shards: TokenShards, cfg: TextKnobs, world: World):
        self.shards, self.cfg, self.world = shards, cfg, world
        self.sequences = (shards.total - 1) // cfg.sequence_length
        if cfg.max_train_samples is not None:
            self.sequences = min(self.sequences, cfg.max_train_samples)
        self.epoch_steps = self.sequences // cfg.batch_size
        if self.epoch_steps < 1:
            raise UserError(
                f"{shards.pattern}: {self.sequences} sequences of {cfg.sequence_length} tokens, "
                f"BATCH_SIZE={cfg.batch_size} needs as many; lower one of the two, raise "
                f"MAX_TRAIN_SAMPLES, or use a longer text"
            )
        self.total_steps = cfg.num_iterations
        if self.total_steps is None:
            self.total_steps = self.epoch_steps * cfg.num_epochs
        self.batch_tokens = cfg.batch_size * cfg.sequence_length
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.cfg.seed, epoch]).permutation(self.sequences)

    def starts(self, step: int) -> list[int]:
        """Stream positions at which this rank's sequences of the step begin."""
        epoch, i = divmod(step, self.epoch_steps)
        B = self.cfg.batch_size
        rows = range(B)[self.world.share(B)]
        if self.cfg.carry_state:
            places = [row * self.epoch_steps + i for row in rows]
        else:
            places = [int(self.order(epoch)[i * B + row]) for row in rows]
        return [place * self.cfg.sequence_length for place in places]

    def row_seeds(self, step: int) -> Tensor:
        """(rows,) int64: what is drawn at random for a row is a function of seed, step and row."""
        B = self.cfg.batch_size
        seeds = np.random.default_rng([self.cfg.seed, step, 1]).integers(2**63, size=B)
        return torch.from_numpy(seeds[self.world.share(B)])

    def make(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's inputs and targets of the step, (rows, T) int32, and the rows' seeds."""
        x_BT, y_BT = read_rows(self.shards, self.starts(step), self.cfg.sequence_length)
        return x_BT, y_BT, self.row_seeds(step)

    @property
    def summary(self) -> str:
        epochs = self.total_steps / self.epoch_steps
        words = f"{self.shards.total:,} tokens, {epochs:.2f} epochs"
        return f"{words} of {self.epoch_steps} steps"


# ----------------------------------------------------------------------------
# Evaluation


def read_window(shards: TokenShards, start: int, T: int) -> tuple[Tensor, Tensor]:
    """T inputs and targets from `start` on; behind the end of the text, targets of -1, which are
    not to count.
    """
    tokens = shards.read(start, min(T + 1, shards.total - start)).astype(np.int64)
    missing = T + 1 - len(tokens)
    x_T, y_T = torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:])
    return F.pad(x_T, (0, missing)), F.pad(y_T, (0, missing), value=-1)


def window_starts(shards: TokenShards, T: int, limit: int | None = None) -> range:
    """Where the first `limit` windows of T tokens begin, which do not overlap; None for all."""
    return range(0, shards.total - 1, T)[:limit]


def window_batches(
    shards: TokenShards, starts: Sequence[int], T: int, num_rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, (num_rows, T) int64, of windows; the last batch is filled up with rows
    that do not count, so that a model meets one shape.
    """
    nothing = torch.zeros(T, dtype=torch.long), torch.full((T,), -1)
    for first in range(0, len(starts), num_rows):
        windows = [read_window(shards, start, T) for start in starts[first : first + num_rows]]
        windows += [nothing] * (num_rows - len(windows))
        yield torch.stack([x for x, _ in windows]), torch.stack([y for _, y in windows])


@dataclass(frozen=True)
class Score:
    """Summed loss of a text in nats, over `tokens` scored targets, which stand for so many words
    and bytes.
    """

    nats: float
    tokens: int
    words: float
    bytes: float

    @classmethod
    def of(cls, split: Split, nats: float, tokens: int) -> "Score":
        """Words and bytes in proportion to the share of the split's tokens that is scored."""
        share = tokens / split.shards.total
        return cls(nats, tokens, split.words * share, split.bytes * share)

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def ppl(self) -> float:
        return math.exp(min(self.loss, 700))

    @property
    def word_ppl(self) -> float:
        return math.exp(min(self.nats / self.words, 700))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes
