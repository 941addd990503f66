"""Everything that the page is made from: rows, stages, logs, states, and what is wrong with them.

A bad file never stops the page: what is wrong with it becomes one of the page's problems.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib.logs import MOST_POINTS, NO_VALIDATION, RunLog, from_curves, read_log
from lib.program import UserError, listing
from lib.results import Row, canon, read_results
from lib.stages import Stage, read_stages, sort_into_stages, stages_by_iters

STALE_S = 120  # a running run tells its status every two seconds


NO_STAGE = "no stage"


@dataclass
class Cache:
    """What was read, by file, with the time and size that the file had then."""

    files: dict[Path, tuple[tuple[int, int], object]] = field(default_factory=dict)

    def read(self, path: Path, reader):
        try:
            stat = path.stat()
            mark = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            mark = (0, 0)
        if path not in self.files or self.files[path][0] != mark:
            try:
                found = reader(path)
            except UserError as error:
                found = error
            self.files[path] = (mark, found)
        return self.files[path][1]


def read_status(path: Path) -> dict[str, object]:
    """A run's status.json; {} when there is none, {'problem': ...} when it cannot be read."""
    try:
        status = json.loads(path.read_text(errors="replace"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return {"problem": f"{path}: cannot be read ({error})"}
    return status if isinstance(status, dict) else {"problem": f"{path}: expected an object"}


def read_text_log(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Knobs and environment as a run's log has them, from its last start; empty where there is
    no log."""
    try:
        with open(path, "rb") as f:
            data = f.read(4_000_000)
    except OSError:
        return {}, {}
    start = data.rfind(b"\nhyperparameters:\n{")
    if start < 0:
        return {}, {}
    text = data[start : start + 60_000].decode("utf-8", errors="replace")
    before = data[max(0, start - 4000) : start].decode("utf-8", errors="replace").split("\n")
    try:
        knobs, end = json.JSONDecoder().raw_decode(text, text.index("{"))
    except ValueError:
        return {}, {}
    env = dict(
        line.split(": ", 1)
        for line in before
        if line.startswith(("git_commit: ", "code_sha256: ", "command: "))
    )
    head, _, tail = text[end:].partition("\n" + "=" * 100)
    torch, _, smi = head.strip().partition("\n")
    env["torch"] = torch
    if (smi := smi.removeprefix("nvidia-smi:").strip()) and smi != "not found":
        env["nvidia-smi"] = smi
    for line in tail.strip("=\n").split("\n"):
        name, colon, value = line.partition(": ")
        if not colon or line.startswith("step:") or " " in name:
            break
        env[name] = value
    return {str(k): json.dumps(v) if not isinstance(v, str) else v for k, v in knobs.items()}, env


@dataclass
class Findings:
    """Everything the page is made from."""

    rows: list[Row] = field(default_factory=list)
    stages: dict[str, tuple[Stage, list[Row]]] = field(default_factory=dict)
    logs: dict[str, RunLog] = field(default_factory=dict)
    status: dict[str, dict[str, object]] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)  # runs with a log and no row
    problems: list[str] = field(default_factory=list)


def some(what: str, names: Sequence[str], most: int = 4) -> str:
    return f"{what}: {listing(list(names), ', ', most)}"


def read_findings(a: argparse.Namespace, cache: Cache) -> Findings:
    """Results, logs and states, and what was wrong with them. Raises nothing for a bad file."""
    findings = Findings()
    _add_rows(findings, a, cache)
    _add_stages(findings, a, cache)
    _add_logs(findings, a, cache)
    now = time.time()
    stale = [
        r for r in findings.status if going(findings, r) and age(findings.status[r], now) > STALE_S
    ]
    if stale:
        findings.problems.append(
            some(f"said to be running, but silent for over {STALE_S} s (killed?)", stale)
        )
    return findings


def _add_rows(findings: Findings, a: argparse.Namespace, cache: Cache) -> None:
    for path in a.results_file:
        found = cache.read(path, read_results)
        if isinstance(found, UserError):
            findings.problems.append(str(found))
            continue
        rows, torn = found
        findings.rows += rows
        findings.problems += torn[:20]
        if len(torn) > 20:
            findings.problems.append(f"{path.name}: {len(torn) - 20} more lines like these")
        if not rows:
            findings.problems.append(f"{path}: no rows yet")


def _add_stages(findings: Findings, a: argparse.Namespace, cache: Cache) -> None:
    """Sort the rows into stages, and add the further files that a stage names."""
    stages = read_stages(a.stages, findings.rows) if a.stages else stages_by_iters("1500", "800")
    sorted_rows, homeless = sort_into_stages(findings.rows, stages)
    findings.stages = {name: (stage, own) for name, (stage, own) in sorted_rows.items() if own}
    if homeless:
        findings.stages[NO_STAGE] = (Stage(NO_STAGE), homeless)
    for stage, own in findings.stages.values():
        for extra in stage.extra_csv:
            more = cache.read(a.results_file[0].parent / extra, read_results)
            if isinstance(more, UserError):
                findings.problems.append(str(more))
            else:
                own += more[0]
                findings.problems += more[1]


def _add_logs(findings: Findings, a: argparse.Namespace, cache: Cache) -> None:
    """Curves and states: from the files of --curves, all others from the folders of runs."""
    seeds = {row["run_id"]: canon(row["seed"]) for row in findings.rows}
    try:
        folders = {p.name for p in a.logs_folder.iterdir() if p.is_dir()}
    except OSError:
        folders = set()
        findings.problems.append(f"{a.logs_folder}: no such folder of logs; there are no curves")
    findings.loose = sorted(
        r for r in folders - seeds.keys() if (a.logs_folder / r / "metrics.csv").exists()
    )
    try:
        findings.logs, wrong = from_curves(a.curves, findings.rows)
        findings.problems += wrong
    except UserError as error:
        findings.problems.append(str(error))
    in_logs: dict[str, list[str]] = {}  # problem: runs that have it
    for run_id in [*seeds, *findings.loose]:
        if run_id in folders and run_id not in findings.logs:  # tables name runs without a curve
            problems = _add_log(findings, a.logs_folder / run_id, seeds.get(run_id, ""), cache)
            for problem in problems:
                in_logs.setdefault(f"metrics.csv, {problem}", []).append(run_id)
    findings.problems += [
        some(f"{what} ({len(runs)})" if len(runs) > 4 else what, runs)
        for what, runs in in_logs.items()
    ]


def _add_log(findings: Findings, folder: Path, seed: str, cache: Cache) -> Sequence[str]:
    """One run's curve and state; returns what is wrong inside its log, which other runs may
    share."""
    run_id = folder.name
    log = cache.read(
        folder / "metrics.csv", lambda path: read_log(path, path.parent.name, "", MOST_POINTS)
    )
    status = cache.read(folder / "status.json", read_status)
    findings.status[run_id] = status
    if "problem" in status:
        findings.problems.append(str(status["problem"]))
    if isinstance(log, UserError):
        findings.problems.append(str(log))
        return ()
    findings.logs[run_id] = dataclasses.replace(log, seed=seed)
    if going(findings, run_id):  # its first validation is still to come
        return [what for what in log.problems if what != NO_VALIDATION]
    return log.problems


def going(findings: Findings, run_id: str) -> bool:
    return findings.status.get(run_id, {}).get("status") == "running"


def age(status: Mapping[str, object], now: float) -> float:
    updated = status.get("updated")
    return now - updated if isinstance(updated, int | float) else math.inf


def is_number(text: str) -> bool:
    """Whether the text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
