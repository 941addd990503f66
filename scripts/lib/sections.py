"""The content of the page's sections, as plain values that the templates show."""

import csv
import io
import math
import time
from collections.abc import Iterable, Mapping, Sequence

from lib.claims import is_settled, seeds_of, sentence, verdict
from lib.findings import NO_STAGE, Findings, age, going, is_number
from lib.groups import Group, labels_of, make_groups, mean_line
from lib.program import count
from lib.render import cells_of, legend_of, pieces_of
from lib.tables import Line, Table, table_csv

MOST_TABLE_LINES = 300  # of a table on the page; the files have all
MOST_CLAIMS = 30  # sentences at the top
MOST_STRIPS = 60
WORDS = ("test", "decision", "flags", "equal time by")  # columns of words


def anchor(name: str) -> str:
    """The id of a stage's section."""
    return "stage-" + "".join(c if c.isalnum() and c.isascii() else "_" for c in name)


def data_table(
    rows: Sequence[Mapping[str, object]], columns: Sequence[str], name: str, words: Sequence[str]
) -> dict[str, object]:
    """A table for the template; `name` says what it is to a reader who does not see it."""
    described = []
    for column in columns:
        numbers = all(str(row[column])[:1] in "-+[0123456789n" for row in rows)
        described.append(dict(name=column, is_number=column not in words and numbers))
    return dict(name=name, columns=described, rows=rows)


class Scale:
    """Places on a strip that shows all differences of a stage and 0."""

    def __init__(self, lines: Iterable[Line]):
        ends = [0.0]
        for line in lines:
            c = line.comparison
            ends += [c.diff, *((c.chosen.lo, c.chosen.hi) if c.chosen else ())]
        self.ends = [v for v in ends if math.isfinite(v)]
        pad = 0.06 * (max(self.ends) - min(self.ends)) or 0.01
        self.low = min(self.ends) - pad
        self.width = max(self.ends) + pad - self.low

    def at(self, value: float) -> str:
        return f"{100 * (value - self.low) / self.width:.2f}%"

    def strip(self, line: Line) -> dict[str, object]:
        """A difference with its interval; without one where it is not known."""
        c = line.comparison
        bar = None
        if c.chosen and math.isfinite(c.chosen.lo + c.chosen.hi):
            bar = (self.at(c.chosen.lo), f"{100 * (c.chosen.hi - c.chosen.lo) / self.width:.2f}%")
        point = self.at(c.diff) if math.isfinite(c.diff) else None
        return dict(zero=self.at(0), bar=bar, point=point, kind=verdict(line)[1])

    def marks(self) -> list[dict[str, str]]:
        """The ticks below: both ends and 0, where they do not run into each other."""
        shown = []
        for value in sorted({min(self.ends), 0.0, max(self.ends)}):
            if value == 0 or abs(value) > 0.15 * self.width:
                shown.append(dict(at=self.at(value), text=f"{value:+.4f}" if value else "0"))
        return shown


def spark(group: Group | None) -> dict[str, str] | None:
    """The mean loss of a cell and of its baseline over the last three quarters of training, as
    points of a picture of 120 by 40."""
    if group is None or group.baseline is None:
        return None
    lines = [mean_line(g.runs, "steps") for g in (group, group.baseline)]
    end = max((line.x[-1] for line in lines if line.x), default=0)
    kept = []
    for line in lines:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if x > 0 and x >= end / 4]
        kept.append(points[:: max(1, len(points) // 60)])
    values = [y for points in kept for _, y in points]
    if min(map(len, kept)) < 2:
        return None
    low, high = min(values), max(values)
    place = lambda x, y: f"{120 * x / end:.1f},{38 - 36 * (y - low) / ((high - low) or 1):.1f}"
    own, base = (" ".join(place(x, y) for x, y in points) for points in kept)
    return dict(own=own, base=base)


def claims_of(tables: Mapping[str, Table], findings: Findings) -> list[dict[str, object]]:
    """One sentence per comparison beside its curve and interval, the settled ones first."""
    found = []
    for name, table in tables.items():
        cells = [line.cell for line in table.lines]
        labels = dict(zip(map(id, cells), labels_of(cells), strict=True))
        compared = [line for line in table.lines if line.comparison]
        scale, groups = Scale(compared), None
        for line in compared:
            words, _ = verdict(line)
            p = line.comparison.p_holm if line.comparison.chosen else 9.0
            order = (not is_settled(line), p if math.isfinite(p) else 0.0, len(found))
            if groups is None and len(found) < 10 * MOST_CLAIMS:
                groups = {g.style: g for g in make_groups(table, findings.logs)}
            group = (groups or {}).get(table.lines.index(line))
            text = sentence(line, labels[id(line.cell)], labels[id(line.baseline)])
            found.append((order, dict(
                id=anchor(name), stage=name, verdict=words, is_settled=is_settled(line),
                text=text, strip=scale.strip(line),
                curve=spark(group) if len(found) < 10 * MOST_CLAIMS else None,
            )))  # fmt: skip
    return [claim for _, claim in sorted(found, key=lambda pair: pair[0])]


def stage_section(name: str, table: Table, num_extra: int) -> dict[str, object]:
    """All of a stage but its curves and runs, which the page's program draws."""
    counted = f"{count(table.num_rows, 'row')}, {table.num_finished} counted, "
    counted += count(len(table.lines), "cell")
    if num_extra:
        counted += f", {num_extra} without a row yet"
    section = dict(id=anchor(name), name=name, counted=counted, notes=legend_of(table))
    section |= dict(pieces=[], strips=[], marks=[], full=None, file="", left_out="")
    section["loss_unit"] = table.loss_unit
    if not table.lines:
        return section
    for title, columns, rows in pieces_of(cells_of(table, MOST_TABLE_LINES), table):
        shown = [*table.keys, *columns]
        piece = data_table(
            rows, shown, f"table of {name}, {title or 'means'}", [*table.keys, *WORDS]
        )
        section["pieces"].append(piece | dict(title=title.capitalize()))
    if len(table.lines) > MOST_TABLE_LINES:
        section["left_out"] = (
            f"The first {MOST_TABLE_LINES} of {len(table.lines)} cells; tables/{name}.csv has all."
        )
    compared = [line for line in table.lines if line.comparison]
    if compared:
        scale = Scale(compared)
        cells = [line.cell for line in table.lines]
        labels = dict(zip(map(id, cells), labels_of(cells), strict=True))
        section["marks"] = scale.marks()
        for line in compared[:MOST_STRIPS]:
            words = f"{line.comparison.diff:+.4f}, {seeds_of(line)}: {verdict(line)[0]}"
            section["strips"].append(
                scale.strip(line) | dict(label=labels[id(line.cell)], words=words)
            )
    header, *body = list(csv.reader(io.StringIO(table_csv(table))))
    rows = [dict(zip(header, fields, strict=True)) for fields in body[:MOST_TABLE_LINES]]
    section["full"] = data_table(rows, header, f"all columns of {name}", table.keys)
    section["file"] = f"tables/{name}.csv"
    if name == NO_STAGE:
        section["file"] = "no table of split_results.py has them"
    return section


def rounded(value: object, form: str) -> str:
    """A number of a status file, as far as a reader wants it; '-' for anything else."""
    return f"{value:{form}}" if isinstance(value, int | float) else "-"


def going_table(findings: Findings) -> dict[str, object] | None:
    """The runs that go on, from their status files; None without any."""
    now = time.time()
    rows = []
    for run_id in sorted(r for r in findings.status if going(findings, r)):
        s = findings.status[run_id]
        silent = age(s, now)
        eta = f"{float(s['eta_s']) / 60:.1f} min" if is_number(str(s.get("eta_s", ""))) else "-"
        rows.append({
            "run": run_id,
            "step": f"{s.get('step', '?')}/{s.get('num_iterations', '?')}",
            "val_loss": rounded(s.get("val_loss"), ".4f"),
            "tokens/s": rounded(s.get("tokens_per_s"), ",.0f"),
            "left": eta,
            "host": str(s.get("host", "-")),
            "heard of": f"{silent:.0f} s ago" if math.isfinite(silent) else "?",
        })  # fmt: skip
    return data_table(rows, list(rows[0]), "running runs", ["run", "host"]) if rows else None
