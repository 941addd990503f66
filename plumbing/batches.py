"""batches.py -- rows of tokens as tensors, for training and for validation.

Promises: which rows a rank gets depends on its share only, so all ranks together see each row once,
and validation meets the same tokens in one tensor shape, whatever the ranks and micro-batches.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from plumbing.data import TokenShards


def read_rows(shards: TokenShards, starts: Sequence[int], T: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (rows, T) int32: T tokens from each stream position, and the next ones."""
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
