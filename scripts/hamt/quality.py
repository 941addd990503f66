"""quality.py -- the loss of a text under a model, by token, word and byte.

All models are scored on all of their own tokens but the first.
"""

import argparse
import contextlib
from pathlib import Path

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import numpy as np
import torch
import torch.nn.functional as F
from subjects import Ours, Subject

import train_gpu
from plumbing import UserError
from plumbing.splits import open_splits
from plumbing.text_scores import Score

PRECISIONS = dict(fp32=torch.float32, bf16=torch.bfloat16)
FEED = 1024  # tokens that go into a carried state at a time


def windows(total: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, inputs, scored) of the windows that score each of `total - 1` targets once: the first
    window all of its targets, each later one its last `stride`, behind the rest as context.
    """
    found, end = [], 0
    while end < total - 1:
        step = min(window if end == 0 else stride, total - 1 - end)
        start = max(0, end - (window - stride))
        found.append((start, end + step - start, step))
        end += step
    return found


def raw_text(k: train_gpu.Knobs, split: str, max_samples: int | None) -> tuple[str, int]:
    """The text of a split, as every tokenizer gets it, and its words, counted as WikiText's
    tables do (with line ends).
    At most so many lines that are not empty, so that all models still read the same text."""
    shards = open_splits(k.data, "bytes", Path(k.data_folder))[split].shards
    text = shards.read(0, shards.total).astype(np.uint8).tobytes().decode("utf-8", "replace")
    if max_samples is not None:
        lines, left = text.splitlines(keepends=True), max_samples
        for i, line in enumerate(lines):
            left -= bool(line.strip())
            if left < 0:
                text = "".join(lines[:i])
                break
    return text, len(text.split()) + text.count("\n")


def autocast(subject: Subject, precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast(
        subject.device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32"
    )


@torch.inference_mode()
def window_nats(
    subject: Subject,
    tokens: np.ndarray,
    window: int,
    stride: int,
    micro: int,
    precision: str = "fp32",
) -> float:
    """Summed loss of all tokens but the first, in train_gpu.py's own windows; short ones are
    filled up behind, where a
    causal model cannot look and nothing is scored."""
    plan, total = windows(len(tokens), window, stride), 0.0
    for at in range(0, len(plan), micro):
        rows = plan[at : at + micro]
        x, y = np.zeros((len(rows), window), np.int64), np.full((len(rows), window), -1, np.int64)
        for row, (start, inputs, scored) in enumerate(rows):
            x[row, :inputs] = tokens[start : start + inputs]
            y[row, inputs - scored : inputs] = tokens[
                start + inputs - scored + 1 : start + inputs + 1
            ]
        x_BT, y_BT = (torch.from_numpy(t).to(subject.device) for t in (x, y))
        with autocast(subject, precision):
            logits = subject.logits(x_BT)
        nats = F.cross_entropy(
            logits.flatten(0, 1).float(), y_BT.flatten(), ignore_index=-1, reduction="none"
        )
        total += nats.double().sum().item()
    return total


@torch.inference_mode()
def stream_nats(ours: Ours, tokens: np.ndarray, precision: str = "fp32") -> float:
    """The same, read once from front to back with the state carried on."""
    total, state = 0.0, ours.model.empty_state(1)
    for at in range(0, len(tokens) - 1, FEED):
        part = torch.from_numpy(tokens[at : at + FEED + 1].astype(np.int64)).to(ours.device)
        part = part[: min(FEED, len(tokens) - 1 - at) + 1]
        with autocast(ours, precision):
            h_BTC, state, _ = ours.model.hidden(part[None, :-1], state)
            logits = ours.model.head(h_BTC)
        total += (
            F.cross_entropy(logits[0].float(), part[1:], reduction="none").double().sum().item()
        )
    return total


def scored(nats: float, tokens: int, words: int, n_bytes: int) -> Score:
    """Of a text of so many tokens, the first of which is not scored; words and bytes in that
    proportion."""
    share = (tokens - 1) / tokens
    return Score(nats, tokens - 1, words * share, n_bytes * share)


def quality(
    subject: Subject, text: str, words: int, a: argparse.Namespace, window: int, stride: int
) -> dict:
    """A row of quality.csv."""
    tokens, n_bytes = subject.encode(text), len(text.encode())
    if len(tokens) < 2:
        raise UserError(
            f"--dataset {a.dataset}: {len(tokens)} token(s) of text; 2 are needed to score one"
        )
    if tokens.max() >= subject.vocabulary:
        raise UserError(
            f"token {tokens.max()} of the text is outside a vocabulary of {subject.vocabulary}"
        )
    nats = window_nats(subject, tokens, window, stride, a.batch_size, a.precision)
    found = scored(nats, len(tokens), words, n_bytes)
    row = dict(
        window=window, stride=stride, nats=nats, tokens=found.tokens, words=words, bytes=n_bytes
    )
    row |= dict(
        loss=found.loss, ppl=found.ppl, word_ppl=found.word_ppl, bits_per_byte=found.bits_per_byte
    )
    if subject.streams:
        found = scored(stream_nats(subject, tokens, a.precision), len(tokens), words, n_bytes)
        row |= dict(
            stream_ppl=found.ppl,
            stream_word_ppl=found.word_ppl,
            stream_bits_per_byte=found.bits_per_byte,
        )
    return row
