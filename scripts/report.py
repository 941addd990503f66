"""report.py -- one page about a study: what ran, what is significant, tables, curves, runs.

    python scripts/report.py                                   -> experiments/report.html, opens from disk
    python scripts/report.py --stages experiments/stages_original.toml --out /tmp/r.html
    python scripts/report.py --watch                           serve it on 127.0.0.1:8765, anew while runs go on

The page is one file without references to anything else; curves are drawn by plotly.js, which is inside. Tables
are those of split_results.py, from the same functions. Curves have at most 200 points each; in a large stage
fewer, and single runs are listed up to a limit that the page names. What is wrong with the files is on the
page, above all else; the page itself is always complete. --watch listens on 127.0.0.1 only.
Raises   UserError naming the file or option: a page that cannot be written, a port that is taken, no plotly
"""

import argparse
import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

import lib_plots as plots
import lib_report as web
import lib_results as lib
from lib_plots import Group, RunLog
from lib_report import esc, num
from lib_results import Row, Stage, Table, UserError

MOST_POINTS = 200  # of a curve
POINTS_OF_RUNS = 60_000  # of all single runs of the page, validations and traces each
MOST_DETAILS = 5_000  # runs whose details are on the page
MOST_TABLE_LINES = 300  # of a table on the page; the files have all
MOST_CELLS = 40  # of a stage's curves; those beyond SHOWN are there, switched off
SHOWN = 10
STALE_S = 120  # a running run tells its status every two seconds
NO_STAGE = "no stage"
WORDS = ("test", "flags", "equal time by")  # columns of words


# ----------------------------------------------------------------------------
# Reading


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
    except (OSError, ValueError) as error:
        return {"problem": f"{path}: cannot be read ({error})"}
    return status if isinstance(status, dict) else {"problem": f"{path}: expected an object"}


def read_text_log(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Knobs and environment as a run's log has them, from its last start; empty where there is no log."""
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
class Study:
    """Everything the page is made from."""

    rows: list[Row] = field(default_factory=list)
    stages: dict[str, tuple[Stage, list[Row]]] = field(default_factory=dict)
    logs: dict[str, RunLog] = field(default_factory=dict)
    status: dict[str, dict[str, object]] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)  # runs with a log and no row
    problems: list[str] = field(default_factory=list)


def some(what: str, names: Sequence[str], most: int = 4) -> str:
    return f"{what}: {lib.listing(list(names), ', ', most)}"


def read_study(a: argparse.Namespace, cache: Cache) -> Study:
    """Results, logs and states, and what was wrong with them. Raises nothing for a bad file."""
    study = Study()
    for path in a.results:
        found = cache.read(path, lib.read_results)
        if isinstance(found, UserError):
            study.problems.append(str(found))
            continue
        study.rows += found[0]
        study.problems += found[1][:20]
        if len(found[1]) > 20:
            study.problems.append(f"{path.name}: {len(found[1]) - 20} more lines like these")
        if not found[0]:
            study.problems.append(f"{path}: no rows yet")
    stages = (
        lib.read_stages(a.stages, study.rows) if a.stages else lib.stages_by_iters("1500", "800")
    )
    sorted_rows, homeless = lib.sort_into_stages(study.rows, stages)
    study.stages = {name: (stage, own) for name, (stage, own) in sorted_rows.items() if own}
    if homeless:
        study.stages[NO_STAGE] = (Stage(NO_STAGE), homeless)

    for stage, own in study.stages.values():
        for extra in stage.extra_csv:
            more = cache.read(a.results[0].parent / extra, lib.read_results)
            if isinstance(more, UserError):
                study.problems.append(str(more))
            else:
                own += more[0]
                study.problems += more[1]

    seeds = {row["run_id"]: lib.canon(row["seed"]) for row in study.rows}
    try:
        folders = {p.name for p in a.logs.iterdir() if p.is_dir()}
    except OSError:
        folders = set()
        study.problems.append(f"{a.logs}: no such folder of logs; there are no curves")
    study.loose = sorted(r for r in folders - seeds.keys() if (a.logs / r / "metrics.csv").exists())
    aside: dict[str, list[str]] = {}  # problem: runs
    try:
        study.logs, wrong = plots.from_curves(a.curves, study.rows)
        study.problems += wrong
    except UserError as error:
        study.problems.append(str(error))
    for run_id in [*seeds, *study.loose]:
        if run_id not in folders or run_id in study.logs:
            continue  # the tables' remarks name runs without a curve
        log = cache.read(
            a.logs / run_id / "metrics.csv",
            lambda p: plots.read_log(p, p.parent.name, "", MOST_POINTS),
        )
        status = cache.read(a.logs / run_id / "status.json", read_status)
        study.status[run_id] = status
        if "problem" in status:
            study.problems.append(str(status["problem"]))
        if isinstance(log, UserError):
            study.problems.append(str(log))
            continue
        for problem in log.problems:
            aside.setdefault(f"metrics.csv, {problem}", []).append(run_id)
        study.logs[run_id] = RunLog(
            run_id, seeds.get(run_id, ""), log.val, log.tokens, log.trace, log.problems
        )
    study.problems += [
        some(f"{what} ({len(runs)})" if len(runs) > 4 else what, runs)
        for what, runs in aside.items()
    ]
    now = time.time()
    stale = [r for r in study.status if going(study, r) and age(study.status[r], now) > STALE_S]
    if stale:
        study.problems.append(
            some(f"said to be running, but silent for over {STALE_S} s (killed?)", stale)
        )
    return study


def going(study: Study, run_id: str) -> bool:
    return study.status.get(run_id, {}).get("status") == "running"


def age(status: Mapping[str, object], now: float) -> float:
    updated = status.get("updated")
    return now - updated if isinstance(updated, int | float) else math.inf


# ----------------------------------------------------------------------------
# Curves


def thin(n: int, most: int) -> list[int]:
    """Which of n points to keep: evenly, first and last among them."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def points(
    step: Sequence[float], seconds: Sequence[float], tokens: Sequence[float], most: int, **ys
) -> dict:
    """A curve for the page: s steps, t seconds, k tokens (a number where tokens are that many per step)."""
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
        ys = {name: t[name] for name in plots.TRACES if any(map(math.isfinite, t[name]))}
        out["trace"] = points(t["step"], t["seconds"], t["tokens"], most, **ys)
    return out


def of_group(group: Group) -> dict[str, object]:
    """A cell's mean curve, at the steps that all its runs have, with smallest and largest."""
    line = lib.make_curve(group.label, [r.val for r in group.runs])
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
        over = lambda name: [lib.mean([v for t, i in zip(traces, at, strict=True)
                                       if math.isfinite(v := t[name][i[s]])]) for s in steps]  # fmt: skip
        ys = {name: y for name in plots.TRACES if any(map(math.isfinite, y := over(name)))}
        out["trace"] = points(steps, over("seconds"), over("tokens"), MOST_POINTS, **ys)
    return out


def curves_of(
    name: str,
    table: Table | None,
    rows: Sequence[Row],
    extra: Sequence[str],
    study: Study,
    most: int,
) -> dict:
    """A stage's curves: cells of finished runs, and single runs, unfinished ones among them."""
    groups = plots.make_groups(table, study.logs) if table else []
    kept, left_out = plots.choose(groups, MOST_CELLS)
    shown = {id(g) for g in plots.choose(kept, SHOWN)[0]}
    cells = [of_group(g) | ({} if id(g) in shown else dict(off=True)) for g in kept]
    runs = []
    if most:
        cell_of = {r.run_id: g for g in groups for r in g.runs}
        status = {row["run_id"]: row.status for row in rows}
        for run_id in dict.fromkeys([*status, *extra]):
            log, group = study.logs.get(run_id), cell_of.get(run_id)
            if log is None or not (log.val.step or log.trace["step"]):
                continue
            live = going(study, run_id)
            words = [
                group.label if group else run_id,
                f"seed {log.seed}" * bool(group and log.seed),
            ]
            words.append("running" if live else "" if group else status.get(run_id, "no row yet"))
            one = dict(
                id=run_id,
                label=" ".join(w for w in words if w),
                style=group.style if group else len(runs),
            )
            one |= dict(cell=group.style if group else None, base=None, going=live) | of_run(
                log, most
            )
            if group and group.baseline:
                one["base"] = group.baseline.style
            runs.append(one)
    notes = []
    if left_out:
        notes.append(
            f"{lib.count(left_out, 'more cell')} not drawn: baselines and the lowest losses are."
        )
    if len(kept) > SHOWN:
        notes.append(
            f"{len(kept) - SHOWN} of {len(kept)} cells are switched off at first; click them on."
        )
    if most < MOST_POINTS and runs:
        notes.append(f"Single runs have up to {most} points each, to keep the page small.")
    if groups and not most:
        notes.append("Too many runs to draw one by one.")
    return dict(cells=cells, runs=runs, note=" ".join(notes))


# ----------------------------------------------------------------------------
# Details of runs


class Pool:
    """Long texts that many runs share (nvidia-smi, commands), stored once; a number stands for one."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def put(self, text: str) -> str | int:
        return self.texts.setdefault(text, len(self.texts)) if len(text) > 60 else text


def factor(dicts: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What all have in common, and what is left of each."""
    common = dict(set.intersection(*(set(d.items()) for d in dicts))) if len(dicts) > 1 else {}
    common = {k: v for k, v in (dicts[0].items() if dicts else ()) if k in common}
    return common, [{k: v for k, v in d.items() if k not in common} for d in dicts]


def details_of(rows: Sequence[Row], extra: Sequence[str], study: Study, a: argparse.Namespace, cache: Cache,
               pool: Pool, most: int) -> dict:  # fmt: skip
    """The newest `most` runs of a stage, those with a log first: result row, knobs, environment."""
    order = sorted(
        range(len(rows)),
        key=lambda i: (rows[i]["run_id"] in study.logs, rows[i]["date"], i),
        reverse=True,
    )
    picked = [rows[i] for i in order[: max(0, most - len(extra))]]
    entries = [(r["run_id"], {k: v for k, v in r.values.items() if v}) for r in picked]
    entries += [(run_id, {}) for run_id in extra]
    lines, result, knobs, env = [], [], [], []
    for run_id, values in entries:
        status = study.status.get(run_id, {})
        state = (
            values.get("status", "finished")
            if values
            else str(status.get("status", "no status.json"))
        )
        loss = values.get("final_val_loss") or str(status.get("val_loss", ""))
        gate = " ".join(values.get(k, "") for k in ("attn_gate", "mixer", "learning_rate")).strip()
        seed = f"seed {values['seed']}" if values.get("seed") else ""
        words = [
            run_id,
            state,
            gate,
            seed,
            f"loss {float(loss):.4f}" if _is_number(loss) else "",
            values.get("notes", ""),
        ]
        lines.append(" | ".join(w for w in words if w))
        result.append(
            values
            | {
                f"status.json {k}": str(v)
                for k, v in status.items()
                if k not in ("run_id", "problem")
            }
        )
        found = (
            cache.read(a.logs / f"{run_id}.txt", read_text_log)
            if run_id in study.status
            else ({}, {})
        )
        knobs.append(found[0])
        env.append(found[1])
    parts = {
        name: factor(dicts) for name, dicts in (("row", result), ("knobs", knobs), ("env", env))
    }
    pooled = lambda d: {k: pool.put(v) for k, v in d.items()}
    details = [
        dict(n=i, line=line, **{name: pooled(rest[i]) for name, (_, rest) in parts.items()})
        for i, line in enumerate(lines)
    ]
    left = len(rows) + len(extra) - len(entries)
    note = (
        f"{len(entries):,} of {len(entries) + left:,} rows are listed: those with a log, newest first."
        if left
        else ""
    )
    common = {name: pooled(common) for name, (common, _) in parts.items()}
    return dict(details=details, common=common, runs_note=note)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ----------------------------------------------------------------------------
# The page


def verdict(line: lib.Line) -> tuple[str, str]:
    """What the table says about a comparison, and how it is coloured."""
    c = line.comparison
    if not c.chosen:
        return f"{c.test}: not tested", "open"
    if not c.p_holm < 0.05:
        return "not settled", "open"
    return ("better", "better") if c.diff < 0 else ("worse", "worse")


def overview(tables: Mapping[str, Table]) -> Iterable[str]:
    """Every comparison of every stage, the settled ones first."""
    rows = []
    for name, table in tables.items():
        labels = plots.labels_of([line.cell for line in table.lines])
        for line, label in zip(table.lines, labels, strict=True):
            if line.comparison:
                words = verdict(line)
                p = line.comparison.p_holm if line.comparison.chosen else 9.0
                rows.append((words[1] == "open", p, name, line, label, words))
    if not rows:
        yield "<p>No comparison yet: it takes a cell and its baseline (the same without a gate).</p>"
        return
    rows.sort(key=lambda r: r[:2])
    settled = sum(not r[0] for r in rows)
    yield f"<p><b>{settled} of {lib.count(len(rows), 'comparison')}</b> settled at 5% (Holm's correction within each "
    yield "stage). Differences in nats per token; below 0 is better. A lower loss after equal steps is not a faster "
    yield "run: see step time, and the difference at equal time where it is known.</p>"
    head = (
        "stage",
        "cell",
        "verdict",
        "difference",
        "95% CI",
        "Holm p",
        "step time",
        "equal time",
        "n",
        "flags",
    )
    cells = "".join(
        f"<th scope=col{' class=num' * (word in head[3:9])}>{word}</th>" for word in head
    )
    yield '<div class="box" tabindex="0" role="region" aria-label="comparisons"><table>'
    yield f"<thead><tr>{cells}</tr></thead><tbody>"
    for _, _, name, line, label, (words, kind) in rows[:50]:
        c = line.comparison
        ci = f"[{c.chosen.lo:+.4f}, {c.chosen.hi:+.4f}]" if c.chosen else "-"
        cost = f"{c.overhead_pct:+.2f}%" if math.isfinite(c.overhead_pct) else "-"
        timed = c.equal_time.judged.diff
        n = " / ".join(str(len(x.values("final_val_loss"))) for x in (line.cell, line.baseline))
        texts = (f"{c.diff:+.4f}", ci, f"{c.p_holm:.2g}" if c.chosen else "-", cost)
        texts += (f"{timed:+.4f}" if math.isfinite(timed) else "-", n)
        yield f'<tr><td><a href="#{anchor(name)}">{esc(name)}</a></td><td>{esc(label)}</td>'
        yield f'<td class="{kind}">{esc(words)}</td>' + "".join(
            f"<td class=num>{t}</td>" for t in texts
        )
        yield f"<td>{esc(' '.join(line.flags) or '-')}</td></tr>\n"
    yield "</tbody></table></div>"
    if len(rows) > 50:
        yield f"<p class=soft>{len(rows) - 50} more in the tables below.</p>"


def anchor(name: str) -> str:
    return "stage-" + "".join(c if c.isalnum() and c.isascii() else "_" for c in name)


def stage_html(name: str, table: Table, num_extra: int) -> Iterable[str]:
    yield f'<section><h2 id="{anchor(name)}">{esc(name)}</h2>'
    counted = f"{lib.count(table.num_rows, 'row')}, {table.num_finished} counted, {lib.count(len(table.lines), 'cell')}"
    yield f"<p class=soft>{counted}{f', {num_extra} without a row yet' if num_extra else ''}</p>"
    if table.lines:
        for title, columns, rows in lib.pieces_of(lib.cells_of(table), table):
            yield f"<h3>{esc(title.capitalize())}</h3>" if title else ""
            yield web.html_table(
                rows[:MOST_TABLE_LINES],
                [*table.keys, *columns],
                f"table of {name}, {title or 'means'}",
                [*table.keys, *WORDS],
            )
        if len(table.lines) > MOST_TABLE_LINES:
            yield f"<p class=soft>The first {MOST_TABLE_LINES} of {len(table.lines)} cells; "
            yield f"tables/{esc(name)}.csv has all.</p>"
    else:
        yield "<p>No finished run with a loss yet.</p>"
    if notes := lib.legend_of(table):
        yield "<ul class=notes>" + "".join(f"<li>{esc(note)}</li>" for note in notes) + "</ul>"
    compared = [line for line in table.lines if line.comparison]
    if compared:
        labels = dict(
            zip(map(id, table.lines), plots.labels_of([x.cell for x in table.lines]), strict=True)
        )
        strips = []
        for line in compared[:60]:
            c, n = (
                line.comparison,
                [len(x.values("final_val_loss")) for x in (line.cell, line.baseline)],
            )
            lo, hi = (c.chosen.lo, c.chosen.hi) if c.chosen else (math.nan, math.nan)
            words, kind = verdict(line)
            counts = f"n={n[0]}" if n[0] == n[1] else f"n={n[0]} against {n[1]}"
            text = f"{c.diff:+.4f}, {counts}" + (
                f", Holm p {c.p_holm:.2g}: {words}" if c.chosen else ", no interval"
            )
            strips.append((labels[id(line)], text, c.diff, lo, hi, kind))
        yield "<h3>Difference to the baseline, nats per token (95% interval; left of 0 is better)</h3>"
        yield web.forest(strips)
    stage_id = esc(anchor(name))
    yield f'<h3>Curves</h3><div data-stage="{stage_id}"><p class=soft>Drawn when seen; needs JavaScript.</p></div>'
    if table.lines:
        header, *body = list(csv.reader(io.StringIO(lib.table_csv(table))))
        rows = [dict(zip(header, fields, strict=True)) for fields in body[:MOST_TABLE_LINES]]
        file = "no table of split_results.py has them" if name == NO_STAGE else f"tables/{name}.csv"
        yield f'<details id="full-{stage_id}"><summary>All columns at full precision ({esc(file)})</summary>'
        yield web.html_table(rows, header, f"all columns of {name}", table.keys) + "</details>"
    yield f'<details id="runs-{stage_id}"><summary>Runs: results, knobs, environment</summary>'
    yield f'<div data-runs="{stage_id}"></div></details></section>'


def going_html(study: Study) -> Iterable[str]:
    now = time.time()
    rows = []
    for run_id in sorted(r for r in study.status if going(study, r)):
        s = study.status[run_id]
        silent = age(s, now)
        eta = f"{float(s['eta_s']) / 60:.1f} min" if _is_number(str(s.get("eta_s", ""))) else "-"
        rows.append({"run": run_id, "step": f"{s.get('step', '?')}/{s.get('num_iterations', '?')}",
                     "val_loss": str(s.get("val_loss", "-")), "tokens/s": str(s.get("tokens_per_s", "-")),
                     "left": eta, "host": str(s.get("host", "-")),
                     "heard of": f"{silent:.0f} s ago" if math.isfinite(silent) else "?"})  # fmt: skip
    if rows:
        yield "<section><h2 id=going>Running</h2>" + web.html_table(
            rows, list(rows[0]), "running runs", ["run", "host"]
        )
        yield "</section>"


def stage_of_loose(study: Study, run_id: str, a: argparse.Namespace, cache: Cache) -> str:
    """Where a run without a row belongs: its knob says so."""
    name = cache.read(a.logs / f"{run_id}.txt", read_text_log)[0].get("stage", "")
    return name if name in study.stages else NO_STAGE


def build(a: argparse.Namespace, cache: Cache) -> tuple[str, dict[str, object]]:
    """The page's main part and its data."""
    study = read_study(a, cache)
    loose: dict[str, list[str]] = {}
    for run_id in study.loose:
        loose.setdefault(stage_of_loose(study, run_id, a, cache), []).append(run_id)
    if NO_STAGE in loose:
        study.stages.setdefault(NO_STAGE, (Stage(NO_STAGE), []))
    curves = lib.Curves(a.logs)
    curves.known |= {run_id: log.val for run_id, log in study.logs.items() if log.val.step}
    made = [lib.make_table(rows, stage, curves, a.target) for stage, rows in study.stages.values()]
    tables = {table.stage.name: table for table in lib.hardware_changes(made)}
    num_logs = max(1, len(study.logs))
    most = min(MOST_POINTS, POINTS_OF_RUNS // num_logs)
    most = most if most >= 4 else 0
    pool, stages = Pool(), []
    num_rows = sum(len(rows) for _, rows in study.stages.values()) + len(study.loose)
    for name, (_, rows) in study.stages.items():
        own = loose.get(name, [])
        share = (
            max(20, MOST_DETAILS * (len(rows) + len(own)) // max(1, num_rows))
            if num_rows > MOST_DETAILS
            else num_rows
        )
        stage = dict(id=anchor(name), name=name) | curves_of(
            name, tables[name], rows, own, study, most
        )
        stages.append(stage | details_of(rows, own, study, a, cache, pool, share))

    problems = [*study.problems]
    for name, table in tables.items():
        problems += [f"{name}: {remark}" for remark in table.remarks]
    out = [
        f"<h1>{esc(a.title)}</h1>",
        f"<p class=soft id=made>made {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC ",
    ]
    out.append(
        f"by scripts/report.py from {esc(', '.join(map(str, a.results)))} and {esc(a.logs)}</p>"
    )
    out.append(
        "<nav>" + " ".join(f'<a href="#{anchor(n)}">{esc(n)}</a>' for n in tables) + "</nav>"
    )
    if problems:
        items = [f"<li>{esc(p)}</li>" for p in problems]
        out.append(
            f"<section class=problems id=problems><h2>{lib.count(len(problems), 'problem')} flagged</h2><ul>"
        )
        out += items[:8]
        if len(items) > 8:
            out.append(
                f"</ul><details id=more-problems><summary>{len(items) - 8} more</summary><ul>"
            )
            out += [*items[8:200], f"<li>and {len(items) - 200} more</li>" * (len(items) > 200)]
        out.append("</ul></details></section>" if len(items) > 8 else "</ul></section>")
    latest = {row["run_id"]: row.status for row in study.rows}
    tally: dict[str, int] = {}
    for status in latest.values():
        tally[status] = tally.get(status, 0) + 1
    tiles = [
        ("runs", len(latest) + len(study.loose)),
        ("stages", len(study.stages)),
        *sorted(tally.items()),
    ]
    if study.loose:
        tiles.append(("without a row yet", len(study.loose)))
    if num_going := sum(going(study, r) for r in study.status):
        tiles.append(("running", num_going))
    out.append("<section><h2 id=overview>Overview</h2><ul class=tiles>")
    out += [f"<li><b>{n:,}</b>{esc(word)}</li>" for word, n in tiles]
    out += ["</ul>", *overview(tables), "</section>", *going_html(study)]
    for name, table in tables.items():
        out += stage_html(name, table, len(loose.get(name, [])))
    data: dict[str, object] = dict(stages=stages, pool=list(pool.texts))
    main = "\n".join(out)
    steady = "\n".join(part for part in out if "id=made" not in part and "id=going" not in part)
    marks = (
        steady
        + json.dumps(data)
        + "".join(str(s.get("updated")) for r, s in study.status.items() if going(study, r))
    )
    data["version"] = hashlib.sha256(marks.encode()).hexdigest()[:16]
    return main, data


# ----------------------------------------------------------------------------
# Watching


class Site:
    """The page, made anew when asked, at most every `every` seconds."""

    def __init__(self, a: argparse.Namespace):
        self.a, self.cache, self.lock = a, Cache(), Lock()
        self.made, self.main, self.data = -math.inf, "", {}

    def fresh(self) -> tuple[str, dict[str, object]]:
        with self.lock:
            if time.monotonic() - self.made > 0.8 * self.a.every:
                self.main, self.data = build(self.a, self.cache)
                self.made = time.monotonic()
            return self.main, self.data


def server(a: argparse.Namespace) -> ThreadingHTTPServer:
    """The page on 127.0.0.1; other machines cannot reach it, nor can a foreign page through a name of its own."""
    site = Site(a)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
                return self.answer(403, "text/plain", "this page is served to 127.0.0.1 only\n")
            path, _, query = self.path.partition("?")
            if path not in ("/", "/live"):
                return self.answer(404, "text/plain", "no such page; / is the report\n")
            try:
                main, data = site.fresh()
            except UserError as error:
                return self.answer(500, "text/plain", f"{error}\n")
            if path == "/":
                return self.answer(200, "text/html", web.page(a.title, main, data, live=a.every))
            if query == f"have={data['version']}":
                return self.answer(204, "text/plain", "")
            self.answer(200, "application/json", json.dumps(dict(main=main, data=data)))

        def answer(self, code: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(code)
            headers = {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": len(body),
                "Cache-Control": "no-store",
            }
            headers |= {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}
            for name, value in headers.items():
                if code != 204 or name != "Content-Length":
                    self.send_header(name, str(value))
            self.end_headers()
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # the reader left
                pass

        def log_message(self, *_) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", a.port), Handler)
    except OSError as error:
        raise UserError(
            f"--port {a.port}: {error.strerror}; choose another, 0 takes a free one"
        ) from None


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=[lib.REPO / "experiments/results.csv"],
        metavar="CSV",
    )
    p.add_argument("--logs", type=Path, default=lib.REPO / "logs", metavar="DIR")
    p.add_argument(
        "--curves", nargs="+", type=Path, default=[], metavar="CSV", help="as of split_results.py"
    )
    p.add_argument("--target", type=float, metavar="NATS", help="as of split_results.py")
    p.add_argument("--stages", type=Path, metavar="TOML", help="as of split_results.py")
    p.add_argument("--out", type=Path, default=lib.REPO / "experiments/report.html", metavar="HTML")
    p.add_argument("--title", default="flatrun: report")
    p.add_argument(
        "--watch", action="store_true", help="serve the page on 127.0.0.1 and keep it up to date"
    )
    p.add_argument(
        "--port", type=int, default=8765, help="of --watch (default 8765; 0: any free one)"
    )
    p.add_argument(
        "--every", type=int, default=5, metavar="S", help="of --watch: seconds between two looks"
    )
    a = p.parse_args(argv)
    if a.target is not None and not a.target > 0:
        raise UserError(f"--target {a.target}: expected a loss above 0, in nats per token")
    if a.every < 1 or not 0 <= a.port < 65536:
        raise UserError(
            f"--every {a.every} --port {a.port}: expected at least 1 second, and a port below 65536"
        )
    if a.watch:
        web.library()  # fails before a browser asks
        with server(a) as site:
            print(f"http://127.0.0.1:{site.server_address[1]}/  (Ctrl-C ends it)", flush=True)
            try:
                site.serve_forever()
            except KeyboardInterrupt:
                print()
        return
    body, data = build(a, Cache())
    text = web.page(a.title, body, data)
    lib.write_whole(a.out, text)
    print(f"{a.out} ({len(text) / 1e6:.1f} MB)")


if __name__ == "__main__":
    lib.launch(main)
