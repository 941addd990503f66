"""plot.py -- validation loss against steps and against training time, as PNG and SVG.

    python scripts/plot.py --stage stage1                  a line per cell: mean over its seeds, band from min to max
    python scripts/plot.py --stage stage1 --each           a line per run
    python scripts/plot.py 20260101-120000-a1b2c3 my_run   these runs, also unfinished ones; same lines as above

Reads logs/<run_id>/metrics.csv; results.csv says which runs form a cell. A run that it does not know is a
line of its own. With --stage, finished runs only. The y axis leaves out step 0, whose loss (16, or ln of the
vocabulary) would squash the rest. Runs without validations are named and left out.
Raises   UserError naming the file or option: no runs, no such stage, no matplotlib
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import lib_results as lib
from lib_results import Cell, Curve, Points, Row, Stage, UserError

BARE = ("attn_gate", "gate_pos", "gate_act")  # their values say which key it is
SHORT = {"learning_rate": "lr", "num_iterations": "iterations"}


def rows_wanted(a: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """The rows of the runs to draw, one per run, and the ids of runs that results.csv does not know."""
    rows: list[Row] = []
    if a.results.exists() or a.stage:
        rows, problems = lib.read_results(a.results)
        for problem in problems:
            print(problem, file=sys.stderr)
    latest = {row["run_id"]: row for row in rows}  # preempted, then finished: the last row is how it ended
    if not a.stage:
        return [latest[r] for r in a.runs if r in latest], [r for r in a.runs if r not in latest]
    stages = lib.read_stages(a.stages) if a.stages else lib.stages_by_iters("1500", "800")
    found, _ = lib.sort_into_stages(list(latest.values()), stages)
    own = [row for row in found.get(a.stage, (None, []))[1] if row.status == "finished"]
    if not own:
        names = sorted(name for name, (_, of) in found.items() if any(r.status == "finished" for r in of))
        raise UserError(
            f"--stage {a.stage}: {a.results} has no finished run of it; it has those of {names or 'no stage'}"
        )
    return own, []


def label_of(cell: Cell, shared: set[str]) -> str:
    """A cell in a legend: its gate, its rate, and whatever else tells it from the others."""
    words = []
    for key, value in cell.key.items():
        if key == "notes":
            words += [w for w in value.split() if w not in shared]
        elif value not in ("", "-"):
            words.append(value if key in BARE else f"{SHORT.get(key, key)} {value}")
    return " ".join(words)


def make_curves(rows: Sequence[Row], others: Sequence[str], logs: Path, each: bool) -> list[Curve]:
    """A line per cell, or per run; runs that cannot be drawn are named on stderr."""

    def points(run_id: str) -> Points | None:
        path = logs / run_id / "metrics.csv"
        try:
            found, torn = lib.read_metrics(path)
        except UserError as error:
            print(f"{error}; {run_id} is left out", file=sys.stderr)
            return None
        if torn:
            print(f"{path}: {lib.count(torn, 'torn row')} skipped", file=sys.stderr)
        if not found.step:
            print(f"{path}: no validation yet; {run_id} is left out", file=sys.stderr)
            return None
        return found

    curves = []
    cells = lib.make_cells(rows, Stage("plot"))
    shared = set.intersection(*(set(c.key.get("notes", "").split()) for c in cells)) if len(cells) > 1 else set()
    for cell in cells:
        runs = {row["run_id"]: p for row in cell.rows if (p := points(row["run_id"]))}
        label = label_of(cell, shared)
        if each:
            seed = {row["run_id"]: row["seed"] for row in cell.rows}
            curves += [lib.make_curve(f"{label} seed {seed[r]}".strip(), [p]) for r, p in runs.items()]
        elif runs:
            curves.append(lib.make_curve(label or next(iter(runs)), list(runs.values())))
    return curves + [lib.make_curve(run_id, [p]) for run_id in others if (p := points(run_id))]


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", metavar="RUN_ID", help="runs to draw, or --stage")
    p.add_argument("--stage", help="draw the finished runs of this stage")
    p.add_argument("--stages", type=Path, metavar="TOML", help="as of split_results.py")
    p.add_argument("--each", action="store_true", help="one line per run, no means")
    p.add_argument("--logs", type=Path, default=lib.REPO / "logs", metavar="DIR")
    p.add_argument("--results", type=Path, default=lib.REPO / "experiments/results.csv", metavar="CSV")
    p.add_argument("--out", type=Path, default=lib.REPO / "experiments/figures", metavar="DIR")
    a = p.parse_args(argv)
    if bool(a.runs) == bool(a.stage):
        raise UserError("give run ids, or --stage NAME (one of the two)")
    a.runs = list(dict.fromkeys(a.runs))
    rows, others = rows_wanted(a)
    curves = make_curves(rows, others, a.logs, a.each)
    if not curves:
        raise UserError(f"nothing to draw: no run has a validation in {a.logs}/<run_id>/metrics.csv")
    what = a.stage or (a.runs[0] if len(a.runs) == 1 else "runs")
    figure = lib.loss_figure(curves, f"validation loss, {what}")
    for kind in ("png", "svg"):
        path = a.out / f"val_loss_{what}.{kind}"
        lib.write_whole(path, lib.figure_bytes(figure, kind))
        print(path)


if __name__ == "__main__":
    lib.launch(main)
