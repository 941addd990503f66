"""The table of a stage: its lines, their numbers, and what a reader has to know about them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lib.cells import Cell, find_baselines, fitted, is_baseline, make_cells
from lib.comparisons import Comparison, Reach, compare, reach, sequentially, timed_pairs
from lib.curves import Curves
from lib.flags import facts_of, problems_of
from lib.program import listing
from lib.results import Row, csv_line, loss_unit
from lib.stages import Stage
from lib.stats import NAN, holm, mean, sd

NO_REACH = Reach({}, {})
TRUNK = "stopped"  # how a run ends that leaves the checkpoint from which others are forked


@dataclass(frozen=True)
class Line:
    """One line of a table: a cell, its baseline if it has one, and how they compare."""

    cell: Cell
    baseline: Cell | None
    comparison: Comparison | None
    is_baseline: bool
    flags: tuple[str, ...] = ()  # what is wrong with the two, in a word each; the remarks say more
    reach: Reach = NO_REACH
    target: float = NAN

    @cached_property
    def numbers(self) -> dict[str, object]:
        return numbers_of(self)


@dataclass(frozen=True)
class Table:
    """One stage: its lines, and what a reader has to know about them."""

    stage: Stage
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]
    num_rows: int
    num_finished: int
    notes: tuple[str, ...] = ()  # what is no problem, but good to know

    @property
    def keys(self) -> list[str]:
        return list(self.lines[0].cell.key) if self.lines else []

    @property
    def loss_unit(self) -> str:
        return loss_unit(row for line in self.lines for row in line.cell.rows)


def make_table(
    rows: Sequence[Row], stage: Stage, curves: Curves | None = None, target: float | None = None
) -> Table:
    """Cells, comparisons and remarks of a stage's rows. Only finished rows with a finite loss
    count; the remarks name all others. `target` in nats per token, else the stage's."""
    counted = [r for r in rows if r.is_finished and math.isfinite(r.number("final_val_loss"))]
    stage = fitted(stage, rows)
    cells = make_cells(counted, stage)
    bases = [
        None if is_baseline(c, stage) else b
        for c, b in zip(cells, find_baselines(cells, cells, stage), strict=True)
    ]
    table = table_of(rows, list(zip(cells, bases, strict=True)), cells, stage, curves, target)
    if not stage.baseline and len(cells) > 1:
        remark = (
            "nothing is compared: no baseline is named; --stages FILE names one, and "
            "run_study.py writes such a FILE"
        )
        return dataclasses.replace(table, remarks=(*table.remarks, remark))
    if orphans := [
        line.cell.label for line in table.lines if not line.is_baseline and not line.baseline
    ]:
        remark = f"no baseline (a cell that differs in nothing else) for: {listing(orphans, '; ')}"
        table = dataclasses.replace(table, remarks=(*table.remarks, remark))
    return table


def table_of(
    rows: Sequence[Row],
    pairs: Sequence[tuple[Cell, Cell | None]],
    cells: Sequence[Cell],
    stage: Stage,
    curves: Curves | None,
    target: float | None,
) -> Table:
    """The table of these cells, each beside its baseline. `rows`: all there are, counted or not;
    `cells`: where runs of equal time may be found."""
    target = stage.target_loss if target is None else target
    counted = [row for cell, _ in pairs for row in cell.rows]
    timed = timed_pairs(cells, pairs)
    compared = [
        compare(c, b, curves, target, t) if b else None
        for (c, b), t in zip(pairs, timed, strict=True)
    ]
    if stage.sequential:
        compared = [
            sequentially(found, *both, stage.sequential) if found else None
            for both, found in zip(pairs, compared, strict=True)
        ]
    tested = [i for i, c in enumerate(compared) if c and c.chosen and not c.anytime]
    for i, p in zip(tested, holm([compared[i].chosen.p for i in tested]), strict=True):
        compared[i] = dataclasses.replace(compared[i], p_holm=p)
    facts = {
        i: facts_of(c, stage) for i, c in {id(c): c for both in pairs for c in both if c}.items()
    }
    lines = []
    for (cell, base), found in zip(pairs, compared, strict=True):
        wrong = problems_of(*(facts[id(c)] for c in (cell, base) if c))
        reached = reach(cell, curves, target)
        lines.append(
            Line(cell, base, found, is_baseline(cell, stage), tuple(wrong), reached, target)
        )
    remarks = [*_remarks(rows, counted, lines), *_problems(lines, facts)]
    remarks += curves.remarks_of([cell for cell, _ in pairs]) if curves else []
    trunks = sum(row.status == TRUNK for row in rows)
    notes = [f"the cells are forked from {trunks} runs that stopped there"] if trunks else []
    return Table(stage, tuple(lines), tuple(remarks), len(rows), len(counted), tuple(notes))


def _remarks(rows: Sequence[Row], counted: Sequence[Row], lines: Sequence[Line]) -> Iterable[str]:
    finished = {row["run_id"] for row in counted}
    rest: dict[str, list[str]] = {}
    for row in rows:
        if row.status == TRUNK:
            continue
        if not row.is_finished:
            later = " (finished later)" if row["run_id"] in finished else ""
            rest.setdefault(row.status, []).append(row["run_id"] + later)
        elif not math.isfinite(row.number("final_val_loss")):
            rest.setdefault("finished without a loss", []).append(row["run_id"])
    for status, runs in sorted(rest.items()):
        yield f"not counted: {len(runs)} {status}: {listing(runs)}"
    twice = []
    for line in lines:
        for seed, same in line.cell.by_seed.items():
            if len(same) > 1:
                runs = listing([r["run_id"] for r in same])
                times = f"seed {seed} finished {len(same)} times ({runs})"
                twice.append(f"* {line.cell.label}: {times}; it counts once, with the mean")
    yield from twice[:20]
    if len(twice) > 20:
        yield f"* and {len(twice) - 20} more seeds that finished more than once"


def _problems(lines: Sequence[Line], facts: Mapping[int, tuple[frozenset, ...]]) -> Iterable[str]:
    """What the flags mean: mixtures of a comparison, and what is wrong with a cell itself; which
    cells share it."""
    found: dict[str, list[str]] = {}
    for line in lines:
        own = problems_of(facts[id(line.cell)])
        both = problems_of(*(facts[id(c)] for c in (line.cell, line.baseline) if c))
        for flag, what in both.items():
            if what.startswith("mixed") or flag in own:
                found.setdefault(what if what.startswith("mixed") else own[flag], []).append(
                    line.cell.label
                )
    for what, labels in found.items():
        whose = "all cells" if len(labels) == len(lines) > 1 else f"in {listing(labels, '; ')}"
        yield f"{what} ({whose})"


def hardware_changes(tables: Sequence[Table]) -> list[Table]:
    """The tables, each with a remark where its GPUs are not those of the one before: times do
    not compare then."""
    out: list[Table] = []
    for table in tables:
        names = lambda t: sorted(
            {row["gpu_name"] for line in t.lines for row in line.cell.rows} - {""}
        )
        before = next((t for t in reversed(out) if names(t)), None)
        if before and names(table) and names(table) != names(before):
            what = f"{listing(names(before))} in {before.stage.name}, {listing(names(table))} here"
            remark = f"hardware changes between stages: {what}; times of the two do not compare"
            table = dataclasses.replace(table, remarks=(*table.remarks, remark))
        out.append(table)
    return out


def show_ms(ms: float) -> str:
    """Training time as `10m 9.1s`: whole minutes, then seconds with one decimal; hours are
    minutes too, as in the original. 'NA' for nan. Seconds that round to 60.0 carry into the
    minute."""
    if not math.isfinite(ms):
        return "NA"
    minutes, tenths = divmod(round(ms / 100), 600)
    return f"{minutes}m {tenths // 10}.{tenths % 10}s"


def numbers_of(line: Line) -> dict[str, object]:
    """All a table knows about a line, at full precision; nan is ''."""
    values = lambda column: list(line.cell.values(column).values())
    losses = values("final_val_loss")
    out: dict[str, object] = dict(seeds=len(losses), final_loss=mean(losses), sd=sd(losses))
    ms = mean(values("train_time_ms"))
    out |= dict(train_time=show_ms(ms), train_time_ms=ms, ms_per_step=mean(values("ms_per_step")))
    base = (
        "is the baseline"
        if line.is_baseline
        else line.baseline.label
        if line.baseline
        else "no baseline"
    )
    out |= dict(
        baseline=base,
        baseline_seeds=len(line.baseline.values("final_val_loss")) if line.baseline else "",
    )
    c = line.comparison or Comparison()
    interval = lambda name, t: {
        f"{name}ci_lo": t.lo if t else NAN,
        f"{name}ci_hi": t.hi if t else NAN,
    }
    p_of = lambda judged: judged.chosen.p if judged.chosen else NAN
    out |= dict(diff=c.diff, rel_pct=c.rel_pct) | interval("", c.chosen)
    out |= dict(p=p_of(c), p_holm=c.p_holm, test=c.test, least_diff=c.least, decision=c.decision)
    for name, r in dict(
        overhead=c.step_time, steps_to_target=c.steps_to, seconds_to_target=c.seconds_to
    ).items():
        out |= {f"{name}_pct": r.pct, f"{name}_ci_lo": r.lo, f"{name}_ci_hi": r.hi}
    out |= dict(per_seed_diff=" ".join(map(repr, c.per_seed)), sd_diff=c.sd_diff)
    for name in ("welch", "paired"):
        for part, suffix in dict(t="t", df="df", p="p", lo="ci_lo", hi="ci_hi").items():
            out[f"{name}_{suffix}"] = getattr(getattr(c, name), part, NAN)
    for name, effect in dict(equal_steps=c.equal_steps, equal_time=c.equal_time).items():
        j = effect.judged
        out |= {f"{name}_diff": j.diff} | interval(f"{name}_", j.chosen)
        out |= {f"{name}_p": p_of(j), f"{name}_test": j.test, f"{name}_how": effect.how}
    reached = [list(v.values()) for v in (line.reach.steps, line.reach.seconds)]
    out |= dict(target_loss=line.target, reached=len(reached[0]))
    out |= dict(steps_to_target=mean(reached[0]), seconds_to_target=mean(reached[1]))
    out |= dict(
        peak_memory_mib=mean(values("peak_memory_mib")),
        memory_mib=c.memory_mib,
        memory_pct=c.memory_pct,
    )
    out |= dict(
        duplicate_rows=len(line.cell.rows) - len(line.cell.by_seed), flags=" ".join(line.flags)
    )
    return {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in out.items()}


def table_csv(table: Table) -> str:
    """The table for programs: one line per cell, numbers at full precision, both tests. A header
    even without lines, so that a reader finds its columns."""
    lines = [{**line.cell.key, **line.numbers} for line in table.lines]
    columns = list(lines[0]) if lines else ["attn_gate", "seeds", "final_loss", "train_time"]
    return "".join(
        f"{csv_line(row)}\n" for row in [columns, *([line[c] for c in columns] for line in lines)]
    )
