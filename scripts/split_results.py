"""split_results.py -- results.csv to one file and one table per stage.

    python scripts/split_results.py
    python scripts/split_results.py --stage1-iters 1500,1501 --stage2-iters 800
    python scripts/split_results.py --target 3.3               steps and seconds to this loss
    python scripts/split_results.py --results_file old/results_*.csv \\
        --stages experiments/stages_original.toml --curves old/val_curves.csv

A row belongs to the stage in its own stage column. Where that is empty, to stage1 or stage2 by
num_iterations (the original's rule), or, with --stages, to every stage whose conditions it meets:

    [stage.stage1]                     # names results_stage1.csv and tables/stage1.csv, .md
    num_iterations = [1500]            # any columns, all must be met; a value or a list of values
    learning_rate = 0.0036
    keys = ["gate_act"]                # columns the table has even where they do not vary
    baseline = {attn_gate = "none"}    # compared with: the cell that is like them in all else
    extra_csv = ["baseline.csv"]       # further rows, relative to the first source's folder
    target_loss = 3.55                 # report steps and seconds to it; --target beats it
    train_tokens = 900_000_000         # of one pass, for files without a column epochs
    sequential = {delta = 0.002, max_seeds = 12}    # how its seeds were stopped (docs/studies.md)

Curves come from LOGS_FOLDER/<run_id>/metrics.csv, or from --curves: one CSV with run_id, step,
val_loss and train_time_ms (or train_time_s), such as a log_curves_<stage>.csv.

Writes results_<stage>.csv (rows as they stand), tables/<stage>.csv and .md, and
log_curves_<stage>.csv (the validations of all its runs), and prints the tables. No row is lost:
those in no stage, unfinished or torn are counted and named, and a results_<stage>.csv that holds
rows no source has is not replaced. docs/experiments.md explains the columns.
Raises   UserError naming file and line, stage or option
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib.curves import Curves
from lib.program import ROOT, UserError, add_data_options, count, launch, listing, write_whole
from lib.render import table_md, table_text, terminal_width
from lib.results import Row, csv_line, read_results, results_text
from lib.stages import Stage, read_stages, sort_into_stages, stages_by_iters
from lib.tables import Table, hardware_changes, make_table, table_csv

CURVE_COLUMNS = ("run_id", "step", "val_loss", "train_time_ms", "attn_gate", "learning_rate")


@dataclass
class Sources:
    """All that was read."""

    rows: list[Row] = field(default_factory=list)
    stages: dict[str, tuple[Stage, list[Row]]] = field(default_factory=dict)
    homeless: list[Row] = field(default_factory=list)  # rows in no stage
    extras: dict[str, list[Row]] = field(default_factory=dict)  # by stage, rows of its extra_csv
    extra_paths: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_targets(targets: Sequence[Path], sources: Sequence[Path], rows: Sequence[Row]) -> None:
    """Raise UserError before a write that would destroy a source, or rows that are nowhere else."""
    read = {path.resolve() for path in sources}
    fields = lambda row: frozenset((k, v) for k, v in row.values.items() if v)
    verbatim = {(row.columns, row.line) for row in rows}
    known: set[frozenset] = set()
    for target in targets:
        if target.resolve() in read:
            raise UserError(
                f"{target} is a source and would be replaced by its own rows; choose another "
                f"--out-dir"
            )
        if not target.exists():
            continue
        old, _ = read_results(target)
        lost = [row for row in old if (row.columns, row.line) not in verbatim]
        if lost:  # perhaps only written otherwise, as where schemas were mixed
            known = known or {fields(row) for row in rows}
            lost = [row for row in lost if fields(row) not in known]
        if lost:
            raise UserError(
                f"{target} holds {count(len(lost), 'row')} that no source has ({lost[0].where}, "
                f"run {lost[0]['run_id']}); add it to --results_file, move it away, or choose "
                f"another --out-dir"
            )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_data_options(p, many=True)
    p.add_argument("--out-dir", type=Path, metavar="DIR", default=ROOT / "experiments")
    p.add_argument("--stage1-iters", metavar="N,N", help="num_iterations of stage1 (default 1500)")
    p.add_argument("--stage2-iters", metavar="N,N", help="num_iterations of stage2 (default 800)")
    p.add_argument(
        "--stages", type=Path, metavar="TOML", help="a file that defines the stages instead"
    )
    p.add_argument(
        "--curves", nargs="+", type=Path, default=[], metavar="CSV", help="validations of many runs"
    )
    p.add_argument(
        "--target", type=float, metavar="NATS", help="report steps and seconds to this loss"
    )
    a = p.parse_args(argv)
    if a.target is not None and not a.target > 0:
        raise UserError(f"--target {a.target}: expected a loss above 0, in nats per token")
    if a.stages and (a.stage1_iters is not None or a.stage2_iters is not None):
        raise UserError(
            "--stages and --stage1-iters or --stage2-iters both define the stages; give one of them"
        )
    return a


def say_what_is_left_out(
    sources: Sequence[Path],
    rows: Sequence[Row],
    homeless: Sequence[Row],
    used: dict[str, list[Row]],
) -> None:
    """Rows in no stage and in several: nothing is dropped, or counted twice, in silence."""
    if not rows:
        print(f"{', '.join(map(str, sources))}: no rows yet")
    if homeless:
        which = [
            f"{row['run_id']} ({row.where}, num_iterations {row['num_iterations']})"
            for row in homeless
        ]
        print(f"{count(len(homeless), 'row')} in no stage: {listing(which, '; ')}")
    times = Counter(id(row) for own in used.values() for row in own)
    if several := [row["run_id"] for row in rows if times[id(row)] > 1]:
        print(f"{count(len(several), 'row')} in more than one stage: {listing(several)}")


def read_all(a: argparse.Namespace) -> Sources:
    """The rows of all sources, sorted into stages, with what was wrong."""
    by_iters = stages_by_iters(a.stage1_iters or "1500", a.stage2_iters or "800")
    found = Sources()
    for source in a.results_file:
        rows, torn = read_results(source)
        found.rows += rows
        found.problems += torn
    stages = read_stages(a.stages, found.rows) if a.stages else by_iters
    found.stages, found.homeless = sort_into_stages(found.rows, stages)
    for name, (stage, _) in found.stages.items():
        for extra in stage.extra_csv:
            found.extra_paths.append(a.results_file[0].parent / extra)
            more, torn = read_results(found.extra_paths[-1])
            found.extras.setdefault(name, []).extend(more)
            found.problems += torn
    return found


def write_curves(target: Path, rows: Sequence[Row], curves: Curves) -> bool:
    """The validations of a stage's runs in one file, which --curves reads; whether there are any.
    Runs of the old file whose logs are not here any more stay in it."""
    lines = {}
    if target.exists():
        for line in target.read_text().splitlines()[1:]:
            lines.setdefault(line.partition(",")[0], []).append(line)
    for row in rows:
        points = curves(row["run_id"])
        if points:
            lines[row["run_id"]] = [
                csv_line(
                    [
                        row["run_id"],
                        step,
                        loss,
                        round(1000 * s),
                        row["attn_gate"],
                        row["learning_rate"],
                    ]
                )
                for step, s, loss in zip(points.step, points.seconds, points.loss, strict=True)
            ]
    if lines:
        body = [line for own in lines.values() for line in own]
        write_whole(target, "".join(f"{line}\n" for line in [csv_line(CURVE_COLUMNS), *body]))
    return bool(lines)


def write_stage(table: Table, found: Sources, curves: Curves, a: argparse.Namespace) -> list[Path]:
    """Print the table of a stage and write its files; their paths."""
    name = table.stage.name
    rows = found.stages[name][1]
    print(table_text(table, terminal_width()))
    extra = table.stage.extra_csv
    if name in found.extras:
        print(f"  {count(len(found.extras[name]), 'row')} of these from {', '.join(extra)}")
    print()
    written = [a.out_dir / f"results_{name}.csv"]
    write_whole(written[0], results_text(rows))
    sources = [path.name for path in a.results_file] + list(extra)
    for suffix, text in (("csv", table_csv(table)), ("md", table_md(table, sources))):
        written.append(a.out_dir / "tables" / f"{name}.{suffix}")
        write_whole(written[-1], text)
    path = a.out_dir / f"log_curves_{name}.csv"
    if write_curves(path, rows, curves):
        written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments(argv)
    found = read_all(a)
    used = {name: rows for name, (_, rows) in found.stages.items() if rows}
    targets = [a.out_dir / f"results_{name}.csv" for name in used]
    curve_files = [a.out_dir / f"log_curves_{name}.csv" for name in used]
    check_targets(targets, [*a.results_file, *found.extra_paths], found.rows)
    if taken := {p.resolve() for p in curve_files} & {p.resolve() for p in a.curves}:
        raise UserError(f"{taken.pop()} is given with --curves and would be replaced; copy it")
    curves = Curves(a.logs_folder, a.curves)
    tables = [
        make_table([*rows, *found.extras.get(name, [])], found.stages[name][0], curves, a.target)
        for name, rows in used.items()
    ]
    made = {table.stage.name: table for table in hardware_changes(tables)}
    written = []
    for name in found.stages:
        if name in made:
            written += write_stage(made[name], found, curves, a)
        elif a.stages or a.stage1_iters or a.stage2_iters:  # asked for by name
            print(f"{name}: no rows\n")
    say_what_is_left_out(a.results_file, found.rows, found.homeless, used)
    for problem in found.problems:
        print(problem)
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    launch(main)
