"""text_batches.py -- sequences of a text for training, and what is drawn at random for them.

Promises: the sequences of a step are a function of the step and the batch, never of the number of
ranks or of the micro-batch, and so are the seeds of what is drawn at random for a row.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from plumbing.batches import read_rows
from plumbing.data import TokenShards
from plumbing.knobs import UserError
from plumbing.text_knobs import TextRunKnobs
from plumbing.world import World


class TextBatches:
    """Batches of BATCH_SIZE sequences of SEQUENCE_LENGTH tokens of one text, by step.

    The text is cut into sequences, shuffled anew in each epoch; an epoch is as many whole batches
    as there are. With CARRY_STATE, row b of all batches reads the b-th part of the text from front
    to back instead. Raises UserError when the text is too short.
    """

    def __init__(self, shards: TokenShards, cfg: TextRunKnobs, world: World):
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
        words = f"{self.shards.total:,} tokens of a vocabulary of {self.cfg.vocabulary:,}"
        return f"{words}, {epochs:.2f} epochs of {self.epoch_steps} steps"


def micro_batches(batch: tuple[Tensor, ...], num_rows: int) -> Iterator[tuple[slice, tuple]]:
    """Parts of a batch, `num_rows` rows at a time as int64, and which rows they are."""
    total = len(batch[0])
    for first in range(0, total, num_rows):
        part = slice(first, min(first + num_rows, total))
        yield part, tuple(tensor[part].long() for tensor in batch)


def random_bits(seed_B: Tensor, count: int) -> Tensor:
    """(B, count) random int64, at least 0: a function of a row's seed and the place, on any device.

    SplitMix64 (Steele et al. 2014) over a counter; signed shifts clear the sign. So what is drawn
    for a row does not depend on the rows beside it, and gradient checkpointing draws it again.
    """
    x = torch.arange(count, device=seed_B.device) * -7046029254386353131 + seed_B[:, None]
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)


def dropout_mask(seed_B: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """(B, *shape) bool: True where kept, each with probability 1 - p."""
    bits = random_bits(seed_B, math.prod(shape))
    return (bits >= int(p * 2**63)).view(-1, *shape)
