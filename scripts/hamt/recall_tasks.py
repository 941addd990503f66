"""recall_tasks.py -- shared by the programs that test a memory: recall tasks made on the spot,
and how they are scored.

    mqar     multi-query associative recall: pairs of a key and a value, then queries among filler,
             each of which asks for the value of a key (Arora et al., Zoology, arXiv 2312.04927)
    rewrite  the same, but every key is written twice, and its last value counts
    two_hops the same, but a key leads to another key, and that one to the value
    copy     a random text somewhere in filler, then a sign and the text again, one symbol ahead
    needle   pairs hidden in filler at random places, asked for at the end

Shapes   B sequences, T tokens, P pairs. A task's x_BT is what a model reads, y_BT the answer
         expected at that token, -1 where nothing is asked; distance_BT is how many tokens before
         the query the answer stands, 0 where nothing is asked
Units    distances in tokens; intervals are 95%
Raises   ValueError when a task does not fit into its sequence or its alphabet
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Z = 1.959964  # of a two-sided 95% interval


@dataclass(frozen=True)
class Alphabet:
    """Token ids of a task: keys from 0, then values, then filler, then the sign that asks for a
    copy."""

    keys: int = 64
    values: int = 64
    fillers: int = 16

    @property
    def size(self) -> int:
        return self.keys + self.values + self.fillers + 1

    @property
    def sign(self) -> int:
        return self.size - 1

    def draw_values(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        return self.keys + rng.integers(self.values, size=shape)

    def draw_fillers(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        return self.keys + self.values + rng.integers(self.fillers, size=shape)

    def draw_pairs(
        self, rng: np.random.Generator, B: int, pairs: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys (B, pairs), all different within a sequence, and values, which need not be."""
        if pairs > self.keys:
            raise ValueError(f"{pairs} pairs need as many keys, the alphabet has {self.keys}")
        return rng.random((B, self.keys)).argsort(1)[:, :pairs], self.draw_values(rng, B, pairs)


@dataclass(frozen=True)
class Sequences:
    """A batch of a task; see the module's Shapes."""

    x_BT: np.ndarray
    y_BT: np.ndarray
    distance_BT: np.ndarray


def blank(x_BT: np.ndarray) -> Sequences:
    """These tokens, with nothing asked."""
    return Sequences(x_BT, np.full_like(x_BT, -1), np.zeros_like(x_BT))


def ask(s: Sequences, query_BN: np.ndarray, answer_BN: np.ndarray, tokens_BN: np.ndarray) -> None:
    """At places `query_BN` read these tokens and expect what stands at places `answer_BN`."""
    rows = np.arange(len(s.x_BT))[:, None]
    s.x_BT[rows, query_BN] = tokens_BN
    s.y_BT[rows, query_BN] = s.x_BT[rows, answer_BN]
    s.distance_BT[rows, query_BN] = query_BN - answer_BN


def ask_keys(
    rng: np.random.Generator,
    s: Sequences,
    start: int,
    keys_BP: np.ndarray,
    answers_BP: np.ndarray,
    density: float | None,
) -> None:
    """From token `start` on ask for these keys, whose answers stand at places `answers_BP`.
    `density` None asks each key once, at random places; else each token is a query with that
    probability, for a key drawn anew.
    """
    B, T = s.x_BT.shape
    pairs = keys_BP.shape[1]
    if T - start < pairs:
        raise ValueError(
            f"{start} tokens of pairs and {pairs} queries need {start + pairs} tokens, the "
            f"sequence has {T}"
        )
    if density is None:
        places = start + rng.random((B, T - start)).argsort(1)[:, :pairs]
        ask(s, places, answers_BP, keys_BP)
        return
    rows, places = np.nonzero(rng.random((B, T - start)) < density)
    which = rng.integers(pairs, size=len(rows))
    places, answers = places + start, answers_BP[rows, which]
    s.x_BT[rows, places] = keys_BP[rows, which]
    s.y_BT[rows, places] = s.x_BT[rows, answers]
    s.distance_BT[rows, places] = places - answers


def mqar(
    rng: np.random.Generator, B: int, T: int, a: Alphabet, pairs: int, density: float | None = None
) -> Sequences:
    """k v k v ... and then, among filler, queries. An answer is never shown after its pair."""
    s = blank(a.draw_fillers(rng, B, T))
    keys, values = a.draw_pairs(rng, B, pairs)
    start = min(2 * pairs, T)
    s.x_BT[:, 0:start:2] = keys[:, : -(-start // 2)]
    s.x_BT[:, 1:start:2] = values[:, : start // 2]
    answers = np.broadcast_to(2 * np.arange(pairs) + 1, (B, pairs))
    ask_keys(rng, s, 2 * pairs, keys, answers, density)
    return s


def rewrite(
    rng: np.random.Generator, B: int, T: int, a: Alphabet, pairs: int, density: float | None = None
) -> Sequences:
    """As mqar, but each key is written twice, in random order, with two different values: the last
    value counts, so that a memory has to forget the first.
    """
    start, rows = 4 * pairs, np.arange(B)[:, None]
    s = blank(a.draw_fillers(rng, B, max(T, start)))
    keys, first = a.draw_pairs(rng, B, pairs)
    other = (first - a.keys + rng.integers(1, a.values, size=first.shape)) % a.values + a.keys
    order = rng.random((B, 2 * pairs)).argsort(1)  # the place of each write, among the pairs
    earlier = np.minimum(order[:, :pairs], order[:, pairs:])
    later = np.maximum(order[:, :pairs], order[:, pairs:])
    for place, value in ((earlier, first), (later, other)):
        s.x_BT[rows, 2 * place], s.x_BT[rows, 2 * place + 1] = keys, value
    s = Sequences(s.x_BT[:, :T], s.y_BT[:, :T], s.distance_BT[:, :T])
    ask_keys(rng, s, start, keys, 2 * later + 1, density)
    return s


def two_hops(
    rng: np.random.Generator, B: int, T: int, a: Alphabet, pairs: int, density: float | None = None
) -> Sequences:
    """Pairs of a key and another key, and of that other key and a value, in random order. Asked
    for the first key the answer is the value, which takes two reads, one after the other.
    """
    start, rows = 4 * pairs, np.arange(B)[:, None]
    s = blank(a.draw_fillers(rng, B, max(T, start)))
    keys, values = a.draw_pairs(rng, B, 2 * pairs)
    first, second, value = keys[:, :pairs], keys[:, pairs:], values[:, :pairs]
    order = rng.random((B, 2 * pairs)).argsort(1)
    for place, left, right in (
        (order[:, :pairs], first, second),
        (order[:, pairs:], second, value),
    ):
        s.x_BT[rows, 2 * place], s.x_BT[rows, 2 * place + 1] = left, right
    s = Sequences(s.x_BT[:, :T], s.y_BT[:, :T], s.distance_BT[:, :T])
    ask_keys(rng, s, start, first, 2 * order[:, pairs:] + 1, density)
    return s


def copy(
    rng: np.random.Generator, B: int, T: int, a: Alphabet, symbols: int, distance: int | None = None
) -> Sequences:
    """A text of `symbols` values somewhere in filler; the last tokens are the sign and the text
    again, each symbol
    asked for at the token before it. All distances of a sequence are equal: drawn, or
    `distance`."""
    if (
        symbols < 1
        or T < 2 * symbols
        or (distance is not None and not symbols <= distance <= T - symbols)
    ):
        what = (
            "" if distance is None else f" at distance {distance} (from {symbols} to {T - symbols})"
        )
        raise ValueError(f"a copy of {symbols} symbols{what} does not fit into {T} tokens")
    s = blank(a.draw_fillers(rng, B, T))
    text, at = a.draw_values(rng, B, symbols), np.arange(symbols)
    start = (
        rng.integers(T - 2 * symbols + 1, size=(B, 1))
        if distance is None
        else T - symbols - distance
    )
    answers = np.broadcast_to(start + at, text.shape)
    s.x_BT[np.arange(B)[:, None], answers] = text
    shown = np.concatenate([np.full((B, 1), a.sign), text[:, :-1]], axis=1)
    ask(s, np.broadcast_to(T - symbols + at, text.shape), answers, shown)
    return s


def needle(
    rng: np.random.Generator,
    B: int,
    T: int,
    a: Alphabet,
    pairs: int = 1,
    distance: int | None = None,
) -> Sequences:
    """Pairs at random places in filler. All are asked for at the end, in random order; with a
    `distance` only one is,
    by the last token, and its value stands that many tokens before."""
    asked = pairs if distance is None else 1
    odd = (
        int(rng.integers(2)) if distance is None else (T - 2 - distance) % 2
    )  # where the first key may stand
    slots = (T - asked - odd) // 2
    if slots < pairs or (distance is not None and not 1 <= distance <= T - 2):
        what = "" if distance is None else f" at distance {distance}"
        raise ValueError(f"{pairs} pair(s){what} and {asked} queries do not fit into {T} tokens")
    s = blank(a.draw_fillers(rng, B, T))
    keys, values = a.draw_pairs(rng, B, pairs)
    order = rng.random((B, slots))
    if distance is not None:
        order[
            :, (T - 2 - distance - odd) // 2
        ] = -1  # argsort puts it first, which is the pair that is asked for
    places = odd + 2 * order.argsort(1)[:, :pairs]
    rows = np.arange(B)[:, None]
    s.x_BT[rows, places], s.x_BT[rows, places + 1] = keys, values
    which = rng.random((B, pairs)).argsort(1) if distance is None else np.zeros((B, 1), int)
    queries = np.broadcast_to(T - asked + np.arange(asked), which.shape)
    ask(s, queries, np.take_along_axis(places, which, 1) + 1, np.take_along_axis(keys, which, 1))
    return s


TASKS: dict[str, Callable[..., Sequences]] = dict(
    mqar=mqar, rewrite=rewrite, two_hops=two_hops, copy=copy, needle=needle
)
DENSE = ("mqar", "rewrite", "two_hops")  # that may ask at any token behind their pairs


# ----------------------------------------------------------------------------
# Scores


def chance(a: Alphabet) -> float:
    """Accuracy of one who knows the set of all values, and nothing of this sequence. Who knows
    the values of the
    sequence but not which belongs to which key reaches about 1 / pairs: that is reading, and not
    yet recall."""
    return 1 / a.values


def wilson(right: float, n: float) -> tuple[float, float]:
    """95% interval of a share, right / n (Wilson 1927); (0, 1) of nothing. Unlike the usual one
    it is not empty where
    all are right."""
    if n <= 0:
        return 0.0, 1.0
    p, z2 = right / n, Z * Z
    middle, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, min(p, (middle - half) / (1 + z2 / n))), min(
        1.0, max(p, (middle + half) / (1 + z2 / n))
    )


def accuracy(right_B: np.ndarray, asked_B: np.ndarray) -> dict[str, float]:
    """Share of right answers over sequences with so many right of so many asked, and its 95%
    interval: Wilson's, with
    n divided by the design effect, because the answers within a sequence are not independent
    (Rao and Scott 1992)."""
    right_B, asked_B = right_B[asked_B > 0].astype(float), asked_B[asked_B > 0].astype(float)
    n, B = asked_B.sum(), len(asked_B)
    if not B:
        return dict(accuracy=math.nan, low=0.0, high=1.0, queries=0, sequences=0)
    p = right_B.sum() / n
    effect = 1.0
    if B > 1 and 0 < p < 1:
        between = np.square(right_B - p * asked_B).sum() * B / (B - 1) / n**2
        effect = max(1.0, between / (p * (1 - p) / n))
    low, high = wilson(right_B.sum() / effect, n / effect)
    return dict(accuracy=p, low=low, high=high, queries=int(n), sequences=B)


def score(
    s: Sequences, answer_BT: np.ndarray, low: float = 0, high: float = math.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Right answers and questions of each sequence, (B,) each, of questions with low <= distance
    < high."""
    asked = (s.y_BT >= 0) & (s.distance_BT >= low) & (s.distance_BT < high)
    return ((answer_BT == s.y_BT) & asked).sum(1), asked.sum(1)
