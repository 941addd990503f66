"""recall_bench.py -- does the memory of train_gpu.py recall? Tasks made on the spot, and
statistics of its slots.

    python scripts/hamt/recall_bench.py                       8 pairs at length 128, three mixers
    python scripts/hamt/recall_bench.py --task needle --pairs 4 --steps 600
    python scripts/hamt/recall_bench.py --task rewrite --mixers hamt,attention_conv \\
        --learning_rates 1e-3,3e-3,1e-2 --rate_seeds 1        keys written twice, tuned rates
    python scripts/hamt/recall_bench.py --model "num_slots=32" --mixers hamt --seeds 1
    python scripts/hamt/recall_bench.py --run ID              slots of a text's checkpoint

Trains train_gpu.py's model with its optimizer and schedule on fresh sequences in every step, at one
budget for all: hamt, zero (the same, its memory read forced to zero), attention (the same width and
layers, equal parameters) and, if asked for, attention_conv (attention behind the same convolution
as HAMT's) and local (hamt that reads its own write only, none before). With several LEARNING_RATES
each mixer is shown at its best one, chosen by accuracy on sequences of its own. scripts/hamt/
recall_tasks.py describes the tasks.

Prints   accuracy over seeds (mean, smallest, largest) against pairs, distance and length, and slot
         statistics
Writes   OUT/results.csv (a row per trained model and measurement), slots.csv, result.json, figures
         as PNG and SVG
Shapes   B sequences, T tokens, H heads, S slots of a head, E channels of a head, N tokens of all
         sequences
Units    losses in nats per question (of a text: per token), times in process CPU seconds, distances
         in tokens
Raises   UserError: a bad flag, a task that does not fit, no such run or one without a memory
"""

import dataclasses
import json
from datetime import datetime, timezone
from pathlib import Path

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import recall_tasks as tasks
import torch
from lib import plots, program
from recall_knobs import ENOUGH, MEASURE, Bench
from recall_tables import chosen, facts, figures, over_seeds, show, show_accuracy, show_slots, table
from recall_training import Trained, measurements, tensors, train
from slots import slot_statistics, slots_of_run

from plumbing import UserError, World, read_knobs
from plumbing.world import launch


def train_all(b: Bench, w: World) -> list[Trained]:
    """Every mixer with every rate, on `rate_seeds` seeds; at its best rate, on all seeds."""
    models = []
    tried = b.seeds if b.rate_seeds is None else min(b.rate_seeds, b.seeds)
    for mixer in dict.fromkeys(b.mixers.split(",")):
        for seed in range(b.seeds):
            rates = b.rates if seed < tried else [chosen(models)[mixer]]
            for rate in rates:
                m = train(b, mixer, rate, seed, w)
                models.append(m)
                show(
                    f"{mixer:9s} seed {seed} lr {rate:g}: {m.n_params:,} parameters, {b.steps} "
                    f"steps, {b.steps * b.batch_size:,} sequences, {m.cpu_s:.1f} CPU s, loss "
                    f"{m.final_loss:.4f}, accuracy {m.curve[-1][1]:.3f}, {ENOUGH:.0%} at step "
                    f"{m.reached or '-'}"
                )
    return models


def facts_of_model(b: Bench, m: Trained, is_chosen: bool) -> dict[str, object]:
    """What the rows of results.csv say of a model."""
    return {
        "task": b.task,
        "mixer": m.mixer,
        "learning_rate": m.rate,
        "seed": m.seed,
        "chosen": int(is_chosen),
        "steps": b.steps,
        "batch_size": b.batch_size,
        "pairs": b.pairs,
        "length": b.length,
        "n_params": m.n_params,
        "train_cpu_s": round(m.cpu_s, 2),
        "reached_step": m.reached,
        "chance": tasks.chance(b.alphabet),
    }


def bench(b: Bench, w: World, out: Path) -> None:
    """Train, measure, print and write."""
    models, rows, slots, heads = train_all(b, w), [], [], []
    rates = chosen(models)
    for m in models:
        facts_of_row = facts_of_model(b, m, is_chosen=m.rate == rates[m.mixer])
        rows += [facts_of_row | found for found in measurements(b, m.model, w)]
        if m.mixer == "hamt" and facts_of_row["chosen"] and b.slot_sequences:
            s = b.held_out(MEASURE, b.slot_sequences, b.length, b.pairs)
            found = slot_statistics(m.model, *tensors(s, w))
            heads += [dict(seed=m.seed) | r for r in found[0]]
            slots += [dict(seed=m.seed) | r for r in found[1]]
    means = over_seeds(rows)
    show_accuracy(b, means, b.seeds)
    show_sizes(models)
    if heads:
        show(
            f"\nslots, seed 0, {b.slot_sequences} sequences, change in nats per question with its "
            f"95% interval"
        )
        show_slots([r for r in heads if r["seed"] == 0])
    program.write_whole(out / "results.csv", table(rows))
    names = [field.name for field in dataclasses.fields(Trained) if field.name != "model"]
    trained = [{name: getattr(m, name) for name in names} for m in models]
    save(b, w, out, heads, slots, dict(chosen=rates, over_seeds=means, models=trained))
    for name, figure in figures(b, means, models, rates):
        for kind in ("png", "svg"):
            program.write_whole(out / f"{name}.{kind}", plots.figure_bytes(figure, kind))


def show_sizes(models: list[Trained]) -> None:
    sizes = [m.n_params for m in models]
    widest = max(sizes) / min(sizes) - 1
    line = f"\nparameters differ by {widest:.2%} at most"
    if widest > 0.03:
        line += " (MORE THAN 3%: not a fair comparison)"
    show(line)


def save(b: Bench, w: World, out: Path, heads: list[dict], slots: list[dict], more: dict) -> None:
    if slots:
        program.write_whole(out / "slots.csv", table(slots))
    found = facts(b, w) | more | dict(slots=heads)
    program.write_whole(out / "result.json", json.dumps(found, indent=1) + "\n")


def main() -> int:
    b = read_knobs(Bench, env={}, doc=__doc__)
    date = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    out = Path(b.out or program.ROOT / f"experiments/recall/{date}-{b.run or b.task}")
    if b.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda, but torch {torch.__version__} sees no CUDA GPU; use --device cpu"
        )
    # Not plumbing's join_world: there is nothing to save before a Ctrl-C.
    w = World(0, 1, torch.device(b.device))
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
    launch(main)
