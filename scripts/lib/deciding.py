"""Which runs of a sequential stage are still needed, seed by seed.

A block is one seed of the baseline and of all cells that are compared with it. The next block
starts when the one before has ended, and holds the undecided cells and their baselines only.
"""

from collections.abc import Sequence

from lib.progress import Progress
from lib.sequential import UNDECIDED, Decision, decide
from lib.study import Study

ENDED = ("done", "failed", "spared")


def cells_of(runs: Sequence[Progress], stage: str) -> list[Progress]:
    """The runs of a stage that are compared: all but the trunks of forks."""
    return [p for p in runs if p.run.stage == stage and not p.run.stop_after]


def baselines_of(runs: Sequence[Progress]) -> dict[str, str]:
    """For each cell of a stage its baseline, by label: the one of its group, else the first."""
    bases = {p.run.group: p.run.label for p in runs[::-1] if p.run.is_baseline}
    first = next((p.run.label for p in runs if p.run.is_baseline), "")
    cells = {p.run.label: p.run.group for p in runs if not p.run.is_baseline}
    return {label: bases.get(group, first) for label, group in cells.items()}


def differences_of(runs: Sequence[Progress], label: str, base: str) -> list[float]:
    """The paired differences of a cell so far, in the order of their seeds."""
    losses = {(p.run.label, p.run.seed): p.loss for p in runs if p.state == "done"}
    seeds = list(dict.fromkeys(p.run.seed for p in runs))
    pairs = [s for s in seeds if (label, s) in losses and (base, s) in losses]
    return [losses[label, s] - losses[base, s] for s in pairs]


def decisions(study: Study, runs: Sequence[Progress], stage: str) -> dict[str, Decision]:
    """What is decided in a sequential stage, by the label of the cell."""
    own = cells_of(runs, stage)
    return {
        label: decide(differences_of(own, label, base), study.rules[stage])
        for label, base in baselines_of(own).items()
    }


def spare(study: Study, runs: Sequence[Progress]) -> None:
    """Mark what is not needed any more: cells that are decided, baselines of such alone, and
    trunks of such."""
    for stage in study.rules:
        own = cells_of(runs, stage)
        bases = baselines_of(own)
        open_cells = {k for k, d in decisions(study, own, stage).items() if d.word == UNDECIDED}
        needed = open_cells | {bases[label] for label in open_cells}
        for p in own:
            if p.state in ("waiting", "half-done") and p.run.label not in needed:
                p.state = "spared"
    needed_trunks = {p.run.trunk for p in runs if p.state not in ENDED}
    for p in runs:
        if p.run.stop_after and p.state in ("waiting", "half-done"):
            if p.run.content not in needed_trunks:
                p.state = "spared"


def is_due(study: Study, runs: Sequence[Progress], p: Progress) -> bool:
    """Whether a run may start: a fork when its trunk is done, a trunk when one of its forks is
    next, and in a sequential stage only what is next."""
    if p.run.stop_after:
        return any(
            is_next(study, runs, other)
            for other in runs
            if other.run.trunk == p.run.content and other.state not in ENDED
        )
    has_start = p.trunk is None or p.trunk.state == "done"
    return has_start and is_next(study, runs, p)


def is_next(study: Study, runs: Sequence[Progress], p: Progress) -> bool:
    """Whether all blocks before this run's have ended; always in a stage of fixed seeds."""
    if p.run.stage not in study.rules:
        return True
    for other in cells_of(runs, p.run.stage):
        if other.run.seed == p.run.seed:
            return True
        if other.state not in ENDED:
            return False
    return True


def decision_lines(study: Study, runs: Sequence[Progress]) -> list[str]:
    """What is decided, a line per comparison."""
    lines = []
    for stage, rule in study.rules.items():
        for label, d in decisions(study, runs, stage).items():
            if d.n:
                level = f"{100 - 100 * rule.alpha / rule.num_comparisons:g}%"
                span = f"always-valid {level} interval [{d.lo:+.4f}, {d.hi:+.4f}]"
                head = f"{stage}, {label}: {d.word} (delta {rule.delta:g}), "
                lines.append(f"{head}sequential, stopped after {d.n}: {d.diff:+.4f} nats, {span}")
    return lines
