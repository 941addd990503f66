"""histories.py -- which bytes followed the last few bytes of a text: train_scaled.py's data module.

For each of some lengths n there is a table of constant size. A hash of the last n bytes names its
row, which holds one history and its last two entries: the bytes that followed it last, with their
times. Another history that falls into the row replaces it. Nothing here is learned.

Promises: a whole row of text is looked up at once, by one sort, and exactly as it would be byte by
byte, whatever the cuts; and a table stays as large as it is.

Shapes   B rows, T bytes, G lengths, P bytes of a history at the most
"""

import torch
from torch import Tensor, nn

BYTES = 256  # values of a byte

Tables = tuple[Tensor, ...]  # histories (B, G, rows + 1), their entries (B, G, rows + 1, 2)


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

    An entry is 256 times its time plus the byte. Times begin at 1, so that an entry below 256 is
    none. Each table has one row more than it uses, for the writes that do not last.
    """

    def __init__(self, lengths: tuple[int, ...], rows: int):
        super().__init__()
        self.rows, self.longest, self.num_lengths = rows, max(lengths), len(lengths)
        self.hash = SuffixHash(lengths, self.longest)

    def empty(self, B: int) -> Tables:
        shape = (B, self.num_lengths, self.rows + 1)
        return self.hash.powers.new_zeros(shape), self.hash.powers.new_zeros((*shape, 2))

    def read(self, text: Tensor, first: Tensor, tables: Tables) -> tuple[Tensor, Tables]:
        """For each of the T bytes of text (B, longest + T) behind the first `longest`, which are at
        times first, first + 1, ...: the last two entries (B, T, G, 2) of the histories before it;
        and what to write.

        Sorted by row, then by time, what stands before in the same row came before.
        """
        T = text.size(1) - self.longest
        i = torch.arange(T, device=text.device)
        history = self.hash(text[:, :-1].unfold(1, self.longest, 1)).mT  # (B, G, T)
        row, order = torch.sort(history % self.rows, stable=True)
        history = history.gather(2, order)
        entry = (first + i) * BYTES + text[:, None, self.longest :]
        entry = entry.expand_as(order).gather(2, order)

        # A row is one stretch of the sorted bytes, and within it each history one or more runs.
        row_start = torch.where((row != row.roll(1, -1)) | (i == 0), i, 0).cummax(-1).values
        new_run = (history != history.roll(1, -1)) | (i == row_start)
        run_start = torch.where(new_run, i, 0).cummax(-1).values
        at = row[..., None].expand(*row.shape, 2)
        known = (tables[0].gather(2, row) == history) & (run_start == row_start)
        old = torch.where(known[..., None], tables[1].gather(2, at), 0)
        met = (i - run_start)[..., None]  # how often the history came before in this run
        recent = torch.stack([entry.roll(1, -1), entry.roll(2, -1)], -1)
        once = torch.stack([recent[..., 0], old[..., 0]], -1)
        found = torch.where(met == 0, old, torch.where(met == 1, once, recent))

        lasts = (row != row.roll(-1, -1)) | (i == T - 1)  # only a row's last entry stays
        place = torch.where(lasts, row, self.rows)
        writes = place, history, torch.stack([entry, found[..., 0]], -1)
        back = order.argsort(-1)[..., None].expand_as(at)
        return found.gather(2, back).transpose(1, 2), writes

    def write(self, tables: Tables, writes: Tables) -> None:
        """Into the tables themselves."""
        place, history, entries = writes
        tables[0].scatter_(2, place, history)[:, :, -1] = 0
        at = place[..., None].expand_as(entries)
        tables[1].scatter_(2, at, entries)[:, :, -1] = 0
