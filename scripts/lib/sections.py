"""The sections of the page: overview, running runs, and one section per stage."""

import csv
import io
import math
import time
from collections.abc import Iterable, Mapping

from lib.findings import NO_STAGE, Findings, age, going, is_number
from lib.groups import labels_of
from lib.page import esc, forest, html_table
from lib.program import count
from lib.render import cells_of, legend_of, pieces_of
from lib.tables import Line, Table, table_csv

MOST_TABLE_LINES = 300  # of a table on the page; the files have all


WORDS = ("test", "flags", "equal time by")  # columns of words


def verdict(line: Line) -> tuple[str, str]:
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
        labels = labels_of([line.cell for line in table.lines])
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
    yield f"<p><b>{settled} of {count(len(rows), 'comparison')}</b> settled at 5% (Holm's correction within each "
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
    counted = f"{count(table.num_rows, 'row')}, {table.num_finished} counted, {count(len(table.lines), 'cell')}"
    yield f"<p class=soft>{counted}{f', {num_extra} without a row yet' if num_extra else ''}</p>"
    if table.lines:
        for title, columns, rows in pieces_of(cells_of(table), table):
            yield f"<h3>{esc(title.capitalize())}</h3>" if title else ""
            yield html_table(
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
    if notes := legend_of(table):
        yield "<ul class=notes>" + "".join(f"<li>{esc(note)}</li>" for note in notes) + "</ul>"
    compared = [line for line in table.lines if line.comparison]
    if compared:
        labels = dict(
            zip(map(id, table.lines), labels_of([x.cell for x in table.lines]), strict=True)
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
        yield forest(strips)
    stage_id = esc(anchor(name))
    yield f'<h3>Curves</h3><div data-stage="{stage_id}"><p class=soft>Drawn when seen; needs JavaScript.</p></div>'
    if table.lines:
        header, *body = list(csv.reader(io.StringIO(table_csv(table))))
        rows = [dict(zip(header, fields, strict=True)) for fields in body[:MOST_TABLE_LINES]]
        file = "no table of split_results.py has them" if name == NO_STAGE else f"tables/{name}.csv"
        yield f'<details id="full-{stage_id}"><summary>All columns at full precision ({esc(file)})</summary>'
        yield html_table(rows, header, f"all columns of {name}", table.keys) + "</details>"
    yield f'<details id="runs-{stage_id}"><summary>Runs: results, knobs, environment</summary>'
    yield f'<div data-runs="{stage_id}"></div></details></section>'


def going_html(findings: Findings) -> Iterable[str]:
    now = time.time()
    rows = []
    for run_id in sorted(r for r in findings.status if going(findings, r)):
        s = findings.status[run_id]
        silent = age(s, now)
        eta = f"{float(s['eta_s']) / 60:.1f} min" if is_number(str(s.get("eta_s", ""))) else "-"
        rows.append(
            {
                "run": run_id,
                "step": f"{s.get('step', '?')}/{s.get('num_iterations', '?')}",
                "val_loss": str(s.get("val_loss", "-")),
                "tokens/s": str(s.get("tokens_per_s", "-")),
                "left": eta,
                "host": str(s.get("host", "-")),
                "heard of": f"{silent:.0f} s ago" if math.isfinite(silent) else "?",
            }
        )
    if rows:
        yield "<section><h2 id=going>Running</h2>" + html_table(
            rows, list(rows[0]), "running runs", ["run", "host"]
        )
        yield "</section>"
