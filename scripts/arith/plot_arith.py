"""plot_arith.py -- learning curves of exact match, and what it reaches for how many different
training examples.

    python scripts/arith/plot_arith.py --stage arith_answers arith_examples
        # runs of experiments/results_arith.csv
    python scripts/arith/plot_arith.py --run honest_s1 honest_s2 --logs-folder runs

Runs whose knobs are the same are one configuration: a line per run, one colour and label for all
of them.

Writes   runs.csv, a row per run: what tells it from the others, exact match on the validation set
         with its 95% Wilson interval, the legacy metric, loss and floor; learning.png: exact match
         against examples seen, of the training batches (running mean, faint) and of the validation
         set; examples.png, where the runs differ in TRAIN_EXAMPLES
Raises   UserError: no such stage or run, no finished run, a run whose metrics.csv has no
         exact_match
"""

import argparse
import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lib_heads as heads
import lib_tables as tables

from plumbing import ROOT, UserError

SAME = (
    "num_iterations",
    "warmup_iters",
    "warmdown_iters",
    "batch_size",
    "sequence_length",
    "train_path",
)


@dataclass(frozen=True)
class Trained:
    """A run: its row, what tells it from the others, and its curves."""

    row: tables.Row
    label: str
    examples: list[float]  # seen, at each validation
    exact: list[float]
    batch_examples: list[float]
    batch_exact: list[float]  # running mean of the training batches
    items: int  # of the validation set; 0: not known

    @property
    def train_examples(self) -> float:
        """Different ones; inf where every batch is fresh."""
        return self.row.number("train_examples") or math.inf


def rows_wanted(a: argparse.Namespace) -> list[tables.Row]:
    rows, problems = tables.read_results(a.results_file)
    for line in problems:
        print(line)
    wanted, column = (a.run, "run_id") if a.run else (a.stage, "stage")
    known = {row[column] for row in rows if row.status == "finished"}
    if missing := [name for name in wanted if name not in known]:
        has = ", ".join(sorted(known)) or "none"
        raise UserError(
            f"{a.results_file}: no finished run with {column} {', '.join(missing)}; it has {has}"
        )
    return [row for row in rows if row[column] in wanted and row.status == "finished"]


def labels_of(rows: Sequence[tables.Row]) -> list[str]:
    """What differs between the rows, in the results file's order of columns; alike for seeds of
    one configuration."""
    keys = [
        key for key in tables.keys_of(rows) if len({tables.key_value(row, key) for row in rows}) > 1
    ]
    shown = [key for key in keys if key not in SAME] or keys
    return [", ".join(words_of(row, shown)) or "all" for row in rows]


def words_of(row: tables.Row, keys: Sequence[str]) -> list[str]:
    fresh = dict(train_examples="fresh examples") if row["train_examples"] == "0" else {}
    return [
        fresh.get(key) or f"{key.replace('_', ' ')} {tables.key_value(row, key) or '-'}"
        for key in keys
    ]


def read_run(row: tables.Row, label: str, logs: Path) -> Trained:
    """Raises UserError where the run's metrics.csv is not there or is another trainer's."""
    path = logs / row["run_id"] / "metrics.csv"
    try:
        with open(path, newline="") as f:
            table = {
                int(r["step"]): r for r in csv.DictReader(f)
            }  # a step that occurs twice counts as the last time
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); --logs-folder says where runs are"
        ) from None
    size, mean = int(row.number("batch_size")), math.nan
    run = Trained(row, label, [], [], [], [], items_of(path.with_name("evaluation.json")))
    for step, r in sorted(table.items()):
        if r.get("exact_match"):
            run.examples.append(step * size)
            run.exact.append(float(r["exact_match"]))
        if r.get("train_exact"):
            value = float(r["train_exact"])
            mean = value if math.isnan(mean) else 0.95 * mean + 0.05 * value
            run.batch_examples.append(step * size)
            run.batch_exact.append(mean)
    if not run.exact:
        raise UserError(f"{path}: no validation with exact_match; expected a run of train_arith.py")
    return run


def items_of(path: Path) -> int:
    """The first set of evaluation.json is the validation set."""
    try:
        return next(iter(json.loads(path.read_text())["sets"].values()))["n"]
    except (OSError, ValueError, KeyError, StopIteration):
        return 0


def table_of(runs: Sequence[Trained]) -> list[dict]:
    out = []
    for run in runs:
        end = run.exact[-1]
        low, high = tables.wilson(end * run.items, run.items) if run.items else (math.nan, math.nan)
        row = dict(
            run_id=run.row["run_id"],
            stage=run.row["stage"],
            configuration=run.label,
            seed=run.row["seed"],
        )
        row |= dict(
            examples_seen=int(run.examples[-1]),
            items=run.items,
            exact_match=end,
            low=low,
            high=high,
        )
        row |= {key: run.row[key] for key in ("eos_after_gold", "final_val_loss", "train_time_ms")}
        out.append(row)
    return out


def learning_figure(runs: Sequence[Trained]):
    labels = list(dict.fromkeys(run.label for run in runs))
    figure, axes = tables.new_figure(7.2, 3.6 + 0.1 * len(labels))
    for run in runs:
        style = tables.style_of(labels.index(run.label))
        colour = style["color"]
        panel, first = axes[0, 0], run is next(r for r in runs if r.label == run.label)
        panel.plot(
            run.batch_examples, run.batch_exact, "-", color=colour, alpha=0.25, linewidth=0.8
        )
        n = sum(r.label == run.label for r in runs)
        panel.plot(
            run.examples,
            run.exact,
            **{**style, "markersize": 3.5},
            label=f"{run.label} (n={n})" if first else None,
        )
    panel.set_xlabel("training examples seen", fontsize=9)
    panel.set_ylabel("exact match", fontsize=9)
    panel.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    panel.set_ylim(0, 1.02)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(
        "Exact match on the validation set; faint: training batches, running mean", fontsize=10
    )
    return figure


def by_examples(runs: Sequence[Trained]) -> list[list[Trained]]:
    """Runs that differ in TRAIN_EXAMPLES, and in nothing else but the seed, from few to many."""
    groups: dict[tuple, list[Trained]] = {}
    for run in runs:
        keys = [key for key in tables.keys_of([run.row]) if key != "train_examples"]
        groups.setdefault(tuple(tables.key_value(run.row, key) for key in keys), []).append(run)
    found = [sorted(group, key=lambda run: run.train_examples) for group in groups.values()]
    return [group for group in found if group[0].train_examples < group[-1].train_examples]


def examples_figure(groups: Sequence[Sequence[Trained]]):
    """The validation set's exact match and the training batches', for each group of
    by_examples()."""
    figure, axes = tables.new_figure(5.4, 3.6)
    panel, seen = axes[0, 0], max(run.examples[-1] for group in groups for run in group)
    for i, group in enumerate(groups):
        x = [min(run.train_examples, seen) for run in group]
        which = f", {i + 1}" if len(groups) > 1 else ""
        trained = [run.batch_exact[-1] if run.batch_exact else math.nan for run in group]
        panel.plot(
            x,
            [run.exact[-1] for run in group],
            **tables.style_of(2 * i),
            label=f"validation set{which}",
        )
        panel.plot(x, trained, **tables.style_of(2 * i + 1), label=f"training batches{which}")
    panel.set_xscale("log")
    panel.set_ylim(0, 1.02)
    panel.set_xlabel(f"different training examples ({int(seen):,} seen in all)", fontsize=9)
    panel.set_ylabel("exact match", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False)
    return figure


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--stage", nargs="+", metavar="NAME", help="all finished runs of these stages"
    )
    which.add_argument("--run", nargs="+", metavar="ID", help="these runs")
    results = os.environ.get("RESULTS_FILE") or ROOT / "experiments/results_arith.csv"
    p.add_argument(
        "--results_file", "--results-file", "--results", type=Path, default=results, metavar="CSV"
    )
    p.add_argument(
        "--logs_folder",
        "--logs-folder",
        type=Path,
        default=os.environ.get("LOGS_FOLDER") or ROOT / "logs",
        metavar="DIR",
        help="where the runs are; default logs/",
    )
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="default experiments/arith/curves/<names>"
    )
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    a = arguments(argv)
    heads.need("scipy", "matplotlib")
    rows = rows_wanted(a)
    runs = [
        read_run(row, label, a.logs_folder)
        for row, label in zip(rows, labels_of(rows), strict=True)
    ]
    out = a.out or tables.OUT / "curves" / "+".join(a.stage or a.run)[:100]
    table = table_of(runs)
    tables.write_csv(out / "runs.csv", table)
    for r in table:
        ends = f" [{r['low']:.3f}, {r['high']:.3f}] of {r['items']}" if r["items"] else ""
        print(
            f"{r['configuration']}, seed {r['seed']}: exact match {r['exact_match']:.3f}{ends} "
            f"after "
            f"{r['examples_seen']:,} examples"
        )
    tables.write_figure(out / "learning.png", learning_figure(runs))
    if groups := by_examples(runs):
        tables.write_figure(out / "examples.png", examples_figure(groups))
    return 0


if __name__ == "__main__":
    heads.launch(main)
