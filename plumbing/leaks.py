"""leaks.py -- text that is training data too is no validation or test.

Promises that a file which two parts of the data share, by whatever path or as a copy, is refused by
name before training, because a score on it would measure memory.
"""

import os
from collections.abc import Mapping, Sequence

from plumbing.data import TokenShards
from plumbing.knobs import UserError
from plumbing.plain_text import read_text

PARTS = {"train": "training", "val": "validation", "test": "test"}
SHORTEST_COPY = 100  # characters; less may stand in another text by chance


def check_disjoint(train: TokenShards, val: TokenShards) -> None:
    """Refuse, by name, a file that is in both training and validation data: the same file by
    whatever path, or another one with the same content (as TokenShards.content sees it)."""
    real_paths = {os.path.realpath(path) for path in train.paths}
    by_sample = {facts[-1]: path for path, facts in zip(train.paths, train.content, strict=True)}
    for path, facts in zip(val.paths, val.content, strict=True):
        if os.path.realpath(path) in real_paths:
            what = "is"
        elif facts[-1] in by_sample:
            what = f"is a copy of {by_sample[facts[-1]]}, which is"
        else:
            continue
        raise UserError(
            f"{path}: {what} training data too, so a validation on it would measure memory; narrow "
            f"the pattern of the training shards ({train.pattern}) or choose other validation data"
        )


def check_texts_disjoint(files: Mapping[str, Sequence[str]], texts: Mapping[str, str]) -> None:
    """Refuse, by name, a validation or test file whose text stands in the text of another part,
    also as a piece of a longer file. Two files of one part may be alike.
    """
    for part in ("val", "test"):
        for path in files[part]:
            text = read_text(path).strip()
            for other in PARTS:
                if other == part or len(text) < SHORTEST_COPY or text not in texts[other]:
                    continue
                others = ", ".join(files[other][:3])
                raise UserError(
                    f"{path}: its text is {PARTS[other]} data too (in {others}), so it is no "
                    f"{PARTS[part]} data; take it out of one of the two"
                )
