"""plot.py -- figures of a study or of single runs, as PNG and SVG.

    python scripts/plot.py --stage stage1                   validation loss against steps and time
    python scripts/plot.py --stage stage1 --only all        every kind of figure that the data allow
    python scripts/plot.py --stage stage1 --only forest,lr  these kinds
    python scripts/plot.py 20260101-120000-a1b2c3 my_run    these runs, also unfinished ones
    python scripts/plot.py --stage stage1 --each            a line per run, no means

Kinds    loss      validation loss against steps and time, side by side
         steps, time, tokens   against one of them, with the difference to the baseline below
         final     final loss per configuration: seeds, mean, 95% interval
         forest    difference to the baseline with its 95% interval
         lr        final loss against the learning rate, where it varies
         overhead  step time against loss gained
         traces    learning rate and throughput

Reads LOGS_FOLDER/<run_id>/metrics.csv; the results file says which runs form a cell. A run that it
does not know is a line of its own. With --stage, finished runs only. The y axis leaves out step 0,
whose loss (16, or ln of the vocabulary) would squash the rest. Runs without validations are named
and left out.
Raises   UserError naming the file or option: no runs, no such stage or kind, no matplotlib
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lib.cells import find_baseline, is_baseline, make_cells
from lib.curves import Curve, make_curve
from lib.figures import final_figure, forest_figure, overhead_figure, rate_figure
from lib.groups import Group, labels_of
from lib.logs import RunLog, from_curves, read_logs
from lib.plots import (
    X_AXES,
    figure_bytes,
    loss_figure,
    plain,
    restyle,
    side_by_side_figure,
    trace_figure,
)
from lib.program import ROOT, UserError, add_data_options, launch, write_whole
from lib.results import Row, read_results
from lib.stages import Stage, read_stages, sort_into_stages, stages_by_iters
from lib.tables import Table, make_table

# File name and title of each kind, in the order in which they are drawn.
KINDS = {
    "loss": ("val_loss", "validation loss"),
    "steps": ("loss_by_steps", "validation loss by steps"),
    "time": ("loss_by_time", "validation loss by training time"),
    "tokens": ("loss_by_tokens", "validation loss by tokens"),
    "final": ("final_loss", "final loss"),
    "forest": ("difference", "difference to the baseline"),
    "lr": ("learning_rate", "learning-rate sweep"),
    "overhead": ("overhead", "step time against loss"),
    "traces": ("traces", "learning rate and throughput"),
}


def kinds_wanted(text: str) -> list[str]:
    """The kinds named by --only. Raises UserError for one that there is not."""
    if text == "all":
        return list(KINDS)
    words = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := [word for word in words if word not in KINDS]:
        raise UserError(f"--only {wrong[0]}: no such kind; there are all, {', '.join(KINDS)}")
    if not words:
        raise UserError(f"--only: give all, or some of {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in words]


def rows_wanted(a: argparse.Namespace) -> tuple[list[Row], list[str], Stage]:
    """The rows of the runs to draw, one per run, the ids of runs that results.csv does not know,
    and the stage."""
    rows: list[Row] = []
    if a.results_file.exists() or a.stage:
        rows, problems = read_results(a.results_file)
        for problem in problems:
            print(problem, file=sys.stderr)
    latest = {
        row["run_id"]: row for row in rows
    }  # preempted, then finished: the last row is how it ended
    if not a.stage:
        known = [latest[r] for r in a.runs if r in latest]
        return known, [r for r in a.runs if r not in latest], Stage("plot")
    stages = read_stages(a.stages, rows) if a.stages else stages_by_iters("1500", "800")
    found, _ = sort_into_stages(list(latest.values()), stages)
    stage, own = found.get(a.stage, (Stage(a.stage), []))
    own = [row for row in own if row.is_finished]
    if not own:
        names = sorted(name for name, (_, of) in found.items() if any(r.is_finished for r in of))
        raise UserError(
            f"--stage {a.stage}: {a.results_file} has no finished run of it; it has those of "
            f"{names or 'no stage'}"
        )
    return own, [], stage


def make_groups(
    rows: Sequence[Row], others: Sequence[str], stage: Stage, logs: dict[str, RunLog], each: bool
) -> list[Group]:
    """A group per cell, or per run. Runs that were not finished count here, since they were
    asked for."""
    cells = make_cells(rows, stage)
    groups: list[Group] = []
    made: dict[int, Group] = {}
    for cell, label in zip(cells, labels_of(cells), strict=True):
        runs = {row["run_id"]: logs[row["run_id"]] for row in cell.rows if row["run_id"] in logs}
        if each:
            for log in runs.values():
                groups.append(Group(f"{label} seed {log.seed}".strip(), len(groups), (log,)))
        elif runs:
            base = None if is_baseline(cell, stage) else find_baseline(cell, cells, stage)
            groups.append(Group(label, len(groups), tuple(runs.values()), made.get(id(base))))
            made[id(cell)] = groups[-1]
    return groups + [
        Group(r, len(groups) + i, (logs[r],)) for i, r in enumerate(r for r in others if r in logs)
    ]


def curve_of(group: Group) -> Curve:
    return make_curve(plain(group.label), [log.val for log in group.runs])


def draw(kind: str, groups: Sequence[Group], table: Table, title: str):
    """The figure, or None where there is nothing to draw."""
    if kind == "loss":
        if not groups:
            return None
        curves = [curve_of(g) for g in groups]
        figure = side_by_side_figure(curves, plain(title), table.loss_unit)
        restyle(figure)
        return figure
    if kind in X_AXES:
        return loss_figure(groups, kind, title, table.loss_unit)
    if kind == "traces":
        return trace_figure(groups, title)
    of_table: dict[str, Callable] = dict(final=final_figure, forest=forest_figure)
    of_table |= dict(lr=rate_figure, overhead=overhead_figure)
    return of_table[kind](table, title)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("runs", nargs="*", metavar="RUN_ID", help="runs to draw, or --stage")
    p.add_argument("--stage", help="draw the finished runs of this stage")
    p.add_argument(
        "--only", default="loss", metavar="KIND,...", help=f"all, or some of {', '.join(KINDS)}"
    )
    p.add_argument("--stages", type=Path, metavar="TOML", help="as of split_results.py")
    p.add_argument("--each", action="store_true", help="one line per run, no means")
    add_data_options(p)
    p.add_argument(
        "--curves", nargs="+", type=Path, default=[], metavar="CSV", help="as of split_results.py"
    )
    p.add_argument("--out", type=Path, default=ROOT / "experiments/figures", metavar="DIR")
    a = p.parse_args(argv)
    if bool(a.runs) == bool(a.stage):
        raise UserError("give run ids, or --stage NAME (one of the two)")
    return a


def draw_all(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw what the options ask for; the files, which are named as they are written."""
    a = arguments(argv)
    kinds = kinds_wanted(a.only)
    a.runs = list(dict.fromkeys(a.runs))
    rows, others, stage = rows_wanted(a)
    given, wrong = from_curves(a.curves, rows)
    missing = [r for r in rows if r["run_id"] not in given]
    logs, problems = read_logs(missing, [r for r in others if r not in given], a.logs_folder)
    logs |= {run_id: log for run_id, log in given.items() if log.val.step}
    for problem in [*wrong, *problems]:
        print(problem, file=sys.stderr)
    groups = make_groups(rows, others, stage, logs, a.each)
    table = make_table(rows, stage)
    what = a.stage or (a.runs[0] if len(a.runs) == 1 else "runs")
    figures = {kind: draw(kind, groups, table, f"{KINDS[kind][1]}, {what}") for kind in kinds}
    if not any(figures.values()):
        reason = (
            f"no run has a validation in {a.logs_folder}/<run_id>/metrics.csv"
            if not groups
            else "the data have none"
        )
        raise UserError(f"nothing to draw for {', '.join(kinds)}: {reason}")
    written = []
    for kind, figure in figures.items():
        if figure is None:
            print(f"{kind}: nothing to draw (no such data), left out", file=sys.stderr)
            continue
        for suffix in ("png", "svg"):
            path = a.out / f"{KINDS[kind][0]}_{what}.{suffix}"
            write_whole(path, figure_bytes(figure, suffix))
            print(path)
            written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    draw_all(argv)


if __name__ == "__main__":
    launch(main)
