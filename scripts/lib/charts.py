"""The data of the page's charts: curves thinned to what an eye can tell apart."""

import math
from collections.abc import Sequence

from lib.curves import make_curve
from lib.findings import Findings, going
from lib.groups import Group, choose, make_groups
from lib.logs import MOST_POINTS, TRACES, RunLog
from lib.program import count
from lib.results import Row, loss_unit
from lib.stats import mean
from lib.tables import Table

MOST_CELLS = 40  # of a stage's curves; those beyond SHOWN are there, switched off


SHOWN = 10


def num(value: float, digits: int = 6) -> float | int | None:
    """A number for a curve: rounded, None for what is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def thin(n: int, most: int) -> list[int]:
    """Which of n points to keep: evenly, first and last among them."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def points(
    step: Sequence[float], seconds: Sequence[float], tokens: Sequence[float], most: int, **ys
) -> dict:
    """A curve for the page: s steps, t seconds, k tokens (a number where tokens are that many
    per step)."""
    keep = thin(len(step), max(2, most))
    out: dict[str, object] = dict(s=[step[i] for i in keep], t=[num(seconds[i], 5) for i in keep])
    rates = {tokens[i] / step[i] for i in keep if step[i]}
    if len(rates) == 1 and math.isfinite(rate := rates.pop()):
        out["k"] = num(rate, 12)
    else:
        out["k"] = [num(tokens[i]) for i in keep]
    return out | {name: [num(y[i]) for i in keep] for name, y in ys.items()}


def of_run(log: RunLog, most: int) -> dict[str, object]:
    out: dict[str, object] = dict(
        val=points(log.val.step, log.val.seconds, log.tokens, most, v=log.val.loss)
    )
    t = log.trace
    if t["step"] and most >= 20:
        ys = {name: t[name] for name in TRACES if any(map(math.isfinite, t[name]))}
        out["trace"] = points(t["step"], t["seconds"], t["tokens"], most, **ys)
    return out


def of_group(group: Group) -> dict[str, object]:
    """A cell's mean curve, at the steps that all its runs have, with smallest and largest."""
    line = make_curve(group.label, [r.val for r in group.runs])
    tokens = dict(zip(group.runs[0].val.step, group.runs[0].tokens, strict=True))
    band = dict(lo=line.low, hi=line.high) if len(group.runs) > 1 else {}
    val = points(
        line.step, line.seconds, [tokens[s] for s in line.step], MOST_POINTS, v=line.loss, **band
    )
    out: dict[str, object] = dict(label=group.title, style=group.style, val=val)
    out["base"] = group.baseline.style if group.baseline else None
    traces = [r.trace for r in group.runs if r.trace["step"]]
    if traces:
        at = [{s: i for i, s in enumerate(t["step"])} for t in traces]
        steps = sorted(set.intersection(*map(set, at)))
        over = lambda name: [
            mean([v for t, i in zip(traces, at, strict=True) if math.isfinite(v := t[name][i[s]])])
            for s in steps
        ]
        ys = {name: y for name in TRACES if any(map(math.isfinite, y := over(name)))}
        out["trace"] = points(steps, over("seconds"), over("tokens"), MOST_POINTS, **ys)
    return out


def curves_of(
    name: str,
    table: Table | None,
    rows: Sequence[Row],
    extra: Sequence[str],
    findings: Findings,
    most: int,
) -> dict:
    """A stage's curves: cells of finished runs, and single runs, unfinished ones among them."""
    groups = make_groups(table, findings.logs) if table else []
    kept, left_out = choose(groups, MOST_CELLS)
    shown = {id(g) for g in choose(kept, SHOWN)[0]}
    cells = [of_group(g) | ({} if id(g) in shown else dict(off=True)) for g in kept]
    runs = single_runs(groups, rows, extra, findings, most) if most else []
    notes = []
    if left_out:
        notes.append(
            f"{count(left_out, 'more cell')} not drawn: baselines and the lowest losses are."
        )
    if len(kept) > SHOWN:
        notes.append(
            f"{len(kept) - SHOWN} of {len(kept)} cells are switched off at first; click them on."
        )
    if most < MOST_POINTS and runs:
        notes.append(f"Single runs have up to {most} points each, to keep the page small.")
    if groups and not most:
        notes.append("Too many runs to draw one by one.")
    return dict(cells=cells, runs=runs, note=" ".join(notes), loss_unit=loss_unit(rows))


def single_runs(
    groups: Sequence[Group],
    rows: Sequence[Row],
    extra: Sequence[str],
    findings: Findings,
    most: int,
) -> list[dict[str, object]]:
    """The curve of each run that has one, in the style of its cell where it has a cell."""
    cell_of = {run.run_id: group for group in groups for run in group.runs}
    status = {row["run_id"]: row.status for row in rows}
    runs: list[dict[str, object]] = []
    for run_id in dict.fromkeys([*status, *extra]):
        log, group = findings.logs.get(run_id), cell_of.get(run_id)
        if log is None or not (log.val.step or log.trace["step"]):
            continue
        live = going(findings, run_id)
        one = dict(id=run_id, label=run_label(log, group, live, status.get(run_id, "no row yet")))
        if group:
            base = group.baseline.style if group.baseline else None
            one |= dict(style=group.style, cell=group.style, base=base)
        else:
            one |= dict(style=len(runs), cell=None, base=None)
        runs.append(one | dict(going=live) | of_run(log, most))
    return runs


def run_label(log: RunLog, group: Group | None, live: bool, state: str) -> str:
    """A run of a cell by cell and seed, any other by its id; and its state where it has to be
    said: a run of a cell is finished, unless it is running again."""
    words = [group.label if group else log.run_id]
    if group and log.seed:
        words.append(f"seed {log.seed}")
    if live:
        words.append("running")
    elif not group:
        words.append(state)
    return " ".join(word for word in words if word)
