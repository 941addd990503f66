"""programs_support.py -- what the tests of the proof programs share: tiny models, a text, tables."""

import csv
import dataclasses
from pathlib import Path

import byte_models as lib

from train_scaled import ByteLM

TEXT = ("Bir varmış bir yokmuş, evvel zaman içinde kalbur saman içinde. " * 300).encode()


def tiny(seed: int = 1, **changes: object) -> ByteLM:
    k = dataclasses.replace(lib.read_model_knobs(["n_embd=16", "sliding_window=3"]), **changes)
    model = ByteLM(k)
    model.init_weights(seed)
    return model.eval()


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))
