"""mqar.py -- multi-query associative recall on bytes, beyond what stacked windows can reach.

    python scripts/scaled/mqar.py       trains a small model and its control, tests both
    python scripts/scaled/mqar.py --seeds 0,1,2 --knobs n_embd=128 num_iterations=2000
    python scripts/scaled/mqar.py --layout half --pairs 8 --distances 16,64,256 --test_pairs 4,8,16

A text is PAIRS of a random key and a random value, then random digits, then the keys again in
another order, each with its value behind it. A hit is both letters of a value, greedily. The last
pair lies beyond n_layer x (SLIDING_WINDOW - 1) patches of the first question, so that no window
hands a value on; where --distances asks for less, it is marked *.

Layouts  full: a key is a patch, its value the next one: `ab->` `cd; `; key and value meet only
         through a shift by one
         half: a pair is one patch, `abcd`, and a question is one, `ab->`: no shift is needed
Controls the same weights with the memory silent; a model without memory, same steps and batches;
         chance: a value drawn at random, and any one of the text's own values (1 / PAIRS)
Training loss on the values alone, in stages: 1, 2, 4, .. pairs with dots for digits, then digits,
         then up to twice the distance. The next stage begins when the loss of the last is below
         0.3 nats a letter
Shapes   B rows, R pairs, G patches of digits, A answers; text_BN4 is a text in patches
Source   Arora et al., Zoology, arXiv 2312.04927
Raises   UserError: a bad flag or knob, more pairs than keys, no GPU
"""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial

import byte_models as lib
import numpy as np
import torch
from byte_models import PATCH, ByteLM, Knobs, UserError

from plumbing import launch

# fmt: off
MQAR = dict(
    n_embd=64, lr=3e-3, num_iterations=1000, warmup_iters=50, batch_size=64, device_batch_size=64,
    delta_rule=True, mem_init=8.0,
    # Only the window is checked against it: a text is as long as pairs and gap make it.
    sequence_length=4096)
# fmt: on
LETTERS = b"abcdefghijklmnopqrstuvwxyz"
ROWS = 64  # texts that are tested together


# ----------------------------------------------------------------------------
# Texts


def two_letters(number_BR: np.ndarray, letters: int) -> np.ndarray:
    table = np.frombuffer(LETTERS, np.uint8)
    return np.stack([table[number_BR // letters], table[number_BR % letters]], -1)


def make_texts(
    rng: np.random.Generator,
    B: int,
    pairs: int,
    gap: int,
    letters: int,
    layout: str,
    dots: float = 0.0,
) -> lib.Batch:
    """B texts (B, T), the patches (B, R) of their answers, and the bytes there with -1 for all but
    the value's two. `gap` patches of digits lie between the last pair and the first question; in a
    share `dots` of rows, of dots.
    """
    keys_BR = np.argsort(rng.random((B, letters**2)), 1)[:, :pairs]
    key, value = (
        two_letters(n, letters) for n in (keys_BR, rng.integers(0, letters**2, (B, pairs)))
    )
    mark = lambda text: np.broadcast_to(np.frombuffer(text, np.uint8), key.shape)
    asked, given = np.concatenate([key, mark(b"->")], -1), np.concatenate([value, mark(b"; ")], -1)
    question = np.stack([asked, given], 2)  # (B, R, 2 patches, 4)
    pair = question if layout == "full" else np.concatenate([key, value], -1)[:, :, None]
    fill = rng.integers(ord("0"), ord("9") + 1, (B, gap, PATCH))
    fill = np.where(rng.random((B, 1, 1)) < dots, ord("."), fill)
    order = np.argsort(rng.random((B, pairs)), 1)
    question = np.take_along_axis(question, order[:, :, None, None], 1)
    text_BN4 = np.concatenate(
        [pair.reshape(B, -1, PATCH), fill, question.reshape(B, -1, PATCH)], 1
    ).astype(np.int64)
    at_R = pairs * pair.shape[2] + gap + 1 + 2 * np.arange(pairs)
    y_BR4 = text_BN4[:, at_R]
    y_BR4[..., 2:] = -1
    return (
        torch.from_numpy(text_BN4.reshape(B, -1)),
        torch.from_numpy(np.tile(at_R, (B, 1))),
        torch.from_numpy(y_BR4),
    )


def least_gap(k: Knobs) -> int:
    """Patches of digits that put the last pair beyond the first answer's reach: the answer is
    predicted from the patch before its own, the question, which the window-only model sees with the
    `reach` patches before it.
    """
    far = lib.reach(k)
    if far is None:
        raise UserError("SLIDING_WINDOW=off sees everything: no pair lies beyond it; set a window")
    return far


def stages(k: Knobs, pairs: int) -> list[tuple[int, float, int]]:
    """Pairs, share of rows with dots, and largest distance, stage by stage."""
    gap, fewer = least_gap(k), [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n < pairs]
    return [
        *((n, 1.0, gap) for n in (*fewer, pairs)),
        (pairs, 0.5, gap),
        (pairs, 0.0, gap),
        (pairs, 0.0, 2 * gap),
    ]


def training_texts(step: int, stage: int, k: Knobs, a: argparse.Namespace) -> lib.Batch:
    """Texts of a stage, BATCH_SIZE with 1 or 2 pairs and fewer with more, so that a step's answers
    stay as many; a quarter of the batches is of an earlier stage.
    """
    rng = np.random.default_rng([k.seed, step])
    at = stage if rng.random() < 0.75 else int(rng.integers(stage + 1))
    pairs, dots, most = stages(k, a.pairs)[at]
    gap = int(rng.integers(least_gap(k), most + 1))
    return make_texts(
        rng,
        min(k.batch_size, 2 * k.batch_size // pairs) or 1,
        pairs,
        gap,
        a.letters,
        a.layout,
        dots,
    )


# ----------------------------------------------------------------------------
# Test


@torch.no_grad()
def hits(
    model: ByteLM, seed: Sequence[int], n: int, pairs: int, gap: int, a: argparse.Namespace
) -> int:
    """Values that are right, of n texts."""
    rng, found = np.random.default_rng(list(seed)), 0
    device = model.plasticity.device
    for lo in range(0, n, ROWS):
        batch = make_texts(rng, min(ROWS, n - lo), pairs, gap, a.letters, a.layout)
        found += int(lib.answer_hits(model, *(t.to(device) for t in batch)).all(-1).sum())
    return found


def grid(models: dict[str, ByteLM], seed: int, a: argparse.Namespace) -> list[dict[str, object]]:
    """A row per model, number of pairs and distance; every model is asked the same questions."""
    found, least = [], least_gap(models["full"].cfg)
    for pairs in a.test_pairs:
        for distance in a.distances or (least, 2 * least, 4 * least, 16 * least):
            for name, model in models.items():
                right, n = (
                    hits(model, (a.seed_test, seed, pairs, distance), a.n, pairs, distance, a),
                    a.n * pairs,
                )
                low, high = lib.wilson(right, n)
                row = dict(
                    model=name,
                    seed=seed,
                    pairs=pairs,
                    gap_patches=distance,
                    layout=a.layout,
                    texts=a.n,
                )
                row |= dict(
                    beyond_window=int(distance >= least),
                    trained=int(pairs == a.pairs and distance <= 2 * least),
                )
                row |= dict(n=n, hits=right, accuracy=right / n, low=low, high=high)
                found.append(row | dict(chance=a.letters**-2, chance_of_shown=1 / pairs))
    return found


# ----------------------------------------------------------------------------
# Program


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--knobs", nargs="*", default=[], metavar="name=value", help="of train_scaled.py")
    add("--pairs", type=int, default=8, metavar="R", help="pairs of training texts (8)")
    add("--layout", choices=("full", "half"), default="full")
    add("--letters", type=int, default=8, metavar="N", help="N^2 keys and N^2 values (8)")
    add("--test_pairs", metavar="R,..", help="default: PAIRS / 2, PAIRS, 2 PAIRS")
    reach = "patches; default: 1, 2, 4, 16 times the least beyond reach"
    add("--distances", metavar="G,..", help=reach)
    add("--n", type=int, default=256, metavar="N", help="texts per line of the table (256)")
    add("--seeds", default="0", metavar="N,..", help="one model of each kind per seed (0)")
    a = lib.finish_options(p, argv, "mqar")
    if not 2 <= a.letters <= len(LETTERS):
        raise UserError(f"--letters {a.letters}: expected 2 to {len(LETTERS)}")
    a.seed_test, pairs = a.seed, [max(a.pairs // 2, 1), a.pairs, 2 * a.pairs]
    a.test_pairs = (
        lib.numbers(int, a.test_pairs, "--test_pairs", 1, 10**4)
        if a.test_pairs
        else sorted(set(pairs))
    )
    a.distances = lib.numbers(int, a.distances, "--distances", 1, 10**6) if a.distances else None
    a.seeds = lib.numbers(int, a.seeds, "--seeds", 0, 2**31)
    if (most := max(a.pairs, *a.test_pairs)) > a.letters**2 or a.pairs < 1:
        raise UserError(
            f"{most} pairs need as many keys, --letters {a.letters} makes {a.letters**2}; use more "
            f"letters"
        )
    return a


def main(argv: Sequence[str] | None = None) -> None:
    a = read_options(argv)
    device, found, seconds = lib.check_device(a.device), [], []
    knobs = lib.read_model_knobs(a.knobs, lib.BASE | MQAR)
    least = least_gap(knobs)
    print(
        f"{a.pairs} pairs, layout {a.layout}, {a.letters**2} values; windows reach {least} patches "
        f"= "
        f"{PATCH * least} bytes; {knobs.num_iterations} steps x {knobs.batch_size} texts"
    )
    for seed in a.seeds:
        k, models = dataclasses.replace(knobs, seed=seed), {}
        for name, memory in (("full", knobs.memory), ("window only", "off")):
            own = dataclasses.replace(k, memory=memory)
            say = lambda line, name=name, seed=seed: print(f"seed:{seed} {name} {line}", flush=True)
            make = partial(training_texts, k=own, a=a)
            models[name], spent = lib.train_on_answers(
                own, make, len(stages(own, a.pairs)), device, say
            )
            seconds.append(
                dict(seed=seed, model=name, seconds=spent, n_params=lib.n_params(models[name]))
            )
            if name == "full":
                models["memory zeroed"] = lib.other_memory(models[name], "zero")
        found += grid(models, seed, a)
    header = ("model", "seed", "pairs", "distance, patches", "accuracy [95%]")
    place = lambda r: f"{r['gap_patches']}{'' if r['beyond_window'] else '*'}"
    cells = [
        (r["model"], r["seed"], r["pairs"], place(r), lib.share(r["hits"], r["n"])) for r in found
    ]
    lib.show_table([header, *cells, ("chance", "", "", "", f"{a.letters**-2:.3f}")])
    about = lib.facts(a, training=seconds, knobs=dataclasses.asdict(knobs), reach_patches=least)
    lib.write_results(a.out, found, about)


if __name__ == "__main__":
    launch(main)
