"""What a study will take, and what it runs next: time as measured, seeds as simulated, a budget.

How long runs take is kept in logs/.locks/seconds.csv, one line per attempt, so that it is known to
every launcher and after every restart.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lib.deciding import ENDED, baselines_of, cells_of, decisions, differences_of
from lib.progress import Progress
from lib.sequential import UNDECIDED, Rule, Simulated, simulate
from lib.stats import NAN, mean, paired, sd
from lib.study import Study

PILOT = 3  # pairs of seeds whose spread says more than the guess in the file
STUDIES = 400  # simulated for a forecast


class Pace:
    """Seconds and steps of all attempts at runs, whoever launched them."""

    def __init__(self, logs: Path):
        self.path = logs / ".locks/seconds.csv"
        self.size = -1
        self.spent: dict[str, tuple[float, int]] = {}  # by run id: seconds, steps

    def add(self, run_id: str, seconds: float, steps: int) -> None:
        with open(self.path, "a") as file:
            file.write(f"{run_id},{seconds:.1f},{max(0, steps)}\n")
            file.flush()
            os.fsync(file.fileno())

    def refresh(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self.size:
            return
        self.size, self.spent = size, {}
        for line in self.path.read_text().splitlines() if size else ():
            run_id, _, rest = line.partition(",")
            try:
                seconds, steps = (float(word) for word in rest.split(","))
            except ValueError:  # a line that a crash tore
                continue
            before = self.spent.get(run_id, (0.0, 0))
            self.spent[run_id] = (before[0] + seconds, before[1] + int(steps))

    def spent_s(self, runs: Sequence[Progress]) -> float:
        """Seconds that these runs have taken so far."""
        self.refresh()
        return math.fsum(self.spent.get(p.run_id, (0.0, 0))[0] for p in runs)

    def seconds_per_step(self, runs: Sequence[Progress]) -> float:
        """With all that comes around a step: start, validation, saving. nan where none is known."""
        self.refresh()
        known = [self.spent[p.run_id] for p in runs if p.run_id in self.spent]
        steps = sum(steps for _, steps in known)
        return math.fsum(seconds for seconds, _ in known) / steps if steps else NAN

    def run_s(self, p: Progress, runs: Sequence[Progress]) -> float:
        """Seconds that a whole run of this cell takes: as others of the cell did, else as all."""
        same = [o for o in runs if (o.run.stage, o.run.label) == (p.run.stage, p.run.label)]
        per_step = self.seconds_per_step(same)
        if math.isnan(per_step):
            per_step = self.seconds_per_step(runs)
        return per_step * (p.run.steps - p.run.first_step)


# ----------------------------------------------------------------------------
# Seeds


def spread_of(differences: Sequence[float], rule: Rule) -> tuple[float, str]:
    """The standard deviation to expect of a paired difference, and where it is from."""
    if len(differences) >= PILOT and sd(differences) > 0:
        return sd(differences), f"of {len(differences)} pairs so far"
    return rule.sd, "as the file guesses" if rule.sd > 0 else "not known"


@lru_cache(maxsize=2000)
def forecast(seen: tuple[float, ...], effect: float, spread: float, rule: Rule) -> Simulated:
    """How a comparison goes on from here, if the variant is better by `effect`."""
    return simulate(effect, spread, rule, STUDIES, seen=seen)


@dataclass(frozen=True)
class Expected:
    """Further seeds of the cells of a sequential stage, by label, baselines included."""

    seeds: Mapping[str, float]
    chance: Mapping[str, float]  # to decide, by label of a comparison


def expected_seeds(
    study: Study, runs: Sequence[Progress], stage: str, effect: float | None
) -> Expected:
    """What a sequential stage still takes; with an effect of None, that which was seen so far."""
    own, rule = cells_of(runs, stage), study.rules[stage]
    seeds: dict[str, float] = {}
    chances = {}
    found = decisions(study, runs, stage)
    for label, base in baselines_of(own).items():
        seen = tuple(differences_of(own, label, base))
        spread, _ = spread_of(seen, rule)
        left = rule.max_seeds - len(seen)
        if found[label].word != UNDECIDED or left <= 0:
            continue
        if spread > 0:
            assumed = (-mean(seen) if seen else 0.0) if effect is None else effect
            coming = forecast(seen, assumed, spread, rule)
            left, chances[label] = coming.mean_seeds - len(seen), 1 - coming.shares[-1]
        seeds[label] = left
        seeds[base] = max(left, seeds.get(base, 0.0))
    return Expected(seeds, chances)


# ----------------------------------------------------------------------------
# Time


def stage_s(
    runs: Sequence[Progress], stage: str, pace: Pace, seeds: Mapping[str, float] | None
) -> float:
    """Seconds that a stage still takes, nan while that is unknown; `seeds`: of a sequential one."""
    total = 0.0
    left = [p for p in runs if p.run.stage == stage and p.state not in (*ENDED, "elsewhere")]
    for label in dict.fromkeys(p.run.label for p in left):
        mine = [p for p in left if p.run.label == label]
        whole = pace.run_s(mine[0], runs)
        if seeds is not None:  # a trunk is needed for as many seeds as any cell
            most = seeds.get(label, 0.0) if not mine[0].run.stop_after else max(seeds.values())
            mine = mine[: max(1, math.ceil(most))]
            total += whole * min(most, len(mine))
        else:
            total += whole * len(mine)
        for p in mine:
            done = max(p.step, p.run.first_step) - p.run.first_step
            total -= whole * min(1.0, done / max(1, p.run.steps - p.run.first_step))
    return total if math.isnan(total) else max(0.0, total)


def left_s(study: Study, runs: Sequence[Progress], pace: Pace) -> float:
    """Seconds until nothing is left to do, by the pace of what has ended; of sequential stages,
    as they are expected to go. nan before any run has ended."""
    total = 0.0
    for stage in study.stages:
        seeds = None
        if stage in study.rules:
            seeds = expected_seeds(study, runs, stage, None).seeds
            if not seeds:
                continue
        total += stage_s(runs, stage, pace, seeds)
    return total


def forecast_lines(study: Study, runs: Sequence[Progress], pace: Pace) -> list[str]:
    """What --dry_run predicts: seeds and the chance to decide, from the pilot's spread; time."""
    lines = []
    for stage, rule in study.rules.items():
        own = cells_of(runs, stage)
        cases = [("no effect", 0.0), (f"an effect of delta = {rule.delta:g}", rule.delta)]
        coming = [expected_seeds(study, runs, stage, effect) for _, effect in cases]
        for label, base in baselines_of(own).items():
            seen = differences_of(own, label, base)
            spread, source = spread_of(seen, rule)
            head = f"{stage}, {label}: sd of a difference {spread:.2g}, {source}"
            if label not in coming[0].chance:
                is_open = label in coming[0].seeds
                reason = "no forecast without sd" if is_open else "nothing is left to decide"
                lines.append(f"{head}; {reason}")
                continue
            lines.append(f"{head}; further seeds, and the chance to decide:")
            for (words, _), case in zip(cases, coming, strict=True):
                left, chance = case.seeds[label], case.chance[label]
                lines.append(f"    with {words}: {left:.1f} seeds, {100 * chance:.0f}%")
        if coming[0].seeds:
            times = [minutes(stage_s(runs, stage, pace, case.seeds)) for case in coming]
            lines.append(f"{stage}: {times[0]} with no effect, {times[1]} with effects of delta")
    seconds = left_s(study, runs, pace)
    lines.append(f"time left, by the pace of the runs that have ended: {minutes(seconds)}")
    if study.budget_s:
        spent = pace.spent_s(runs)
        lines.append(f"budget_s = {study.budget_s:g}: {spent:.0f} s of it are spent")
    return lines


def minutes(seconds: float) -> str:
    return f"about {seconds / 60:.1f} min" if math.isfinite(seconds) else "not known yet"


# ----------------------------------------------------------------------------
# Order within a budget


def widths(study: Study, runs: Sequence[Progress]) -> dict[tuple[str, str], tuple[float, int]]:
    """By stage and cell: the width of the widest undecided interval that a further seed of it
    makes narrower, and the pairs it rests on. Baselines serve all that are compared with them."""
    found: dict[tuple[str, str], tuple[float, int]] = {}
    for stage in study.stages:
        own = cells_of(runs, stage)
        decided = decisions(study, runs, stage) if stage in study.rules else {}
        for label, base in baselines_of(own).items():
            seen = differences_of(own, label, base)
            if stage in study.rules:
                d = decided[label]
                width = d.hi - d.lo if d.word == UNDECIDED else 0.0
            else:
                test = paired(seen, [0.0] * len(seen))
                width = test.hi - test.lo if test else math.inf
            for cell in (label, base):
                now = (width, len(seen))
                before = found.get((stage, cell), now)
                found[stage, cell] = max(before, now, key=lambda w: (w[0], -w[1]))
    return found


def by_width(study: Study, runs: Sequence[Progress]) -> list[Progress]:
    """The runs, those first that decide most: of the widest undecided comparison, of the fewest
    seeds where several are equally wide. Trunks go with their forks."""
    known = widths(study, runs)

    def place(p: Progress) -> tuple[float, int]:
        width, pairs = known.get((p.run.stage, p.run.label), (math.inf, 0))
        return -width, pairs

    def place_of_any(p: Progress) -> tuple[float, int]:
        if not p.run.stop_after:
            return place(p)
        forks = [o for o in runs if o.run.trunk == p.run.content and o.state not in ENDED]
        return min(map(place, forks), default=(0.0, 0))

    return sorted(runs, key=place_of_any)


def affordable(study: Study, runs: Sequence[Progress], p: Progress, pace: Pace) -> bool:
    """Whether the budget has room for a run: it must not begin what it cannot end."""
    if not study.budget_s:
        return True
    spent, coming = pace.spent_s(runs), pace.run_s(p, runs)
    if math.isnan(coming):
        return spent < study.budget_s
    done = max(p.step, p.run.first_step) - p.run.first_step
    coming *= 1 - done / max(1, p.run.steps - p.run.first_step)
    return spent + coming <= study.budget_s


def is_next_within_budget(runs: Sequence[Progress], p: Progress) -> bool:
    """With a budget each cell goes on by itself, seed by seed."""
    return all(
        other.state in ENDED or other.run.seed == p.run.seed
        for other in runs[: next(i for i, o in enumerate(runs) if o is p)]
        if (other.run.stage, other.run.label) == (p.run.stage, p.run.label)
    )
