"""compare.py -- two sets of runs against each other: B minus A.

    python scripts/compare.py attn_gate=none attn_gate=elementwise --stage stage3
    python scripts/compare.py attn_gate=elementwise,GATEOPT=muon attn_gate=elementwise,GATEOPT=adam
    python scripts/compare.py mini-none mini-elementwise        run ids, beginnings, or patterns
    python scripts/compare.py run1,run2 'gated-s*' --target 3.28     several, by comma; with * ? [ ]

A and B name runs in the results file: by run id, by the beginning of it, by a pattern, or by
COLUMN=VALUE (all must hold; NAME=VALUE looks into the notes, and 'NAME=' means: not there). Each
must come to one configuration, run with one or more seeds; if it comes to several, the error says
what tells them apart. Only finished runs count. Loss at equal steps, at equal time, to a target,
step time and memory, as in the tables of split_results.py (docs/experiments.md); p is not
corrected for other comparisons that you make. --rule track3 adds the speedrun board's own test.
Raises   UserError: nothing matches, more than one configuration matches, a run is in both
"""

import argparse
import fnmatch
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from lib.cells import Cell, fitted, key_value, keys_of, make_cells
from lib.comparisons import Effect
from lib.curves import Curves
from lib.program import UserError, add_data_options, count, launch, listing
from lib.render import grid, rounded, terminal_width
from lib.results import Row, canon, read_results
from lib.stages import Stage, read_stages, sort_into_stages, stages_by_iters
from lib.stats import ALPHA, Ratio, mean, p_below
from lib.tables import Table, table_of

WIDTH = 110
BOARD_LOSS, BOARD_MARGIN = 3.28, 0.004  # nats per token, of the speedrun's third track


def value_of(row: Row, name: str) -> str:
    """A column of the row, or a knob in its notes; '' where there is neither."""
    if name in row.values:
        return canon(row[name])
    return next(
        (canon(w.split("=", 1)[1]) for w in row["notes"].split() if w.split("=")[0] == name), ""
    )


def names_in(rows: Sequence[Row]) -> list[str]:
    """Every name that a condition may use."""
    columns = {name for row in rows for name in row.columns}
    return sorted(
        columns | {w.split("=")[0] for row in rows for w in row["notes"].split() if "=" in w}
    )


def select(rows: Sequence[Row], text: str, arm: str) -> list[Row]:
    """The rows that `text` names. Raises UserError when a part of it names none, saying what
    there is."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError(f"{arm} is empty: give run ids or COLUMN=VALUE")
    conditions = [part.split("=", 1) for part in parts if "=" in part]
    if conditions and len(conditions) < len(parts):
        raise UserError(f"{arm}={text}: run ids and COLUMN=VALUE in one; give one kind")
    if conditions:
        return _meeting(
            rows, [(name.strip(), canon(value)) for name, value in conditions], f"{arm}: {text}"
        )
    found: dict[int, Row] = {}
    for part in parts:
        if not (own := [row for row in rows if row["run_id"] == part]):
            pattern = part if re.search(r"[*?[]", part) else part + "*"
            own = [row for row in rows if fnmatch.fnmatchcase(row["run_id"], pattern)]
        if not own:
            near = get_close_matches(part, {row["run_id"] for row in rows}, n=3, cutoff=0.5)
            raise UserError(
                f"{arm}: no run id is or begins with {part!r}"
                + (f"; near: {', '.join(near)}" if near else "")
            )
        found |= {id(row): row for row in own}
    return list(found.values())


def _meeting(rows: Sequence[Row], conditions: Sequence[tuple[str, str]], where: str) -> list[Row]:
    for name, value in conditions:
        kept = [row for row in rows if value_of(row, name) == value]
        if not kept:
            known = names_in(rows)
            near = get_close_matches(name, known, n=1) if name not in known else []
            hint = f"; did you mean {near[0]}?" if near else ""
            there = sorted({value_of(row, name) or "''" for row in rows})
            told = (
                f"its values here: {listing(there)}"
                if name in known
                else f"no column or note {name}{hint}"
            )
            raise UserError(f"{where} matches no run at {name}={value}; {told}")
        rows = kept
    return list(rows)


def arm_of(rows: Sequence[Row], arm: str, text: str) -> Cell:
    """The one configuration of these rows. Raises UserError when none is finished, or when there
    are several."""
    counted = [r for r in rows if r.is_finished and math.isfinite(r.number("final_val_loss"))]
    if not counted:
        how = listing(sorted({f"{row['run_id']} ({row.status})" for row in rows}))
        raise UserError(
            f"{arm}: {text} matches {count(len(rows), 'run')}, none finished with a loss: {how}"
        )
    cells = make_cells(counted, Stage(arm))
    if len(cells) > 1:
        varied = {
            k: sorted({c.key[k] for c in cells})
            for k in cells[0].key
            if len({c.key[k] for c in cells}) > 1
        }
        told = "; ".join(
            f"{k}: {listing([v or chr(39) * 2 for v in values])}" for k, values in varied.items()
        )
        raise UserError(
            f"{arm}: {text} matches {len(cells)} configurations, which differ in {told}; name one"
        )
    return cells[0]


def differing(a: Cell, b: Cell) -> list[str]:
    """Where the configurations differ, as NAME: of A -> of B."""
    out = []
    for key in keys_of([*a.rows, *b.rows]):
        values = [key_value(c.rows[0], key) for c in (a, b)]
        if key == "notes":
            words = [value.split() for value in values]
            out += [
                f"{w} only in {arm}"
                for arm, i in (("A", 0), ("B", 1))
                for w in words[i]
                if w not in words[1 - i]
            ]
        elif (
            values[0] != values[1] and "-" not in values
        ):  # a gate's knob, where one of them has no gate
            out.append(f"{key}: {values[0] or '?'} -> {values[1] or '?'}")
    return out


def described(cell: Cell, arm: str, text: str, num_matched: int) -> list[str]:
    """What an arm is, and of which runs."""
    runs = [f"{row['run_id']} (seed {row['seed']})" for row in cell.rows]
    left = f", {num_matched - len(runs)} not finished" if num_matched > len(runs) else ""
    line = f"{arm}  {text}: {count(len(runs), 'run')}{left}: {listing(runs)}"
    return textwrap.wrap(line, WIDTH, subsequent_indent="   ", break_on_hyphens=False)


@dataclass
class Report:
    """The lines of a comparison: the numbers of A and of B, and B - A."""

    numbers: Sequence[Mapping[str, object]]  # of A and of B
    rows: list[dict[str, str]] = field(default_factory=list)

    def show(
        self,
        name: str,
        form: str,
        key: str,
        diff: str = "-",
        interval: tuple[float, ...] = (),
        p: float = math.nan,
        by: str = "",
    ) -> None:
        """Add a line: `key` of both arms in `form`, and what is known of the difference."""
        values = [rounded(x, key, form) if key else "-" for x in self.numbers]
        if key == "sd":
            values = [
                "n=1" if x["seeds"] == 1 else value
                for x, value in zip(self.numbers, values, strict=True)
            ]
        row = {"": name, "A": values[0], "B": values[1], "B - A": diff}
        finite = interval and all(map(math.isfinite, interval))
        form = "{:+.1f}%" if diff.endswith("%") else "{:+.4f}"
        row["95% CI"] = "[" + ", ".join(form.format(x) for x in interval) + "]" if finite else "-"
        self.rows.append(row | {"p": "-" if math.isnan(p) else f"{p:.2g}", "by": by or "-"})

    def effect(self, name: str, found: Effect, key: str = "", rel: float = math.nan) -> None:
        """A difference in loss; no line where nothing judged it."""
        judged, t = found.judged, found.judged.chosen
        if not judged.test:
            return
        diff = f"{judged.diff:+.4f}" + ("" if math.isnan(rel) else f" ({rel:+.2f}%)")
        how = ", ".join(word for word in (judged.test, found.how) if word)
        interval, p = ((t.lo, t.hi), t.p) if t else ((), math.nan)
        self.show(name, "{:.4f}", key, diff, interval, p, how)

    def share(self, name: str, form: str, key: str, found: Ratio) -> None:
        """A ratio of means; no line where neither arm has the number."""
        if all(x[key] == "" for x in self.numbers):
            return
        diff = "-" if math.isnan(found.pct) else f"{found.pct:+.1f}%"
        by = "Welch on logarithms" if math.isfinite(found.lo) else ""
        self.show(name, form, key, diff, (found.lo, found.hi), by=by)


def report(table: Table) -> list[str]:
    """The comparison line by line: A, B, their difference, its interval and p."""
    base, line = table.lines
    c = line.comparison
    out = Report([base.numbers, line.numbers])
    out.show("seeds (n)", "{}", "seeds")
    out.effect("final loss", Effect(c), "final_loss", c.rel_pct)
    out.show("  sd between seeds", "{:.5f}", "sd")
    if c.equal_steps.how != "final losses":
        out.effect("loss at equal steps", c.equal_steps)
    out.effect("loss at equal time", c.equal_time)
    out.share("ms per step", "{:.2f}", "ms_per_step", c.step_time)
    out.show("training time", "{}", "train_time")
    if math.isfinite(line.target) or any(x["reached"] for x in out.numbers):
        target = f"to {line.target:g}" if math.isfinite(line.target) else "to the runs' TARGET_LOSS"
        out.show(f"seeds that came {target}", "{}", "reached")
        out.share(f"steps {target}", "{:.0f}", "steps_to_target", c.steps_to)
        out.share(f"seconds {target}", "{:.1f}", "seconds_to_target", c.seconds_to)
    if math.isfinite(c.memory_mib):
        diff = f"{c.memory_mib:+.0f} ({c.memory_pct:+.1f}%)"
        out.show("peak memory of a rank, MiB", "{:.0f}", "peak_memory_mib", diff)
    width = min(terminal_width(), WIDTH)
    known = [k for k in out.rows[0] if any(row[k] != "-" for row in out.rows)]
    return grid(out.rows, known, width) or grid(out.rows, known, width, fold=True) or []


def conclusions(a: Cell, b: Cell, table: Table, rule: str = "") -> list[str]:
    """What the numbers allow one to say, and what limits them."""
    line = table.lines[1]
    c, out = line.comparison, []
    if c.chosen:
        word = "below" if c.diff < 0 else "above"
        sure = "distinguishable" if c.chosen.p < ALPHA else "not distinguishable"
        out.append(
            f"final loss: {sure} at 5%; B is {word} A by {abs(c.diff):.4f} {table.loss_unit}"
        )
        out.append(
            f"smallest difference that this n and spread show 4 times in 5: {c.least:.4f} nats "
            f"({c.test} t)"
        )
    elif c.test == "n=1":
        out.append(
            "n=1 in an arm: no interval and no test; a difference of one run may be its seed"
        )
    else:
        out.append(
            "no spread between the runs: they are repeats of one computation, there is nothing "
            "to test"
        )
    if c.equal_time.how.startswith("interpolated"):
        out.append(
            "equal time: the slower arm's curve where the faster arm ends, its rate not yet down; "
            "only runs with TIME_BUDGET_S show who wins"
        )
    if math.isfinite(line.target):
        for arm, cell in (("A", a), ("B", b)):
            p = p_below(list(cell.values("final_val_loss").values()), line.target)
            if math.isfinite(p):
                out.append(
                    f"mean final loss of {arm} is below {line.target:g}: one-sided t, p={p:.2g}"
                )
    if rule == "track3":
        out += track3(a, b)
    return out + list(table.remarks)


def track3(a: Cell, b: Cell) -> list[str]:
    """The speedrun board's test of its third track, which takes a spread of 0.0013 for known: the
    mean is below 3.28 by enough; and the same of one mean against another."""
    means, sizes, out = [], [], []
    for arm, cell in (("A", a), ("B", b)):
        losses = list(cell.values("final_val_loss").values())
        means.append(mean(losses))
        sizes.append(len(losses))
        value = (BOARD_LOSS - means[-1]) * math.sqrt(sizes[-1])
        word = "passes" if value >= BOARD_MARGIN else "does not pass"
        out.append(
            f"track3, {arm}: (3.28 - {means[-1]:.4f}) * sqrt({sizes[-1]}) = {value:.4f}, "
            f"{word} (at least 0.004)"
        )
    value = (means[0] - means[1]) / math.sqrt(1 / sizes[0] + 1 / sizes[1])
    word = "passes" if value >= BOARD_MARGIN else "does not pass"
    out.append(
        f"track3, pairwise: (A - B) / sqrt(1/{sizes[0]} + 1/{sizes[1]}) = {value:.4f}, {word} "
        f"(at least 0.004)"
    )
    return out


def stage_rows(rows: Sequence[Row], a: argparse.Namespace) -> tuple[list[Row], Stage]:
    """The rows of --stage, and the stage; all rows without one."""
    if not a.stage:
        return list(rows), Stage("comparison")
    stages = read_stages(a.stages, rows) if a.stages else stages_by_iters("1500", "800")
    found, _ = sort_into_stages(rows, stages)
    stage, own = found.get(a.stage, (None, []))
    if not own:
        names = listing(sorted(name for name, (_, of) in found.items() if of)) or "none"
        raise UserError(f"--stage {a.stage}: no row belongs to it; stages with rows: {names}")
    return own, Stage(stage.name, train_tokens=stage.train_tokens, target_loss=stage.target_loss)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("a", metavar="A", help="the reference: run ids, or COLUMN=VALUE,...")
    p.add_argument("b", metavar="B", help="what is compared with it")
    p.add_argument("--stage", help="only rows of this stage")
    p.add_argument("--stages", type=Path, metavar="TOML", help="as of split_results.py")
    add_data_options(p, many=True)
    p.add_argument("--rule", choices=("", "track3"), default="", help="add a board's own test")
    p.add_argument(
        "--curves", nargs="+", type=Path, default=[], metavar="CSV", help="validations of many runs"
    )
    p.add_argument(
        "--target", type=float, metavar="NATS", help="report steps and seconds to this loss"
    )
    return p


def read_rows(sources: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """The rows of all sources, and what was wrong with them. Raises UserError when there is no
    row."""
    rows: dict[tuple, Row] = {}
    problems: list[str] = []
    for source in sources:
        own, torn = read_results(source)
        problems += torn
        rows |= {(row.columns, row.line): row for row in own}  # a row that two sources have is one
    if not rows:
        raise UserError(
            f"{', '.join(map(str, sources))}: no rows yet; a trainer appends one when a run ends"
        )
    return list(rows.values()), problems


def main(argv: Sequence[str] | None = None) -> None:
    o = parser().parse_args(argv)
    if o.target is not None and not o.target > 0:
        raise UserError(f"--target {o.target}: expected a loss above 0, in nats per token")
    rows, problems = read_rows(o.results_file)
    rows, stage = stage_rows(rows, o)
    stage = fitted(stage, rows)  # results of trainers without a gate have no such column
    found = {arm: select(rows, text, arm) for arm, text in (("A", o.a), ("B", o.b))}
    if both := sorted({r["run_id"] for r in found["A"]} & {r["run_id"] for r in found["B"]}):
        raise UserError(
            f"{count(len(both), 'run')} in both A and B: {listing(both)}; make A and B exclude them"
        )
    a, b = (arm_of(found[arm], arm, text) for arm, text in (("A", o.a), ("B", o.b)))
    matched = [*found["A"], *found["B"]]
    whole = make_cells(
        [r for r in rows if r.is_finished and math.isfinite(r.number("final_val_loss"))], stage
    )
    table = table_of(
        matched, [(a, None), (b, a)], whole, stage, Curves(o.logs_folder, o.curves), o.target
    )
    out = described(a, "A", o.a, len(found["A"])) + described(b, "B", o.b, len(found["B"]))
    differ = differing(a, b)
    out += textwrap.wrap(f"they differ in {'; '.join(differ) or 'nothing that is recorded'}", WIDTH)
    out += ["", *report(table), ""]
    for note in [*conclusions(a, b, table, o.rule), *problems]:
        out += textwrap.wrap(
            note, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
    print("\n".join(out))


if __name__ == "__main__":
    launch(main)
