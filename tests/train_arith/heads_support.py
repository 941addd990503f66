"""heads_support.py -- tiny models and data sets for the programs that look inside a model.

The overfitted model knows 24 minimal pairs by heart: what it gets right and wrong is known.
"""

import csv
import dataclasses
import json
from pathlib import Path

import lib_heads as heads
import numpy as np
import torch
from arith_support import ONE
from lib_heads import Subject
from lib_hooks import hooked
from torch.nn import functional as F

import arithmetic
import train_arith
from plumbing.problems import Problems, inputs_and_labels

SMALL = dict(n_embd=32, n_layer=2, n_head=2, d_ff=32, dropout=0.0, num_iterations=1)
SMALL |= dict(train_path="generate", operators="+-", answer_format="complement", spaces=False)
SMALL |= dict(sequence_length=32, answer_only_loss=True, answer_digits=3)
DIGITS = 3
FIRST, SECOND, THIRD = range(30, 54), [7, 12, 3, 25, 18, 4] * 4, [5, 2, 9, 11, 16, 21, 8, 3] * 3
PAIRS = [(f"{a}-({b}-{c})", f"({a}-{b})-{c}") for a, b, c in zip(FIRST, SECOND, THIRD, strict=True)]
TEXTS = [text for pair in PAIRS for text in pair]


def problems(language: arithmetic.Language, exprs: list[str]) -> Problems:
    values = [arithmetic.evaluate_expr(e) for e in exprs]
    return arithmetic.problems_of(exprs, values, language)


def loud(model: train_arith.CompactTransformer) -> train_arith.CompactTransformer:
    """Untrained weights so large that every head moves the answer."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model.eval()


def subject(**knobs) -> Subject:
    cfg = train_arith.Knobs(**(SMALL | knobs))
    model = train_arith.CompactTransformer(cfg)
    model.init_weights(3)
    language = heads.language_of(cfg, DIGITS)
    return Subject("tiny", Path("tiny.pt"), hooked(loud(model)), cfg, language, ONE)


def overfitted() -> Subject:
    """Knows the answers to TEXTS by heart."""
    s = subject()
    s.model.init_weights(3)
    x, y = inputs_and_labels(problems(s.language, TEXTS), True, len(TEXTS))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    adam = torch.optim.AdamW(s.model.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(400):
        loss = F.cross_entropy(s.model(x).flatten(0, 1), y.flatten(), ignore_index=-100)
        adam.zero_grad()
        loss.backward()
        adam.step()
        if loss < 0.01:
            break
    assert loss < 0.05
    return s


def save(s: Subject, folder: Path) -> str:
    folder.mkdir(parents=True)
    state = dict(model_state_dict=s.model.state_dict(), answer_digits=DIGITS)
    state["train_config"] = dataclasses.asdict(s.cfg)
    torch.save(state, folder / "checkpoint_best.pt")
    return str(folder)


def write(path: Path, exprs: list[str]) -> None:
    value, depth = arithmetic.evaluate_expr, arithmetic.depth_labels
    lines = [dict(expr=e, result=value(e), depth=depth(e)) for e in exprs]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_sets(folder: Path) -> str:
    """The prefix of small sets: what the trained model knows, and deeper expressions."""
    numbers = list(zip(range(20, 40), range(5, 25), strict=True))
    deep = lambda d: [f"{'(' * d}{a}-{b}{')' * (d - 1)}+{a % 7})" for a, b in numbers]
    flat = [e.replace("(", "").replace(")", "") for e in TEXTS[::2]]
    sets = dict(flat=flat, paren=TEXTS, pairs=TEXTS) | {f"depth{d}": deep(d) for d in (3, 4, 5)}
    for name, exprs in sets.items():
        write(folder / f"data/study_test_{name}.jsonl", exprs)
    return str(folder / "data/study")


def table(path: Path) -> list[dict[str, str]]:
    with open(path) as f:
        return list(csv.DictReader(f))


def is_figure(path: Path) -> bool:
    """A PNG with more than one colour, and an SVG beside it."""
    from matplotlib.image import imread

    has_svg = path.with_suffix(".svg").read_text().startswith("<?xml")
    return np.ptp(imread(path)[..., :3]) > 0.5 and has_svg
