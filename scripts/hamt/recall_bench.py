"""recall_bench.py -- does the memory of train_gpu.py recall? Tasks made on the spot, and statistics of its slots.

    python scripts/recall_bench.py                                            8 pairs at length 128, three mixers
    python scripts/recall_bench.py --task needle --pairs 4 --steps 600
    python scripts/recall_bench.py --model "binding=elementwise num_slots=32" --mixers hamt --seeds 1
    python scripts/recall_bench.py --run ID                                   slot statistics of a text checkpoint

Trains train_gpu.py's model with its optimizer and schedule on fresh sequences in every step, at one budget for all:
hamt, zero (the same, its memory read forced to zero), attention (the same width and layers, parameters within 3%) and,
if asked for, local (hamt that reads its own write only, none before).
With several LEARNING_RATES each mixer is shown at its best one, chosen by accuracy on sequences of its own.

Prints   accuracy over seeds (mean, smallest, largest) against pairs, distance and length, and slot statistics
Writes   OUT/results.csv (a row per trained model and measurement), slots.csv, result.json, figures as PNG and SVG
Shapes   B sequences, T tokens, H heads, S slots of a head, E channels of a head, N tokens of all sequences
Units    losses in nats per question (of a text: per token), times in process CPU seconds, distances in tokens
Raises   UserError: a bad flag, a task that does not fit, no such run or one without a memory
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

import lib_recall as tasks
import numpy as np
import torch
import torch.nn.functional as F
from lib import plots, program
from lib import runs as lib
from lib_recall import Alphabet, Sequences
from torch import Tensor

import plumbing
import train_gpu
from plumbing import UserError, World, knob

MIXERS = ("hamt", "zero", "local", "attention")
MEMORIES = dict(hamt="on", zero="off", local="local", attention="on")
SELECT, MEASURE = (
    1,
    2,
)  # streams of held-out sequences: one to choose a learning rate by, one to report
ENOUGH = 0.95  # accuracy whose first step is noted


@dataclass(frozen=True)
class Bench:
    # task
    task: str = knob("mqar", "what is asked", choices=tuple(tasks.TASKS))
    length: int = knob(128, "tokens of a training sequence", low=4)
    pairs: int = knob(8, "pairs of a training sequence; copy: symbols", low=1)
    keys: int = knob(64, "different keys", low=1)
    values: int = knob(64, "different values: chance is 1 / VALUES", low=2)
    fillers: int = knob(16, "different filler tokens", low=1)
    density: float = knob(0.5, "mqar: share of training tokens that are queries", above=0, high=1)
    # budget, of each model
    mixers: str = knob("hamt,zero,attention", f"with commas: {', '.join(MIXERS)}")
    steps: int = knob(300, "optimizer steps", low=1)
    batch_size: int = knob(32, "sequences per step", low=1)
    learning_rates: str = knob("3e-3", "peak rates of AdamW, with commas; the best is shown")
    weight_decay: float = knob(0.1, "of matrices only", low=0)
    warmup: int = knob(50, "steps of linear warm-up", low=0)
    seeds: int = knob(3, "models of each kind, seeds 0, 1, ...", low=1)
    # model
    hidden_dim: int = knob(64, "model width, channels", low=2)
    hcm_dim: int = knob(128, "memory width, real numbers", low=2)
    num_layers: int = knob(2, "blocks", low=1)
    num_slots: int = knob(16, "slots of a head's memory", low=1)
    num_attention_heads: int = knob(2, "heads", low=1)
    slowest_decay: float = knob(
        2**-12,
        "of the slots' initial rates; the trainer's forgets in 100 tokens",
        above=0,
        high=0.25,
    )
    model: str = knob("", 'more of train_gpu.py\'s knobs: "name=value name=value"')
    # measurement
    eval_pairs: str = knob("1,2,4,8,16,32", "with commas; those that do not fit are left out")
    eval_lengths: str = knob("auto", "with commas, tokens; auto: 1, 2 and 4 times LENGTH")
    sequences: int = knob(300, "held-out sequences of a measurement", low=2)
    slot_sequences: int = knob(32, "sequences for slot statistics; 0: none", low=0)
    curve_every: int = knob(25, "steps between points of the learning curve", low=1)
    run: str = knob(
        "", "measure the slots of this run's checkpoint on its own text, and train nothing"
    )
    logs_folder: str = knob(str(program.ROOT / "logs"), "where that run is")
    device: str = knob("cpu", "where", choices=("cpu", "cuda"))
    out: str = knob("", "folder of the results; empty: experiments/recall/<date and time>")

    def __post_init__(self):
        if bad := [m for m in self.mixers.split(",") if m not in MIXERS]:
            raise ValueError(
                f"MIXERS={self.mixers}: no mixer {bad[0]!r}; there are {', '.join(MIXERS)}"
            )
        if any(rate <= 0 for rate in self.rates):
            raise ValueError(
                f"LEARNING_RATES={self.learning_rates}: expected numbers above 0, with commas"
            )
        if min(*self.numbers("eval_pairs"), *self.lengths) < 1:
            raise ValueError(
                f"EVAL_PAIRS={self.eval_pairs} and EVAL_LENGTHS={self.eval_lengths} must be 1 or more"
            )
        self.sequences_of(
            np.random.default_rng(0), 1, self.length, self.pairs
        )  # a ValueError where they do not fit

    def numbers(self, name: str, kind: type = int) -> list:
        try:
            return [kind(part) for part in getattr(self, name).split(",")]
        except ValueError:
            text = getattr(self, name)
            raise ValueError(
                f"{name.upper()}={text!r}: expected numbers with commas between them"
            ) from None

    @property
    def rates(self) -> list[float]:
        return self.numbers("learning_rates", float)

    @property
    def lengths(self) -> list[int]:
        return (
            [self.length, 2 * self.length, 4 * self.length]
            if self.eval_lengths == "auto"
            else self.numbers("eval_lengths")
        )

    @property
    def alphabet(self) -> Alphabet:
        return Alphabet(self.keys, self.values, self.fillers)

    def sequences_of(
        self, rng: np.random.Generator, B: int, T: int, pairs: int, **more: object
    ) -> Sequences:
        return tasks.TASKS[self.task](rng, B, T, self.alphabet, pairs, **more)

    def training(self, seed: int, step: int) -> Sequences:
        """The fresh sequences of a step: the same for all mixers and rates."""
        more = dict(density=self.density) if self.task == "mqar" else {}
        rng = np.random.default_rng([seed, 0, step])
        return self.sequences_of(rng, self.batch_size, self.length, self.pairs, **more)

    def held_out(
        self, stream: int, n: int, T: int, pairs: int, distance: int | None = None
    ) -> Sequences:
        more = {} if distance is None else dict(distance=distance)
        return self.sequences_of(
            np.random.default_rng([20261121, stream, T, pairs, distance or 0]), n, T, pairs, **more
        )


def model_knobs(b: Bench, mixer: str, rate: float, seed: int) -> train_gpu.Knobs:
    """train_gpu.py's knobs for one model."""
    names = "hidden_dim hcm_dim num_layers num_slots num_attention_heads slowest_decay batch_size weight_decay device"
    values = {name: getattr(b, name) for name in names.split()} | dict(
        seed=seed, learning_rate=rate, max_seq_length=b.length
    )
    values |= dict(mixer="attention" if mixer == "attention" else "hamt", memory=MEMORIES[mixer])
    values |= dict(
        vocab_size=b.alphabet.size, dataset="embedded", mixed_precision="none", dropout=0.0
    )
    values |= dict(num_iterations=b.steps, warmup_iters=b.warmup)
    given = [f"--{part}" for part in b.model.split()]
    if wrong := [part for part in given if "=" not in part]:
        raise UserError(f"--model {b.model!r}: {wrong[0][2:]!r} is not of the form name=value")
    return plumbing.read_knobs(
        train_gpu.Knobs, {}, [f"--{name}={value}" for name, value in values.items()] + given, {}
    )


# ----------------------------------------------------------------------------
# Training and measuring


def tensors(s: Sequences, w: World) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(s.x_BT).to(w.device), torch.from_numpy(s.y_BT).to(w.device)


def asked_logits(model: train_gpu.Model, x_BT: Tensor, asked_BT: Tensor) -> Tensor:
    """(N, V) at the N tokens where something is asked."""
    h_BTC, _, _ = model(F.embedding(x_BT, model.wte), model.empty_state(len(x_BT)))
    return F.linear(h_BTC[asked_BT], model.wte).float()


@dataclass
class Trained:
    """A model and how it got there. The curve is (step, accuracy) on the sequences for selection."""

    mixer: str
    rate: float
    seed: int
    model: train_gpu.Model
    n_params: int
    cpu_s: float
    final_loss: float
    curve: list[tuple[int, float]]

    @property
    def reached(self) -> int | None:
        return next((step for step, accuracy in self.curve if accuracy >= ENOUGH), None)


def train(b: Bench, mixer: str, rate: float, seed: int, w: World) -> Trained:
    """train_gpu.py's model, AdamW and schedule; the loss is that of the questions. Measuring is not timed."""
    k = model_knobs(b, mixer, rate, seed)
    model = train_gpu.Model(k)
    model.init_weights(seed)
    adam = train_gpu.AdamW(model.to(w.device), k, w)
    one, spent, curve, losses = torch.ones((), device=w.device), 0.0, [], []
    for step in range(b.steps):
        model.train()
        t0 = time.process_time()
        x_BT, y_BT = tensors(b.training(seed, step), w)
        asked = y_BT >= 0
        loss = F.cross_entropy(asked_logits(model, x_BT, asked), y_BT[asked])
        loss.backward()
        norms = adam.reduce(one)
        adam.step(
            rate * train_gpu.lr_scale(step, k, b.steps),
            norms.square().sum().sqrt(),
            one,
            norms.isfinite().all(),
        )
        adam.grads.zero_()
        losses = [*losses[-19:], float(loss.detach())]
        spent += time.process_time() - t0
        if (step + 1) % b.curve_every == 0 or step + 1 == b.steps:
            found = measure(model, b.held_out(SELECT, min(b.sequences, 100), b.length, b.pairs), w)
            curve.append((step + 1, found["accuracy"]))
    n_params = sum(p.numel() for p in model.parameters())
    return Trained(mixer, rate, seed, model.eval(), n_params, spent, float(np.mean(losses)), curve)


@torch.inference_mode()
def answers(model: train_gpu.Model, s: Sequences, w: World, rows: int = 50) -> np.ndarray:
    """(B, T) the likeliest token of the whole vocabulary where something is asked, -2 elsewhere."""
    model.eval()
    found = np.full(s.x_BT.shape, -2)
    for at in range(0, len(found), rows):
        part = slice(at, at + rows)
        x_BT, y_BT = tensors(Sequences(s.x_BT[part], s.y_BT[part], s.distance_BT[part]), w)
        asked = y_BT >= 0
        found[part][asked.cpu().numpy()] = asked_logits(model, x_BT, asked).argmax(-1).cpu().numpy()
    return found


def measure(model: train_gpu.Model, s: Sequences, w: World) -> dict[str, float]:
    return tasks.accuracy(*tasks.score(s, answers(model, s, w)))


def fits(b: Bench, T: int, pairs: int, **more: object) -> bool:
    try:
        b.sequences_of(np.random.default_rng(0), 1, T, pairs, **more)
    except ValueError:
        return False
    return True


def measurements(b: Bench, model: train_gpu.Model, w: World) -> Iterator[dict[str, object]]:
    """Accuracy against pairs, length and, at each length, distance; rows of results.csv."""
    for pairs in b.numbers("eval_pairs"):
        if fits(b, b.length, pairs):
            found = measure(model, b.held_out(MEASURE, b.sequences, b.length, pairs), w)
            yield dict(against="pairs", eval_pairs=pairs, eval_length=b.length) | found
    for T in b.lengths:
        if not fits(b, T, b.pairs):
            continue
        s = b.held_out(MEASURE, b.sequences, T, b.pairs)
        found = answers(model, s, w)
        at = dict(eval_pairs=b.pairs, eval_length=T)
        yield dict(against="length") | at | tasks.accuracy(*tasks.score(s, found))
        edges = np.unique(np.linspace(0, T, 9).astype(int))
        for low, high in pairwise(edges):
            if b.task == "mqar":  # where its queries fall; the others are asked for at a distance
                row = dict(distance_low=int(low), distance_high=int(high) - 1)
                row |= tasks.accuracy(*tasks.score(s, found, low, high))
            else:
                distance = int(min(high, T - (b.pairs if b.task == "copy" else 2)))
                if not fits(b, T, b.pairs, distance=distance):
                    continue
                row = dict(distance_low=distance, distance_high=distance)
                row |= measure(
                    model, b.held_out(MEASURE, b.sequences // 2, T, b.pairs, distance), w
                )
            if row["queries"]:
                yield dict(against="distance") | at | row


# ----------------------------------------------------------------------------
# Slots: statistics that can fail


def effective_rank(address_NS: Tensor) -> tuple[float, float]:
    """How many different directions the addresses (N, S) have: exp of the entropy of the singular values' shares (Roy
    and Vetterli 2007), and the participation ratio of their squares, (sum s^2)^2 / sum s^4. Both are 1 where all
    tokens write to the same mixture of slots, and S where all slots are used alike and apart. Not centred, because a
    mean that dominates is just what must show."""
    s2 = torch.linalg.eigvalsh(address_NS.double().T @ address_NS.double()).clamp(min=0)
    s = s2.sqrt()
    share = s[s > 0] / s.sum()
    return float((-(share * share.log()).sum()).exp()), float(s2.sum() ** 2 / s2.square().sum())


def slot_cosine(M_BSE: Tensor) -> float:
    """Mean absolute cosine between two slots' contents, over all pairs of slots that hold something, (B, S, E): 1 where
    slots are copies of each other (up to sign and size), about sqrt(2 / (pi E)) where they are unrelated. nan where no
    two slots hold anything."""
    M = M_BSE.double()
    norm = M.norm(dim=-1)
    full = norm > 1e-6 * norm.amax(-1, keepdim=True).clamp(min=1e-30)
    unit = F.normalize(M, dim=-1)
    cosine = (unit @ unit.mT).abs()
    pairs = (full[:, :, None] & full[:, None]).triu(1)
    return float(cosine[pairs].mean()) if pairs.any() else math.nan


@contextlib.contextmanager
def watched(
    model: train_gpu.Model, keep: dict[int, Tensor] | None = None
) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
    """While inside, the list fills with (layer, write addresses (B, T, H, S), state behind (B, H, S, E)) of the memory
    layers. `keep` has by layer a (H, S) of ones and zeros: where it is 0 nothing is written, so nothing is read."""
    seen, keep = [], keep or {}
    layers = {
        i: block.mixer for i, block in enumerate(model.blocks) if hasattr(block.mixer, "recall")
    }

    def wrap(layer: int, mixer: train_gpu.Memory) -> None:
        recall = mixer.recall

        def recorded(parts: dict[str, Tensor], M: Tensor, *rest: object) -> tuple:
            if layer in keep:
                parts, M = (
                    parts | dict(write=parts["write"] * keep[layer]),
                    M * keep[layer][..., None],
                )
            found = recall(parts, M, *rest)
            seen.append((layer, parts["write"], found[1]))
            return found

        mixer.recall = recorded

    for layer, mixer in layers.items():
        wrap(layer, mixer)
    try:
        yield seen
    finally:
        for mixer in layers.values():
            del mixer.recall


@torch.inference_mode()
def sequence_losses(model: train_gpu.Model, x_BT: Tensor, y_BT: Tensor) -> np.ndarray:
    """Mean loss of each sequence over what is asked in it, (B,), nats."""
    asked = y_BT >= 0
    losses = F.cross_entropy(
        asked_logits(model, x_BT, asked), y_BT[asked], reduction="none"
    ).double()
    rows = asked.nonzero()[:, 0]
    total = torch.zeros(len(x_BT), dtype=torch.float64, device=x_BT.device).index_add_(
        0, rows, losses
    )
    return (total / asked.sum(1).clamp(min=1)).cpu().numpy()


def paired_change(losses: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Mean difference over sequences and half its 95% interval (normal; sequences are independent)."""
    d = losses - base
    return dict(
        loss_change=float(d.mean()), half=float(tasks.Z * d.std(ddof=1) / math.sqrt(len(d)))
    )


def slot_statistics(
    model: train_gpu.Model, x_BT: Tensor, y_BT: Tensor
) -> tuple[list[dict], list[dict]]:
    """Of each layer and head: effective ranks of its write addresses over all tokens, the cosine between slots of the
    state behind the last, and its slots' use. Of each slot: the loss change when it is zeroed from the first token on.
    The first list also has a row for each layer, and one for all, zeroed as a whole (head and layer None)."""
    with torch.inference_mode(), watched(model) as seen:
        model(F.embedding(x_BT, model.wte), model.empty_state(len(x_BT)))
    base = sequence_losses(model, x_BT, y_BT)

    def without(keep: dict[int, Tensor]) -> dict[str, float]:
        with watched(model, keep):
            return paired_change(sequence_losses(model, x_BT, y_BT), base)

    heads, slots = [], []
    for layer, write_BTHS, M_BHSE in seen:
        H, S, E = M_BHSE.shape[1:]
        for head in range(H):
            entropy, participation = effective_rank(write_BTHS[:, :, head].flatten(0, 1))
            own = []
            for slot in range(S):
                mask = write_BTHS.new_ones(H, S)
                mask[head, slot] = 0
                own.append(dict(layer=layer, head=head, slot=slot) | without({layer: mask}))
            slots += own
            row = dict(
                layer=layer,
                head=head,
                slots=S,
                rank_entropy=entropy,
                rank_participation=participation,
            )
            row |= dict(
                slot_cosine=slot_cosine(M_BHSE[:, head]),
                cosine_if_unrelated=math.sqrt(2 / (math.pi * E)),
            )
            largest = max(own, key=lambda r: r["loss_change"])
            used = sum(
                r["loss_change"] > r["half"] for r in own
            )  # that the loss rises is more than chance
            heads.append(
                row
                | dict(
                    slots_that_matter=used, loss_change=largest["loss_change"], half=largest["half"]
                )
            )
    none = {layer: torch.zeros_like(write[0, 0]) for layer, write, _ in seen}
    heads += [dict(layer=layer, head=None) | without({layer: mask}) for layer, mask in none.items()]
    heads.append(dict(layer=None, head=None, loss=float(base.mean())) | without(none))
    return heads, slots


def slots_of_run(b: Bench, w: World) -> tuple[list[dict], list[dict], dict]:
    """Slot statistics of a run's newest good checkpoint, on the front of its validation text; and what was measured."""
    path = lib.find_checkpoint(lib.find_run(Path(b.logs_folder), b.run))
    model, state = lib.load(path)
    if lib.trainer_of(model) != "train_gpu" or not any(
        hasattr(block.mixer, "recall") for block in model.blocks
    ):
        what = getattr(model.k, "mixer", lib.trainer_of(model))
        raise UserError(
            f"{path}: has no holographic memory ({what}); slot statistics are of train_gpu.py's MIXER=hamt"
        )
    if model.k.memory != "on":
        raise UserError(
            f"{path}: was trained with MEMORY={model.k.memory}, so its slots are never read"
        )
    shards, T, n = (
        train_gpu.open_text(model.k)["val"].shards,
        model.k.max_seq_length,
        b.slot_sequences or 32,
    )
    n = min(n, (shards.total - 1) // T)
    if n < 2:
        raise UserError(
            f"DATASET={model.k.dataset}: its validation text has {shards.total} tokens, two sequences of {T} needed"
        )
    places = np.linspace(0, shards.total - 1 - T, n).astype(int)  # from all of the text
    tokens = torch.from_numpy(
        np.stack([shards.read(int(p), T + 1) for p in places]).astype(np.int64)
    ).to(w.device)
    heads, slots = slot_statistics(model.to(w.device), tokens[:, :-1], tokens[:, 1:])
    what = dict(
        run=b.run, checkpoint=str(path), val_loss=state["val_loss"], sequences=n, tokens=n * T
    )
    return heads, slots, what


# ----------------------------------------------------------------------------
# Tables, files, figures


def show(line: str = "") -> None:
    print(line, flush=True)


def number(value: object, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}" if isinstance(value, float) else str(value)


def show_slots(heads: Sequence[dict]) -> None:
    show(
        "layer head slots  rank(entropy) rank(participation)  |cosine| (unrelated)  matter   loss change when zeroed"
    )
    for r in heads:
        change = f"{r['loss_change']:+.4f} +- {r['half']:.4f}"
        if r["head"] is None:
            show(
                f"{'all layers' if r['layer'] is None else r['layer']!s:10s} all slots zeroed: {change}"
            )
            continue
        show(
            f"{r['layer']:5d} {r['head']:4d} {r['slots']:5d}  {r['rank_entropy']:13.2f} "
            f"{r['rank_participation']:19.2f}  "
            f"{r['slot_cosine']:8.3f} ({r['cosine_if_unrelated']:.3f})       {r['slots_that_matter']:6d}   "
            f"{change} (its largest)"
        )


def chosen(models: Sequence[Trained]) -> dict[str, float]:
    """The rate of each mixer with the best mean accuracy at the end of its curves; the first of equals."""
    best: dict[str, tuple[float, float]] = {}
    for mixer, rate in dict.fromkeys((m.mixer, m.rate) for m in models):
        mean = float(
            np.mean([m.curve[-1][1] for m in models if (m.mixer, m.rate) == (mixer, rate)])
        )
        if mixer not in best or mean > best[mixer][1]:
            best[mixer] = rate, mean
    return {mixer: rate for mixer, (rate, _) in best.items()}


PLACES = "against eval_pairs eval_length distance_low distance_high".split()


def over_seeds(rows: Sequence[dict]) -> list[dict]:
    """One row per mixer and place: mean, smallest and largest accuracy of the seeds, at the chosen rate. With one seed
    the interval is that of its own sequences."""
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        if r["chosen"]:
            groups.setdefault((r["mixer"], *(r.get(name) for name in PLACES)), []).append(r)
    out = []
    for (mixer, *place), found in groups.items():
        values = [r["accuracy"] for r in found]
        low, high = (
            (found[0]["low"], found[0]["high"]) if len(found) == 1 else (min(values), max(values))
        )
        mean = dict(
            n=len(found),
            mean=float(np.mean(values)),
            low=low,
            high=high,
            queries=sum(r["queries"] for r in found),
        )
        out.append(dict(mixer=mixer) | dict(zip(PLACES, place, strict=True)) | mean)
    return out


def show_accuracy(b: Bench, means: Sequence[dict], seeds: int) -> None:
    spread = "smallest to largest over seeds" if seeds > 1 else "95% interval over sequences"
    show(f"\naccuracy, mean over n={seeds} seeds ({spread}); chance {tasks.chance(b.alphabet):.4f}")
    mixers = list(dict.fromkeys(r["mixer"] for r in means))
    show(f"{'':30s}" + "".join(f"{m:>26s}" for m in mixers))
    for place in dict.fromkeys(tuple(r[name] for name in PLACES) for r in means):
        against, pairs, length, low, high = place
        name = dict(
            pairs=f"{pairs} pairs, length {length}", length=f"length {length}, {pairs} pairs"
        )
        name |= dict(distance=f"  distance {low}" + f" to {high}" * (high != low))
        cells = {r["mixer"]: r for r in means if tuple(r[n] for n in PLACES) == place}
        text = [
            f"{c['mean']:.3f} ({c['low']:.3f} to {c['high']:.3f})" if (c := cells.get(m)) else "-"
            for m in mixers
        ]
        show(f"{name[against]:30s}" + "".join(f"{t:>26s}" for t in text))


def table(rows: Sequence[dict]) -> str:
    """CSV with the columns of all rows, in the order in which they first occur."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: "" if value is None else value for name, value in row.items()} for row in rows
    )
    return out.getvalue()


def facts(b: Bench, w: World) -> dict:
    """With what, where and when."""
    found = dict(
        command=shlex.join(sys.orig_argv),
        git_commit=plumbing._output("git", "-C", str(program.ROOT), "rev-parse", "HEAD"),
    )
    found |= dict(
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}",
        device=w.name(),
        torch=torch.__version__,
    )
    return found | dict(
        threads=torch.get_num_threads(), load=os.getloadavg()[0], flags=dataclasses.asdict(b)
    )


AXES = dict(
    pairs=("pairs in the sequence", "eval_pairs"),
    length=("length of the sequence (tokens)", "eval_length"),
)


def figures(
    b: Bench, means: Sequence[dict], models: Sequence[Trained], rates: dict[str, float]
) -> Iterator[tuple]:
    """(name, figure): accuracy against pairs, length, and distance at each length; and the learning curves."""
    mixers, n = list(dict.fromkeys(r["mixer"] for r in means)), b.seeds
    budget = f"{b.steps} steps of {b.batch_size} sequences; trained with {b.pairs} pairs at length {b.length}"
    band = (
        f"n={n} seeds, band: smallest to largest"
        if n > 1
        else "n=1, band: 95% interval over sequences"
    )

    def drawn(
        lines: dict[str, list[tuple[float, float, float, float]]], label: str, what: str, log: bool
    ) -> object:
        figure, (axes,) = plots.new_figure(3.8)
        for i, (mixer, points) in enumerate(lines.items()):
            x, y, low, high = zip(*sorted(points), strict=True)
            style = plots.style_of(i)
            axes.plot(
                x,
                y,
                label=f"{mixer} ({next(m.n_params for m in models if m.mixer == mixer):,} parameters)",
                **style,
            )
            axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.axhline(
            tasks.chance(b.alphabet), color="0.4", linewidth=1, linestyle=":", label="chance"
        )
        if log:
            axes.set_xscale("log", base=2)
            ticks = sorted({p[0] for points in lines.values() for p in points})
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("accuracy (share of answers)", fontsize=10)
        axes.set_xlabel(label, fontsize=10)
        plots.finish(figure, [axes], f"{b.task}: {what}", f"{budget}; {band}")
        plots.add_legend(axes, axes, len(lines) + 1)
        return figure

    def points(**place: object) -> dict[str, list]:
        at = lambda r: (
            r[AXES[r["against"]][1]]
            if r["against"] in AXES
            else (r["distance_low"] + r["distance_high"]) / 2
        )
        here = [r for r in means if all(r[name] == value for name, value in place.items())]
        return {
            m: [(at(r), r["mean"], r["low"], r["high"]) for r in here if r["mixer"] == m]
            for m in mixers
        }

    for against, (label, _) in AXES.items():
        yield (
            f"{b.task}_{against}",
            drawn(points(against=against), label, f"accuracy against {against}", True),
        )
    for T in dict.fromkeys(r["eval_length"] for r in means if r["against"] == "distance"):
        lines, what = (
            points(against="distance", eval_length=T),
            f"accuracy against distance at length {T}",
        )
        yield (
            f"{b.task}_distance_{T}",
            drawn(lines, "distance from answer to query (tokens)", what, False),
        )
    curves = {}
    for mixer in mixers:
        each = [
            [a for _, a in m.curve] for m in models if (m.mixer, m.rate) == (mixer, rates[mixer])
        ]
        steps = [step for step, _ in next(m.curve for m in models if m.mixer == mixer)]
        curves[mixer] = [
            (s, float(np.mean(v)), min(v), max(v)) for s, *v in zip(steps, *each, strict=True)
        ]
    yield f"{b.task}_learning", drawn(curves, "optimizer steps", "accuracy while training", False)


def bench(b: Bench, w: World, out: Path) -> None:
    """Train, measure, print and write."""
    models, rows, slots, heads = [], [], [], []
    for seed in range(b.seeds):
        for mixer in dict.fromkeys(b.mixers.split(",")):
            for rate in b.rates:
                m = train(b, mixer, rate, seed, w)
                models.append(m)
                show(
                    f"{mixer:9s} seed {seed} lr {rate:g}: {m.n_params:,} parameters, {b.steps} steps, "
                    f"{b.steps * b.batch_size:,} sequences, {m.cpu_s:.1f} CPU s, loss {m.final_loss:.4f}, accuracy "
                    f"{m.curve[-1][1]:.3f}, {ENOUGH:.0%} at step {m.reached or '-'}"
                )
    rates = chosen(models)
    for m in models:
        base = dict(
            task=b.task,
            mixer=m.mixer,
            learning_rate=m.rate,
            seed=m.seed,
            chosen=int(m.rate == rates[m.mixer]),
        )
        base |= dict(
            steps=b.steps,
            batch_size=b.batch_size,
            pairs=b.pairs,
            length=b.length,
            n_params=m.n_params,
        )
        base |= dict(
            train_cpu_s=round(m.cpu_s, 2), reached_step=m.reached, chance=tasks.chance(b.alphabet)
        )
        rows += [base | found for found in measurements(b, m.model, w)]
        if m.mixer == "hamt" and base["chosen"] and b.slot_sequences:
            s = b.held_out(MEASURE, b.slot_sequences, b.length, b.pairs)
            found = slot_statistics(m.model, *tensors(s, w))
            heads += [dict(seed=m.seed) | r for r in found[0]]
            slots += [dict(seed=m.seed) | r for r in found[1]]
    means = over_seeds(rows)
    show_accuracy(b, means, b.seeds)
    sizes = {m.mixer: m.n_params for m in models}
    widest = max(sizes.values()) / min(sizes.values()) - 1
    show(
        f"\nparameters differ by {widest:.2%} at most"
        + " (MORE THAN 3%: not a fair comparison)" * (widest > 0.03)
    )
    if heads:
        show(
            f"\nslots, seed 0, {b.slot_sequences} sequences, change in nats per question with its 95% interval"
        )
        show_slots([r for r in heads if r["seed"] == 0])
    program.write_whole(out / "results.csv", table(rows))
    trained = [
        {f.name: getattr(m, f.name) for f in dataclasses.fields(m) if f.name != "model"}
        for m in models
    ]
    save(b, w, out, heads, slots, dict(chosen=rates, over_seeds=means, models=trained))
    for name, figure in figures(b, means, models, rates):
        for kind in ("png", "svg"):
            program.write_whole(out / f"{name}.{kind}", plots.figure_bytes(figure, kind))


def save(b: Bench, w: World, out: Path, heads: list[dict], slots: list[dict], more: dict) -> None:
    if slots:
        program.write_whole(out / "slots.csv", table(slots))
    found = facts(b, w) | more | dict(slots=heads)
    program.write_whole(out / "result.json", json.dumps(found, indent=1) + "\n")


def main() -> int:
    b = plumbing.read_knobs(Bench, env={}, doc=__doc__)
    out = Path(
        b.out
        or program.ROOT
        / f"experiments/recall/{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{b.run or b.task}"
    )
    if b.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda, but torch {torch.__version__} sees no CUDA GPU; use --device cpu"
        )
    w = World(
        0, 1, torch.device(b.device)
    )  # not plumbing.world: there is nothing to save before a Ctrl-C
    try:
        program.need("matplotlib.figure", "a figure")  # said before anything is trained
        if not b.run:
            bench(b, w, out)
        else:
            heads, slots, what = slots_of_run(b, w)
            show(f"{what['checkpoint']}, {what['sequences']} sequences of its validation text")
            show_slots(heads)
            save(b, w, out, heads, slots, what)
    except program.UserError as error:
        raise UserError(error) from None
    show(f"\n{out}")
    return 0


if __name__ == "__main__":
    plumbing.launch(main)
