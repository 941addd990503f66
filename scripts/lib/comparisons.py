"""A cell against its baseline: final loss, equal steps, equal time, a target, step time, memory.

Differences are cell minus baseline; losses in nats per token, below 0 is better.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lib.cells import Cell, _number, key_value, keys_of, knobs_in, steps_of
from lib.curves import Curves
from lib.results import Row
from lib.sequential import Rule, decide
from lib.stats import NAN, Judged, Ratio, TTest, judge, mean, ratio, sd

NO_TEST, NO_RATIO = Judged(), Ratio()


@dataclass(frozen=True)
class Effect:
    """A difference in loss at equal steps or at equal time, and where its losses come from."""

    judged: Judged = NO_TEST
    how: str = ""


NO_EFFECT = Effect()


@dataclass(frozen=True)
class Reach:
    """Optimizer steps and seconds of training to the target loss, by seed; runs that never reach
    it have none."""

    steps: Mapping[str, float]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Comparison(Judged):
    """A cell against its baseline. Differences are cell minus baseline: losses in nats per
    token, below 0 is better; a ratio is in % of the baseline's mean."""

    rel_pct: float = NAN  # of the baseline's mean loss
    step_time: Ratio = NO_RATIO
    memory_mib: float = NAN  # peak of one rank
    memory_pct: float = NAN
    equal_steps: Effect = NO_EFFECT
    equal_time: Effect = NO_EFFECT
    steps_to: Ratio = NO_RATIO  # the target; over the runs that reach it
    seconds_to: Ratio = NO_RATIO
    p_holm: float = NAN
    decision: str = ""  # of a sequential stage: better, worse, not better by delta, undecided

    @property
    def overhead_pct(self) -> float:
        return self.step_time.pct

    @property
    def least(self) -> float:
        """The smallest difference that so many seeds, spread as these are, show at 80% power;
        nan without a test."""
        return self.chosen.least if self.chosen else NAN


def compare(
    cell: Cell,
    baseline: Cell,
    curves: Curves | None = None,
    target: float = NAN,
    timed: tuple[str, Cell, Cell] | None = None,
) -> Comparison:
    """`cell` minus `baseline`. `timed`: how long, and both again in runs of that training time
    (TIME_BUDGET_S)."""
    loss = judge(cell.values("final_val_loss"), baseline.values("final_val_loss"))
    values = lambda column: [list(c.values(column).values()) for c in (cell, baseline)]
    base = mean(values("final_val_loss")[1])
    memory, base_memory = map(mean, values("peak_memory_mib"))
    reached = [reach(c, curves, target) for c in (cell, baseline)]
    return Comparison(
        **vars(loss),
        rel_pct=100 * loss.diff / base if base else NAN,
        step_time=ratio(*values("ms_per_step")),
        memory_mib=memory - base_memory,
        memory_pct=100 * (memory / base_memory - 1) if base_memory > 0 else NAN,
        equal_steps=equal_steps(cell, baseline, curves),
        equal_time=equal_time(cell, baseline, curves, timed),
        steps_to=ratio(*(list(r.steps.values()) for r in reached)),
        seconds_to=ratio(*(list(r.seconds.values()) for r in reached)),
    )


def sequentially(found: Comparison, cell: Cell, baseline: Cell, rule: Rule) -> Comparison:
    """The comparison as a stage whose seeds were stopped by what they showed may report it: the
    decision, the always-valid interval, and no p of a plain test anywhere."""
    ours, theirs = cell.values("final_val_loss"), baseline.values("final_val_loss")
    shared = sorted(ours.keys() & theirs.keys(), key=lambda pair: _number(pair.split()[0]))
    differences = [ours[seed] - theirs[seed] for seed in shared]
    if not differences:
        return found
    decision = decide(differences, rule)
    used = tuple(differences[: decision.n])
    plain = Judged(decision.diff, used, sd(used))
    return dataclasses.replace(
        found,
        **vars(plain)
        | dict(
            test=f"sequential, stopped after {decision.n}",
            anytime=TTest(NAN, NAN, NAN, decision.lo, decision.hi),
        ),
        decision=decision.word,
        rel_pct=100 * decision.diff / mean(list(theirs.values())),
        equal_steps=dataclasses.replace(found.equal_steps, judged=plain)
        if found.equal_steps.how == "final losses"
        else NO_EFFECT,
        equal_time=dataclasses.replace(
            found.equal_time, judged=Judged(found.equal_time.judged.diff)
        ),
    )


def equal_steps(cell: Cell, baseline: Cell, curves: Curves | None) -> Effect:
    """The difference after as many steps as the shortest run did; from curves where the runs
    differ in steps."""
    steps = cell.steps | baseline.steps
    fewest = min(steps)
    if len(steps) == 1 or not curves:
        both = (cell.values("final_val_loss"), baseline.values("final_val_loss"))
        return Effect(judge(*both), "final losses") if len(steps) == 1 else Effect()

    def loss(row: Row) -> float:
        if steps_of(row) == fewest:
            return row.number("final_val_loss")
        return points.at_step(fewest) if (points := curves(row["run_id"])) else NAN

    found = judge(cell.per_seed(loss), baseline.per_seed(loss))
    return Effect(found, f"interpolated at step {fewest:.0f}, un-annealed" if found.test else "")


def equal_time(
    cell: Cell, baseline: Cell, curves: Curves | None, timed: tuple[str, Cell, Cell] | None = None
) -> Effect:
    """The difference after equal training time: real runs of equal time where there are any;
    else the slower arm's curves at the time at which the faster arm ends, on average. The
    latter's rate has not come down yet there, so it makes the slower arm look worse than a
    schedule of its own would."""
    budgets = {time_budget(c) for c in (cell, baseline)}
    if len(budgets) == 1 and "" not in budgets:
        timed = (*budgets, cell, baseline)
    if timed:
        both = [c.values("final_val_loss") for c in timed[1:]]
        return Effect(judge(*both), f"runs of TIME_BUDGET_S={timed[0]}")
    times = [mean(list(c.values("train_time_ms").values())) / 1000 for c in (cell, baseline)]
    if not curves or not math.isfinite(sum(times)):
        return Effect()
    end, slower = min(times), cell if times[0] > times[1] else baseline

    def loss(row: Row) -> float:
        if not (points := curves(row["run_id"])):
            return NAN
        if points.seconds[-1] < end and points.step[-1] >= steps_of(row):
            return row.number("final_val_loss")  # this run ended before: by the noise of a clock
        return points.at_seconds(end)

    then, final = (
        slower.per_seed(loss),
        (baseline if slower is cell else cell).values("final_val_loss"),
    )
    found = judge(then, final) if slower is cell else judge(final, then)
    missing = len(slower.by_seed) - len(then)
    part = f" from {len(then)} of {len(slower.by_seed)} seeds" if missing else ""
    return Effect(found, f"interpolated{part}, un-annealed" if found.test else "")


def time_budget(cell: Cell) -> str:
    """The training seconds of its TIME_BUDGET_S, '' without one. In what no key tells apart, the
    rows agree."""
    return next(
        (
            w.split("=", 1)[1]
            for w in knobs_in(cell.rows[0]["notes"])
            if w.startswith("TIME_BUDGET_S=")
        ),
        "",
    )


def timed_pairs(
    cells: Sequence[Cell], pairs: Sequence[tuple[Cell, Cell | None]]
) -> list[tuple[str, Cell, Cell] | None]:
    """For each cell and baseline without a time budget: the two that differ from them in nothing
    but a common one, the budget nearest to the faster arm's own training time; None if there are
    none."""

    known_keys = keys_of([c.rows[0] for c in cells])

    def rest(c: Cell) -> tuple:
        values = [key_value(c.rows[0], key) for key in known_keys if key != "notes"]
        notes = key_value(c.rows[0], "notes").split()
        return *values, *(w for w in notes if not w.startswith("TIME_BUDGET_S="))

    known: dict[tuple, dict[str, Cell]] = {}
    for c in cells:
        if budget := time_budget(c):
            known.setdefault(rest(c), {})[budget] = c
    out: list[tuple[str, Cell, Cell] | None] = []
    for cell, base in pairs:
        both = [
            known.get(rest(c), {}) if known and not time_budget(c) else {}
            for c in (cell, base)
            if c
        ]
        common = sorted(set(both[0]) & set(both[-1])) if len(both) == 2 else []
        if not common:
            out.append(None)
            continue
        own = min(mean(list(c.values("train_time_ms").values())) / 1000 for c in (cell, base))
        budget = min(common, key=lambda b: abs(_number(b) - own))
        out.append((budget, both[0][budget], both[1][budget]))
    return out


def reach(cell: Cell, curves: Curves | None, target: float) -> Reach:
    """From the curves; without a target, from the notes: the first validation at or below the
    TARGET_LOSS that the run itself had."""

    if target in cell.reaches:
        return cell.reaches[target]

    def found(row: Row) -> tuple[float, float]:
        if math.isfinite(target):
            points = curves(row["run_id"]) if curves else None
            return (points.reaches(target) if points else None) or (NAN, NAN)
        told = re.search(r"\breached_step=(\d+) reached_ms=(\d+)\b", row["notes"])
        return (float(told[1]), float(told[2]) / 1000) if told else (NAN, NAN)

    if math.isnan(target) and not any("reached_step=" in row["notes"] for row in cell.rows):
        cell.reaches[target] = Reach({}, {})
    else:
        both = {id(row): found(row) for row in cell.rows}
        steps, seconds = (cell.per_seed(lambda row, i=i: both[id(row)][i]) for i in (0, 1))
        cell.reaches[target] = Reach(steps, seconds)
    return cell.reaches[target]
