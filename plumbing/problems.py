"""problems.py -- problems with answers as tables of tokens, and what of them is scored.

Promises: a problem's tokens, its length and the place of its answer agree, whatever was put
together, and inputs and labels are cut from them in one way, for training and for scoring. It needs
no torch, so that programs which only make data start at once.

Shapes   N problems, T tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PAD, BOS, EOS = 0, 1, 2  # ids beside those of a language's characters
HOLE = -1  # in place of an id: no token stands here; `packed` closes it
IGNORE = -100  # label of a token that is not scored
GENERATE = "generate"  # instead of a file's name: problems are drawn
# Second seeds, by what is drawn: no two of these share their random numbers.
ORDER_TAG, BATCH_TAG, SET_TAG, SAMPLE_TAG = 1, 2, 3, 4


@dataclass(frozen=True)
class Problems:
    """N sequences: BOS, what is asked, its answer, EOS, then PAD."""

    tokens_NT: np.ndarray  # uint8
    lengths_N: np.ndarray  # tokens from BOS to EOS
    starts_N: np.ndarray  # position of the answer's first token
    values_N: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.lengths_N)

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        return self.tokens_NT, self.lengths_N, self.starts_N, self.values_N

    def rows(self, index: np.ndarray | slice) -> "Problems":
        return Problems(*(column[index] for column in self.columns))

    @classmethod
    def joined(cls, parts: Sequence["Problems"]) -> "Problems":
        """One table of several that are equally wide."""
        columns = zip(*(part.columns for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))

    @classmethod
    def packed(cls, questions: np.ndarray, answers: np.ndarray, values_N: np.ndarray) -> "Problems":
        """From ids with holes: of what stands before the answers, BOS included, and of the answers
        without EOS."""
        ends = np.full((len(questions), 1), EOS)
        wide = np.concatenate([questions, answers, ends], 1)
        so_far = (wide >= 0).cumsum(1)  # how many tokens there are up to every column
        rows, columns = np.nonzero(wide >= 0)
        tokens_NT = np.zeros(wide.shape, np.uint8)
        tokens_NT[rows, so_far[rows, columns] - 1] = wide[rows, columns]
        return cls(tokens_NT, so_far[:, -1], so_far[:, questions.shape[1] - 1], values_N)


def inputs_and_labels(
    problems: Problems, answer_only: bool, rows: int, length: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, T) ids and labels, T the longest or `length`; IGNORE is the label of what is not
    scored, and of rows beyond the problems."""
    T = length or int(problems.lengths_N.max())
    tokens = problems.tokens_NT[:, :T]
    ids = np.zeros((rows, T), np.int64)
    ids[:, 0] = BOS
    ids[: len(problems), : tokens.shape[1]] = tokens
    at = np.arange(1, T)
    is_scored = at < problems.lengths_N[:, None]
    if answer_only:
        is_scored &= at >= problems.starts_N[:, None]
    labels = np.full((rows, T - 1), IGNORE)
    labels[: len(problems)] = np.where(is_scored, ids[: len(problems), 1:], IGNORE)
    return ids[:, :-1], labels
