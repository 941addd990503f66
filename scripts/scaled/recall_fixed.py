"""recall_fixed.py -- does train_scaled.py's memory hand on a passkey from beyond its windows?

    python scripts/scaled/recall_fixed.py --train   trains a small model and a control, tests both
    python scripts/scaled/recall_fixed.py --run ID --window_run ID2     runs of train_scaled.py
    python scripts/scaled/recall_fixed.py --weights best_model_scaled.pth --lengths 1024,4096 --n 50
    python scripts/scaled/recall_fixed.py --train --run ID   teaches that run's model passkeys first

A text of LENGTH bytes is real prose with one sentence in it that holds a random key of 5 digits,
DEPTH percent of the way from its beginning, and the question for it at its end. A hit is all five
digits, written greedily; the text streams through a state of constant size. A cell counts when the
key lies beyond n_layer x (SLIDING_WINDOW - 1) patches, so that no window hands it on; others are
marked * and left out of the sums. Controls: the same weights with the memory silent, a model that
is trained alike without memory, and chance (1e-5; 0.1 per digit).

A model that was never taught to answer fails, whatever it remembers. --train teaches it on answers
alone: first in rows so short that the key is just beyond reach, with spaces for prose, then with
prose, then in longer rows up to TRAIN_LENGTH.

Shapes   B rows, T bytes, A patches that hold an answer
Raises   UserError: a bad flag, no weights, no text, a length that the sentences do not fit into, no
         GPU
"""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import byte_models as lib
import numpy as np
import torch
from byte_models import PATCH, ByteLM, Knobs, UserError
from lib.byte_stream import Stream

from plumbing import launch
from train_scaled import MODEL_KNOBS

NEEDLE, QUESTION, DIGITS = " GİZLİ KOD: {}. ", " SORU: GİZLİ KOD NEDİR? CEVAP: ", 5
BEFORE = len(" GİZLİ KOD: ".encode())  # bytes of the needle before its digits
NEEDLE_BYTES, QUESTION_BYTES = len(NEEDLE.format("00000").encode()), len(QUESTION.encode())
LENGTHS, DEPTHS = "1024,2048,4096,8192,16384,32768,65536", "0,10,20,30,40,50,60,70,80,90,100"
TRAIN = dict(
    n_embd=96,
    n_head=2,
    lr=3e-3,
    num_iterations=3000,
    warmup_iters=50,
    delta_rule=True,
    mem_init=10.0,
)


# ----------------------------------------------------------------------------
# Texts


def prose(text: bytes, n: int, rng: np.random.Generator) -> bytes:
    """n bytes of the text from a random place on, going on at its beginning when it ends."""
    at = int(rng.integers(len(text)))
    return (text[at:] + text * (n // len(text) + 1))[:n]


def make_text(filler: bytes, length: int, depth: float, key: str, align: int) -> tuple[bytes, int]:
    """The text up to where its answer begins, of `length` bytes together (less up to align - 1),
    and where the key's digits begin. Digits of key and answer begin at multiples of `align`.
    `filler` has at least `length` bytes.
    """
    end = (length - DIGITS) // align * align
    room = end - QUESTION_BYTES - NEEDLE_BYTES
    at = (round(depth * room) + BEFORE) // align * align - BEFORE
    at += -(at // align) * align if at < 0 else 0
    text = (
        filler[:at] + NEEDLE.format(key).encode() + filler[at : at + room - at] + QUESTION.encode()
    )
    return text, at + BEFORE


def make_cell(
    text: bytes, length: int, depth: float, n: int, align: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[str], int, int]:
    """n texts (n, T) with their keys, the place of the keys' digits, and of the answers'."""
    keys = [f"{number:05d}" for number in rng.integers(0, 10**DIGITS, n)]
    made = [make_text(prose(text, length, rng), length, depth, key, align) for key in keys]
    rows = np.stack([np.frombuffer(row, np.uint8) for row, _ in made])
    return rows, keys, made[0][1], rows.shape[1]


def stages(k: Knobs) -> list[tuple[int, float]]:
    """Bytes of a row and share of rows with spaces for prose, stage by stage: first the shortest
    rows whose keys are all beyond reach, at last SEQUENCE_LENGTH.
    """
    shortest = -(-(NEEDLE_BYTES + QUESTION_BYTES + DIGITS + lib.safe_gap(k)) // PATCH + 1) * PATCH
    longer = [n for n in (k.sequence_length >> i for i in range(20, -1, -1)) if n > shortest]
    return [
        (shortest, 1.0),
        (shortest, 0.5),
        (shortest, 0.0),
        *((n // PATCH * PATCH, 0.0) for n in longer),
    ]


def training_batch(step: int, stage: int, text: bytes, k: Knobs, align: int) -> lib.Batch:
    """Rows of a stage, as many as make BATCH_SIZE * SEQUENCE_LENGTH bytes; a quarter of the batches
    is of an earlier stage.
    """
    rng, plan = np.random.default_rng([k.seed, step]), stages(k)
    size, spaces = plan[stage if rng.random() < 0.75 else int(rng.integers(stage + 1))]
    rows, at, answers = [], [], []
    for _ in range(k.batch_size * k.sequence_length // size):
        filler = prose(b" " if rng.random() < spaces else text, size, rng)
        key = f"{rng.integers(0, 10**DIGITS):05d}"
        depth = 0.0 if size == plan[0][0] else rng.random()
        start, _ = make_text(filler, size, depth, key, align)
        target = np.full(size, -1)
        target[len(start) : len(start) + DIGITS] = np.frombuffer(key.encode(), np.uint8)
        at.append([len(start) // PATCH, len(start) // PATCH + 1])
        rows.append(np.frombuffer((start + key.encode() + filler)[:size], np.uint8))
        answers.append(target.reshape(-1, PATCH)[at[-1]])
    return tuple(torch.from_numpy(np.stack(t).astype(np.int64)) for t in (rows, at, answers))


# ----------------------------------------------------------------------------
# Test


@torch.no_grad()
def answer(model: ByteLM, rows_BT: np.ndarray, num_bytes: int = DIGITS) -> tuple[list[bytes], int]:
    """What each row's text is greedily continued with, streamed; and the bytes of the state behind
    it, of all rows.
    """
    stream, out = Stream(model, len(rows_BT)), []
    stream.feed(torch.from_numpy(rows_BT.astype(np.int64)))
    for i in range(num_bytes):
        out.append(stream.logits().argmax(-1))
        if i + 1 < num_bytes:
            stream.feed(out[-1][:, None])
    return [bytes(row) for row in torch.stack(out, 1).tolist()], stream.state_bytes()


def grid(
    models: dict[str, ByteLM], text: bytes, a: argparse.Namespace, trained: int | None
) -> list[dict[str, object]]:
    """A row per length, depth and model; every model is asked the same questions."""
    found = []
    for length in a.lengths:
        for depth in a.depths:
            rng = np.random.default_rng([a.seed, length, round(1000 * depth)])
            rows, keys, needle, end = make_cell(text, length, depth, a.n, a.align, rng)
            for name, model in models.items():
                counts = lib.beyond(needle + DIGITS - 1, end, models["full"].cfg)
                said, state = answer(model, rows)
                pairs = [(word, key.encode()) for word, key in zip(said, keys, strict=True)]
                digits = sum(c == d for word, key in pairs for c, d in zip(word, key, strict=True))
                hits = sum(word == key for word, key in pairs)
                low, high = lib.wilson(hits, a.n)
                row = dict(
                    model=name,
                    length=length,
                    depth=depth,
                    distance=end - needle,
                    beyond_window=int(counts),
                )
                row |= dict(n=a.n, hits=hits, exact=hits / a.n, low=low, high=high)
                row |= dict(digit_accuracy=digits / a.n / DIGITS)
                found.append(row | dict(trained_length=trained or "", state_bytes=state // a.n))
        show_length(found, length, models)
    return found


def show_length(found: list[dict[str, object]], length: int, models: dict[str, ByteLM]) -> None:
    for name in models:
        rows = [r for r in found if r["length"] == length and r["model"] == name]
        cells = " ".join(f"{r['exact']:.2f}{' ' if r['beyond_window'] else '*'}" for r in rows)
        print(f"{length:>7}  {name:<14} {cells}", flush=True)


def sums(found: list[dict[str, object]], trained: int | None) -> list[dict[str, object]]:
    """Exact match over the cells that count: of each length and of all lengths to 4 times the
    trained one.
    """
    out, lengths = [], sorted({r["length"] for r in found})
    groups = [(str(length), {length}) for length in lengths]
    if trained:
        groups.append(
            (f"up to {4 * trained}", {length for length in lengths if length <= 4 * trained})
        )
    groups.append(("all", set(lengths)))
    for name in dict.fromkeys(r["model"] for r in found):
        for label, of in groups:
            rows = [
                r for r in found if r["model"] == name and r["length"] in of and r["beyond_window"]
            ]
            hits, n = sum(r["hits"] for r in rows), sum(r["n"] for r in rows)
            if n:
                low, high = lib.wilson(hits, n)
                digits = sum(r["digit_accuracy"] * r["n"] for r in rows) / n
                row = dict(
                    model=name, lengths=label, cells=len(rows), n=n, hits=hits, exact=hits / n
                )
                out.append(row | dict(low=low, high=high, digit_accuracy=digits))
    return out


# ----------------------------------------------------------------------------
# Program


def save(model: ByteLM, path: Path) -> None:
    """As train_scaled.py saves weights: load_model and INIT_FROM read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    state = dict(
        model=weights,
        knobs=dataclasses.asdict(model.cfg),
        step=model.cfg.num_iterations,
        val_loss=float("nan"),
    )
    torch.save(state, path)


def train(
    a: argparse.Namespace, start: ByteLM | None, memory: str, device: torch.device
) -> tuple[ByteLM, float]:
    """A model taught to answer, from `start` or from new weights, and the seconds it took."""
    base = lib.BASE | TRAIN
    if start is not None:  # its model, our schedule
        base = dataclasses.asdict(start.cfg) | {
            name: v for name, v in base.items() if name not in MODEL_KNOBS
        }
        base["lr"] /= 3
    base |= dict(
        batch_size=a.batch_size,
        device_batch_size=a.batch_size,
        sequence_length=a.train_length,
        seed=a.seed,
    )
    k = dataclasses.replace(lib.read_model_knobs(a.knobs, base), memory=memory)
    check_fits([a.train_length], a.align)
    if k.sequence_length < NEEDLE_BYTES + QUESTION_BYTES + DIGITS + lib.safe_gap(k):
        raise UserError(
            f"--train_length {a.train_length} is too short for a key beyond {lib.reach(k)} "
            f"patches; use "
            f"{NEEDLE_BYTES + QUESTION_BYTES + DIGITS + lib.safe_gap(k)} or more, or a smaller "
            f"window"
        )
    text, source = lib.read_text(a.train_text or a.filler, "train")
    print(
        f"training: memory {memory}, {k.num_iterations} steps x {k.batch_size} x "
        f"{k.sequence_length} bytes, {source}"
    )
    make = partial(training_batch, text=text, k=k, align=a.align)
    return lib.train_on_answers(
        k, make, len(stages(k)), device, lambda line: print(line, flush=True), start
    )


def check_fits(lengths: Sequence[int], align: int) -> None:
    least = NEEDLE_BYTES + QUESTION_BYTES + DIGITS + 2 * align
    if (short := min(lengths)) < least:
        raise UserError(
            f"a text of {short} bytes does not hold key and question; use {least} or more"
        )


def read_models(
    a: argparse.Namespace, device: torch.device
) -> tuple[dict[str, ByteLM], dict[str, float]]:
    """The models to test, and the seconds that those trained here took."""
    path = lambda run, weights: lib.weights_path(a.logs_folder, run, weights)
    given = lambda run, weights: lib.load(path(run, weights), device) if run or weights else None
    full, window, seconds = given(a.run, a.weights), given(a.window_run, a.window_weights), {}
    if a.train:
        full, seconds["full"] = train(a, full, "on", device)
        save(full, a.out.with_name(a.out.name + "_full.pth"))
        if window is not None or not (a.run or a.weights):
            window, seconds["window only"] = train(a, window, "off", device)
            save(window, a.out.with_name(a.out.name + "_window.pth"))
    if full is None:
        raise UserError("no model: --run ID, --weights FILE, or --train to train a small one here")
    models = dict(full=full) | (
        {"memory zeroed": lib.other_memory(full, "zero")} if full.cfg.memory == "on" else {}
    )
    if window is not None:
        if window.cfg.memory == "on":
            raise UserError(
                "--window_run/--window_weights: a model with MEMORY=on is no window-only control"
            )
        if lib.reach(window.cfg) != lib.reach(full.cfg):
            print("note: the window-only model has another reach; cells count by the full model's")
        models["window only"] = window
    return models, seconds


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    lib.add_model_options(p)
    add = p.add_argument
    add("--train", action="store_true", help="train first: a new model, or the one that is named")
    add("--train_length", type=int, default=1024, metavar="T", help="bytes of a row (1024)")
    add("--batch_size", type=int, default=8, metavar="B", help="rows of TRAIN_LENGTH a step (8)")
    add(
        "--train_text", metavar="PATH", help="training prose; default: FILLER, or the training part"
    )
    add("--knobs", nargs="*", default=[], metavar="name=value", help="of the trainer, for --train")
    add("--lengths", default=LENGTHS, metavar="N,..", help=f"bytes of a text ({LENGTHS})")
    add("--depths", default=DEPTHS, metavar="P,..", help="percent of the way to the key")
    add("--n", type=int, default=20, help="random keys and texts of a cell (20)")
    add("--align", type=int, default=4, choices=(1, 2, 4), help="digits begin at multiples (4)")
    add("--filler", metavar="PATH", help="test prose; default: the Turkish test text, or embedded")
    a = lib.finish_options(p, argv, "recall")
    a.lengths = lib.numbers(int, a.lengths, "--lengths", 1, 1 << 24)
    a.depths = [d / 100 for d in lib.numbers(float, a.depths, "--depths", 0, 100)]
    check_fits(a.lengths, a.align)
    return a


def main(argv: Sequence[str] | None = None) -> None:
    a = read_options(argv)
    device = lib.check_device(a.device)
    text, source = lib.read_text(a.filler)
    models, seconds = read_models(a, device)
    k, t0 = models["full"].cfg, lib.clock(device)
    trained = k.sequence_length if a.train else None
    reach = (
        "everything"
        if lib.reach(k) is None
        else f"{lib.reach(k)} patches = {PATCH * lib.reach(k):,} bytes"
    )
    print(
        f"{lib.n_params(models['full']):,} parameters; windows reach {reach}; filler: {source}; "
        f"n={a.n} a cell"
    )
    print(
        f"exact match by depth {' '.join(f'{100 * d:.0f}%' for d in a.depths)}; * within the "
        f"windows' reach"
    )
    found = grid(models, text, a, trained)
    total = sums(found, trained)
    header = ("model", "lengths", "cells", "exact match [95%]", "per digit")
    score = lambda r: (lib.share(r["hits"], r["n"]), f"{r['digit_accuracy']:.3f}")
    cells = [(r["model"], r["lengths"], r["cells"], *score(r)) for r in total]
    lib.show_table([header, *cells, ("chance", "", "", "0.00001", "0.100")])
    about = lib.facts(
        a, filler=source, seconds_training=seconds, seconds_testing=lib.clock(device) - t0
    )
    about |= dict(
        n_params={name: lib.n_params(m) for name, m in models.items()}, reach_patches=lib.reach(k)
    )
    lib.write_results(
        a.out, found, about | dict(knobs=dataclasses.asdict(k), trained_length=trained, sums=total)
    )


if __name__ == "__main__":
    launch(main)
