"""text_scores.py -- the loss of a text: windows of it, the whole as one stream, and the report.

Promises: every token of a split but the first is scored exactly once, the same for every number of
ranks and of rows at a time. A score is never without the number of tokens, words and bytes that it
stands for.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.data import TokenShards
from plumbing.run_ids import COMPLETE
from plumbing.session import Session
from plumbing.splits import Split
from plumbing.world import World


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


# ----------------------------------------------------------------------------
# Evaluation: model(x_BT, y_BT, state) returns the summed loss of the targets that are not -1, its
# auxiliary loss, and the state behind the last token


def probe_backward(model: nn.Module, rows: int) -> None:
    """Forward and backward pass of a micro-batch of zeros, to measure its memory."""
    device = next(model.parameters()).device
    x_BT = torch.zeros(rows, model.cfg.sequence_length, dtype=torch.long, device=device)
    loss, _, _ = model(x_BT, x_BT)
    loss.backward()


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, T: int, rows: int, world: World, limit: int | None = None
) -> Score:
    """Of windows of T tokens that do not overlap, the first `limit` or all."""
    starts = window_starts(split.shards, T, limit)
    mine = starts[world.share(len(starts))]
    nats = torch.zeros((), device=world.device, dtype=torch.float64)
    model.eval()
    for x_BT, y_BT in window_batches(split.shards, mine, T, rows):
        loss, _, _ = model(x_BT.to(world.device), y_BT.to(world.device))
        nats += loss
    model.train()
    num_scored = min(len(starts) * T, split.shards.total - 1)
    return Score.of(split, world.all_reduce(nats).item(), num_scored)


@torch.no_grad()
def evaluate_stream(model: nn.Module, split: Split, T: int, world: World) -> Score:
    """Of the whole split, read once from front to back, T tokens at a time: every token is
    predicted from all before it, in memory that does not grow. Rank 0 reads.
    """
    shards, device = split.shards, world.device
    starts = window_starts(shards, T) if world.is_main else []
    nats = torch.zeros((), device=device, dtype=torch.float64)
    state = None
    model.eval()
    for start in starts:
        x_T, y_T = read_window(shards, start, T)
        loss, _, state = model(x_T[None].to(device), y_T[None].to(device), state)
        nats += loss
    model.train()
    return Score.of(split, world.all_reduce(nats).item(), shards.total - 1)


# ----------------------------------------------------------------------------
# The report


def log_validation(session: Session, score: Score) -> None:
    """Of windows of SEQUENCE_LENGTH tokens."""
    T = session.cfg.sequence_length
    bits = score.bits_per_byte
    note = f" ppl:{score.ppl:.2f} bits_per_byte:{bits:.4f} window:{T} stride:{T}"
    session.log_validation(session.step_now, score.loss, note, val_bits_per_byte=bits)
    session.row.update(val_ppl=score.ppl, val_bits_per_byte=bits)


def log_final(
    session: Session,
    model: nn.Module,
    splits: dict[str, Split],
    rows: int,
    has_constant_state: bool,
) -> None:
    """The last figures, with FINAL_TEST: the test split in windows and, where the state is
    constant, the validation and the test split as one stream. None of a run that was cut short.
    """
    if not session.cfg.final_test or session.status not in COMPLETE:
        return
    T = session.cfg.sequence_length
    test = evaluate(model, splits["test"], T, rows, session.world)
    session.row.update(test_loss=test.loss, test_ppl=test.ppl, test_word_ppl=test.word_ppl)
    session.row.update(test_bits_per_byte=test.bits_per_byte)
    scores = {f"window:{T} stride:{T} test": test}
    if has_constant_state:
        for part in ("val", "test"):
            stream = evaluate_stream(model, splits[part], T, session.world)
            session.row[f"{part}_stream_loss"] = stream.loss
            scores[f"state carried every {T}, {part}_stream"] = stream
    for name, score in scores.items():
        session.say(
            f"{name}_loss:{score.loss:.4f} nats:{score.nats:.1f} tokens:{score.tokens} "
            f"ppl:{score.ppl:.3f} word_ppl:{score.word_ppl:.3f} "
            f"bits_per_byte:{score.bits_per_byte:.4f}"
        )
