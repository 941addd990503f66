"""split_results.py -- results.csv to one file and one table per stage.

    python scripts/split_results.py
    python scripts/split_results.py --stage1-iters 1500,1501 --stage2-iters 800
    python scripts/split_results.py --target 3.3                          steps and seconds to this loss
    python scripts/split_results.py --results_file old/results_*.csv --stages experiments/stages_original.toml
    python scripts/split_results.py --results_file old/results_*.csv --curves old/val_curves.csv

A row belongs to the stage in its own stage column. Where that is empty, to stage1 or stage2 by num_iterations
(the original's rule), or, with --stages, to every stage whose conditions it meets:

    [stage.stage1]                     # names results_stage1.csv and tables/stage1.csv, .md
    num_iterations = [1500]            # any columns; a row must meet all; a value or a list of values
    learning_rate = 0.0036
    keys = ["gate_act"]                # columns the table has even where they do not vary
    baseline = {attn_gate = "none"}    # what the others are compared with: the cell like them in all else
    extra_csv = ["baseline.csv"]       # further rows for the table, relative to the first source's folder
    target_loss = 3.55                 # report steps and seconds to it; --target beats it
    train_tokens = 900_000_000         # of one pass, for files without a column epochs

Curves come from logs/<run_id>/metrics.csv, or from --curves: one CSV with run_id, step, val_loss and train_time_ms
(or train_time_s).

Writes results_<stage>.csv (rows as they stand), tables/<stage>.csv and tables/<stage>.md, and prints the
tables. No row is lost: those in no stage, unfinished or torn are counted and named, and a results_<stage>.csv
that holds rows no source has is not replaced. docs/experiments.md explains the columns.
Raises   UserError naming file and line, stage or option
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lib.curves import Curves
from lib.program import ROOT, UserError, add_data_options, count, launch, listing, write_whole
from lib.render import table_md, table_text
from lib.results import Row, read_results, results_text
from lib.stages import read_stages, sort_into_stages, stages_by_iters
from lib.tables import hardware_changes, make_table, table_csv


def check_targets(targets: Sequence[Path], sources: Sequence[Path], rows: Sequence[Row]) -> None:
    """Raise UserError before a write that would destroy a source, or rows that are nowhere else."""
    read = {path.resolve() for path in sources}
    fields = lambda row: frozenset((k, v) for k, v in row.values.items() if v)
    verbatim = {(row.columns, row.line) for row in rows}
    known: set[frozenset] = set()
    for target in targets:
        if target.resolve() in read:
            raise UserError(
                f"{target} is a source and would be replaced by its own rows; choose another --out-dir"
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
                f"run {lost[0]['run_id']}); add it to --results_file, move it away, or choose another --out-dir"
            )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    return p.parse_args(argv)


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


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments(argv)
    if a.target is not None and not a.target > 0:
        raise UserError(f"--target {a.target}: expected a loss above 0, in nats per token")
    if a.stages and (a.stage1_iters is not None or a.stage2_iters is not None):
        raise UserError(
            "--stages and --stage1-iters or --stage2-iters both define the stages; give one of them"
        )
    asked = a.stages or a.stage1_iters is not None or a.stage2_iters is not None
    iters = (
        "1500" if a.stage1_iters is None else a.stage1_iters,
        "800" if a.stage2_iters is None else a.stage2_iters,
    )
    stages = [] if a.stages else stages_by_iters(*iters)

    rows: list[Row] = []
    problems: list[str] = []
    for source in a.results_file:
        found = read_results(source)
        rows += found[0]
        problems += found[1]
    stages = read_stages(a.stages, rows) if a.stages else stages
    sorted_rows, homeless = sort_into_stages(rows, stages)

    extras: dict[str, list[Row]] = {}
    extra_paths = []
    for name, (stage, _) in sorted_rows.items():
        for extra in stage.extra_csv:
            extra_paths.append(a.results_file[0].parent / extra)
            more, torn = read_results(extra_paths[-1])
            extras[name] = extras.get(name, []) + more
            problems += torn
    used = {name: own for name, (_, own) in sorted_rows.items() if own}
    targets = {name: a.out_dir / f"results_{name}.csv" for name in used}
    check_targets(list(targets.values()), [*a.results_file, *extra_paths], rows)

    curves = Curves(a.logs_folder, a.curves)
    tables = [
        make_table([*own, *extras.get(name, [])], stage, curves, a.target)
        for name, (stage, own) in sorted_rows.items()
        if own
    ]
    made = {table.stage.name: table for table in hardware_changes(tables)}
    written = []
    for name, target in targets.items():
        write_whole(target, results_text(used[name]))
        written.append(target)
    for name, (stage, own) in sorted_rows.items():
        if not own:
            if asked:  # stage1 and stage2 of the default rule are nobody's wish
                print(f"{name}: no rows\n")
            continue
        table = made[name]
        print(table_text(table))
        if name in extras:
            print(f"  {count(len(extras[name]), 'row')} of these from {', '.join(stage.extra_csv)}")
        print()
        sources = [path.name for path in a.results_file] + list(stage.extra_csv)
        for suffix, text in (("csv", table_csv(table)), ("md", table_md(table, sources))):
            written.append(a.out_dir / "tables" / f"{name}.{suffix}")
            write_whole(written[-1], text)

    say_what_is_left_out(a.results_file, rows, homeless, used)
    for problem in problems:
        print(problem)
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    launch(main)
