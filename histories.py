"""histories.py -- which bytes followed the last few bytes of a text: train_scaled.py's data module.

For each of some lengths n there is a table of constant size. A history is the last n bytes. Its
hash names a row and is kept there, with the last eight bytes that followed it and the time of the
newest. Another history in that row replaces all three. Nothing here is learned.

Promises: all T bytes are looked up by one sort, exactly as one by one, however the text is cut; and
a table never grows.

Shapes   B rows, T bytes, G lengths, K followers of a history, P bytes of a history at the most
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256  # values of a byte
HISTORIES = (2, 3, 4, 5, 6, 8, 12, 16, 24)  # bytes of a history; others need new weights
LONGEST = max(HISTORIES)
FOLLOWERS = 8  # bytes that a table keeps of each history
AGES = 20  # classes of a follower's age: 1 byte, 2 to 3, 4 to 7, ..., 2^19 and more

# Histories and times (B, G, rows + 1), followers (B, G, rows + 1, K)
Tables = tuple[Tensor, Tensor, Tensor]


class SuffixHash(nn.Module):
    """31-bit hashes (.., G) of the last n bytes of x (.., P), for each of G lengths n <= P."""

    PRIME = 2**31 - 1

    def __init__(self, lengths: tuple[int, ...], P: int):
        super().__init__()
        self.lengths = lengths
        powers = [pow(1_000_003, P - i, self.PRIME) for i in range(P)]  # sums stay below 2^45
        self.register_buffer("powers", torch.tensor(powers), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weighted = (x + 1) * self.powers
        return torch.stack([weighted[..., -n:].sum(-1) % self.PRIME for n in self.lengths], -1)


class HistoryTables(nn.Module):
    """The tables' rules. The tables themselves are a state that the caller keeps for each text.

    A follower is a byte plus 1, so that 0 is none; the newest of a history stands first. Bytes at
    times below 1 are not kept as followers. Each table has one row more than it uses, for the
    writes that do not last.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows
        self.hash = SuffixHash(HISTORIES, LONGEST)

    def empty(self, B: int) -> Tables:
        shape = (B, len(HISTORIES), self.rows + 1)
        new = self.hash.powers.new_zeros
        return new(shape), new(shape), new((*shape, FOLLOWERS), dtype=torch.int16)

    def read(
        self, text: Tensor, first: Tensor, tables: Tables
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """For each of the T bytes of text (B, LONGEST + T) behind the first LONGEST, which are at
        times first, first + 1, ...: the followers (B, T, G, K) of the histories before it, the
        ages (B, T, G) of the newest of them, in bytes, and what to write.

        Sorted by row, then by time, what stands before in the same row came before.
        """
        T = text.size(1) - LONGEST
        i = torch.arange(T, device=text.device)
        history = self.hash(text[:, :-1].unfold(1, LONGEST, 1)).mT  # (B, G, T)
        row, order = torch.sort(history % self.rows, stable=True)
        history = history.gather(2, order)
        time = first + order
        byte = text[:, None, LONGEST:].expand_as(order).gather(2, order)
        follower = torch.where(time >= 1, byte + 1, 0).to(torch.int16)

        # A row is one stretch of the sorted bytes, and within it each history one or more runs.
        row_start = torch.where((row != row.roll(1, -1)) | (i == 0), i, 0).cummax(-1).values
        new_run = (history != history.roll(1, -1)) | (i == row_start)
        run_start = torch.where(new_run, i, 0).cummax(-1).values
        met = i - run_start  # how often the history came before in this run

        known = (tables[0].gather(2, row) == history) & (run_start == row_start)
        at = row[..., None].expand(*row.shape, FOLLOWERS)
        old = torch.where(known[..., None], tables[2].gather(2, at), 0)
        # The newest of this run, and behind them as many of those from before it as have a place.
        newest_first = F.pad(follower, (FOLLOWERS, 0)).unfold(2, FOLLOWERS, 1)[:, :, :T].flip(-1)
        behind = torch.arange(FOLLOWERS, device=text.device) - met[..., None]
        found = torch.where(behind < 0, newest_first, old.gather(3, behind.clamp(min=0)))
        newest = torch.where(met == 0, tables[1].gather(2, row), time.roll(1, -1))

        lasts = (row != row.roll(-1, -1)) | (i == T - 1)  # only a row's last history stays
        place = torch.where(lasts, row, self.rows)
        kept = torch.cat([follower[..., None], found[..., :-1]], -1)
        back = order.argsort(-1)
        found = found.gather(2, back[..., None].expand_as(found)).transpose(1, 2)
        age = (first + i)[:, None] - newest.gather(2, back).mT
        return found, age, (place, history, time, kept)

    def count(self, followers: Tensor) -> tuple[Tensor, Tensor]:
        """How many followers there are of each history's (.., K), and how many different ones."""
        is_found = followers > 0
        is_newer = torch.ones(FOLLOWERS, FOLLOWERS, dtype=torch.bool, device=followers.device)
        is_same = followers[..., :, None] == followers[..., None, :]
        is_repeated = (is_same & is_newer.tril(-1)).any(-1)
        return is_found.sum(-1), (is_found & ~is_repeated).sum(-1)

    def age_class(self, age: Tensor) -> Tensor:
        """0 to AGES - 1, of ages in bytes."""
        return age.clamp(min=1).float().log2().long().clamp(max=AGES - 1)

    def write(self, tables: Tables, writes: tuple[Tensor, ...]) -> None:
        """Into the tables themselves."""
        place, history, time, kept = writes
        tables[0].scatter_(2, place, history)[:, :, -1] = 0
        tables[1].scatter_(2, place, time)[:, :, -1] = 0
        at = place[..., None].expand_as(kept)
        tables[2].scatter_(2, at, kept)[:, :, -1] = 0
