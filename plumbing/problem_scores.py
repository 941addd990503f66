"""problem_scores.py -- the table of what a model did with each problem, and the means over it.

Promises: what is reported of a validation, of a test set and by the programs of scripts/arith/ are
the same figures of the same table. A mean is over problems where it says so, else over tokens.

Shapes   N problems
"""

import numpy as np

from plumbing.epochs import perplexity

# Columns of the table: losses in nats, numbers of tokens, and whether the end and all of the answer
# are right.
SCORES = "loss tokens answer_loss answer_tokens digits_ok end_ok exact".split()


def summary(table: np.ndarray) -> dict[str, float]:
    """Means over a score table, (N, SCORES). eos_after_gold is the original's "accuracy": whether
    the end is predicted after the whole gold answer was read. A model that always says "end" has 1.
    digit_accuracy counts all tokens of the answer, the sign among them, given the gold ones."""
    s = dict(zip(SCORES, table.sum(0).tolist(), strict=True))
    n, loss = len(table), s["loss"] / s["tokens"]
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "exact_match": s["exact"] / n,
        "eos_after_gold": s["end_ok"] / n,
        "digit_accuracy": s["digits_ok"] / s["answer_tokens"],
        "answer_loss": s["answer_loss"] / s["answer_tokens"],
    }
