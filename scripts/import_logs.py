"""import_logs.py -- other people's logs as runs, which compare.py, plot.py and report.py then read.

    python scripts/import_logs.py record/*.txt --stage records
    python scripts/import_logs.py mine.txt --diff record/log.txt     how the two sources differ
    python scripts/compare.py SOURCE=1a2b SOURCE=3c4d --stage records --rule track3

A log holds a program's source between lines of '=' and lines such as
"step:125/5100 val_loss:4.1 train_time:..ms step_avg:..ms" (modded-nanogpt from 2024-10 to now, the
original gating study). Each run in it becomes LOGS_FOLDER/<run_id>/metrics.csv, its source beside
it, and a row of RESULTS_FILE: status `imported` where it was validated at its last planned step,
else `failed` or `nan`; notes say SOURCE= the first digits of the source's SHA-256, so that runs of
one program are one configuration. Logs tell no seeds: runs of one source are numbered. A run that
was imported before is left alone.
Raises   UserError naming the file: no log of a run, results of other columns
"""

import argparse
import difflib
import math
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock
from lib.program import UserError, add_data_options, count, launch, write_whole
from lib.results import HEADER, csv_line, read_results
from lib.speedrun_logs import LoggedRun, read_log

from plumbing.csv_files import NEEDED, csv_lines, header_fields, header_line

METRICS = ("step", "train_loss", "val_loss", "train_time_s")


def run_id_of(path: Path, run: LoggedRun, number: int) -> str:
    """From the file's name and what the run measured: the same log gives the same id again."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in path.stem)[:60]
    return f"imported-{name}-{run.sha256[:8]}" + (f"-{number}" if number > 1 else "")


def metrics_text(run: LoggedRun) -> str:
    """The run's metrics.csv."""
    lines = [csv_line(METRICS)]
    for step in sorted({*run.val, *run.train}):
        loss, ms = run.val.get(step, (math.nan, math.nan))
        train_loss, train_ms = run.train.get(step, (math.nan, math.nan))
        seconds = (ms if math.isfinite(ms) else train_ms) / 1000
        values = [train_loss, loss, seconds]
        lines.append(csv_line([step, *("" if math.isnan(v) else f"{v:.6g}" for v in values)]))
    return "\n".join(lines) + "\n"


def row_of(run: LoggedRun, run_id: str, seed: int, stage: str) -> dict[str, str]:
    """The run's row of the results; what a log does not tell stays empty."""
    losses = [loss for loss, _ in run.val.values() if math.isfinite(loss)]
    status = "imported" if run.is_complete else "failed"
    if run.val and math.isnan(run.final_loss):
        status = "nan"
    row = dict(
        run_id=run_id,
        seed=seed,
        num_iterations=run.total_steps,
        steps_done=run.last_step,
        final_val_loss=run.final_loss,
        best_val_loss=min(losses) if losses else math.nan,
        train_time_ms=run.train_ms,
        ms_per_step=run.train_ms / run.last_step if run.last_step else math.nan,
        notes=f"imported SOURCE={run.sha256[:12]}",
        stage=stage,
        status=status,
        code_sha256=run.sha256,
    )
    empty = lambda value: isinstance(value, float) and math.isnan(value)
    return {name: "" if empty(value) else str(value) for name, value in row.items()}


def append_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Append to the results file under its lock; a new file gets all columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        before = path.read_bytes() if path.exists() else b""
        header = header_line(csv_lines(path, before))
        columns = header_fields(path, header, NEEDED) if header else HEADER
        if missing := [name for name in rows[0] if name not in columns]:
            raise UserError(
                f"{path}: has no column {', '.join(missing)}; name another --results_file"
            )
        if before and not before.endswith(b"\n"):
            before += b"\n"
        lines = [] if header else [csv_line(columns)]
        lines += [csv_line([row.get(name, "") for name in columns]) for row in rows]
        write_whole(path, before + ("\n".join(lines) + "\n").encode())


def show_difference(first: Path, second: Path) -> None:
    """How the sources of two logs differ, as a unified diff."""
    a, b = (read_log(path)[0].source.split("\n") for path in (second, first))
    lines = list(difflib.unified_diff(a, b, str(second), str(first), lineterm="", n=2))
    print("\n".join(lines) if lines else f"{first} and {second} hold the same source")


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log files of runs")
    p.add_argument("--stage", default="imported", help="stage of the rows (default imported)")
    p.add_argument("--diff", type=Path, metavar="LOG", help="only show how the sources differ")
    add_data_options(p)
    a = p.parse_args(argv)
    if a.diff:
        for path in a.logs:
            show_difference(path, a.diff)
        return
    known = read_results(a.results_file)[0] if a.results_file.exists() else []
    have = {row["run_id"] for row in known}
    seeds = {}  # by source
    for row in known:
        seeds[row["code_sha256"]] = seeds.get(row["code_sha256"], 0) + 1
    rows = []
    for path in a.logs:
        for number, run in enumerate(read_log(path), start=1):
            run_id = run_id_of(path, run, number)
            for problem in run.problems:
                print(f"{path}: {problem}")
            if run_id in have:
                print(f"{run_id}: imported before")
                continue
            have.add(run_id)
            seeds[run.sha256] = seeds.get(run.sha256, 0) + 1
            write_whole(a.logs_folder / run_id / "metrics.csv", metrics_text(run))
            write_whole(a.logs_folder / run_id / "source.py", run.source)
            rows.append(row_of(run, run_id, seeds[run.sha256], a.stage))
            loss = rows[-1]["final_val_loss"] or "none"
            print(f"{run_id}: {rows[-1]['status']}, step {run.last_step}, val_loss {loss}")
    if rows:
        append_rows(a.results_file, rows)
    print(f"{count(len(rows), 'run')} into {a.results_file}")


if __name__ == "__main__":
    launch(main)
