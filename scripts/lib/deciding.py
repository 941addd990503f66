"""Which runs of a sequential stage are still needed, seed by seed.

A block is one seed of the baseline and of all cells that are compared with it. The next block
starts when the one before has ended, and holds the undecided cells and their baselines only.
"""

from collections.abc import Sequence

from lib.progress import Progress
from lib.sequential import UNDECIDED, Decision, decide
from lib.study import Study

ENDED = ("done", "failed", "spared")


def baselines_of(runs: Sequence[Progress]) -> dict[str, str]:
    """For each cell of a stage its baseline, by label: the one of its group, else the first."""
    bases = {p.run.group: p.run.label for p in runs[::-1] if p.run.is_baseline}
    first = next((p.run.label for p in runs if p.run.is_baseline), "")
    cells = {p.run.label: p.run.group for p in runs if not p.run.is_baseline}
    return {label: bases.get(group, first) for label, group in cells.items()}


def decisions(study: Study, runs: Sequence[Progress], stage: str) -> dict[str, Decision]:
    """What is decided in a sequential stage, by the label of the cell."""
    own = [p for p in runs if p.run.stage == stage]
    losses = {(p.run.label, p.run.seed): p.loss for p in own if p.state == "done"}
    seeds = list(dict.fromkeys(p.run.seed for p in own))
    found = {}
    for label, base in baselines_of(own).items():
        pairs = [s for s in seeds if (label, s) in losses and (base, s) in losses]
        differences = [losses[label, s] - losses[base, s] for s in pairs]
        found[label] = decide(differences, study.rules[stage])
    return found


def spare(study: Study, runs: Sequence[Progress]) -> None:
    """Mark what is not needed any more: cells that are decided, and baselines of such alone."""
    for stage in study.rules:
        own = [p for p in runs if p.run.stage == stage]
        bases = baselines_of(own)
        open_cells = {k for k, d in decisions(study, own, stage).items() if d.word == UNDECIDED}
        needed = open_cells | {bases[label] for label in open_cells}
        for p in own:
            if p.state in ("waiting", "half-done") and p.run.label not in needed:
                p.state = "spared"


def is_due(study: Study, runs: Sequence[Progress], p: Progress) -> bool:
    """Whether all blocks before this run's have ended; always in a stage of fixed seeds."""
    if p.run.stage not in study.rules:
        return True
    for other in runs:
        if other.run.stage == p.run.stage:
            if other.run.seed == p.run.seed:
                return True
            if other.state not in ENDED:
                return False
    return True


def decision_lines(study: Study, runs: Sequence[Progress]) -> list[str]:
    """What is decided, a line per comparison."""
    lines = []
    for stage, rule in study.rules.items():
        own = [p for p in runs if p.run.stage == stage]
        for label, d in decisions(study, own, stage).items():
            if d.n:
                level = f"{100 - 100 * rule.alpha / rule.num_comparisons:g}%"
                span = f"always-valid {level} interval [{d.lo:+.4f}, {d.hi:+.4f}]"
                head = f"{stage}, {label}: {d.word} (delta {rule.delta:g}), "
                lines.append(f"{head}sequential, stopped after {d.n}: {d.diff:+.4f} nats, {span}")
    return lines
