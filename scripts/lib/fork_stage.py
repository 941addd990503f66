"""Forks in a study: cells that start from another cell's checkpoint and go on with their knobs.

A stage with `fork = { from = "CELL", step = N }` has, for each seed, a trunk: a run with the knobs
of that cell that stops at step N and leaves its checkpoint there. All cells of the seed start from
it, and so do those of other stages that are forked from the same cell, seed and step.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.study_stage import Problems, Run
from lib.trainers import Trainer, content_of, plan_of


@dataclass(frozen=True)
class Fork:
    """Where the cells of a stage start."""

    cell: str  # LABEL or STAGE/LABEL
    step: int


def read_fork(stage: str, table: object, trainer: Trainer, problems: Problems) -> Fork | None:
    """The word `fork` of a stage; None where it has none, or one that says nothing useful."""
    if not isinstance(table, dict) or "fork" not in table:
        return None
    where, words = f"[stage.{stage}] fork: ", table["fork"]
    if not problems.check_words(where, words, ("from", "step")):
        return None
    cell, step = words.get("from"), words.get("step")
    if not isinstance(cell, str) or isinstance(step, bool) or not isinstance(step, int) or step < 1:
        problems.append(f'{where}expected {{ from = "CELL", step = N }}, N a whole number above 0')
        return None
    if "FORK_FROM" not in trainer.known:
        problems.append(f"{where}{trainer.path.name} has no knob FORK_FROM, so it makes no forks")
        return None
    return Fork(cell, step)


def add_trunks(
    runs: Sequence[Run], forks: Mapping[str, Fork], trainer: Trainer, problems: Problems
) -> list[Run]:
    """The runs of a study, those of forked stages with their trunk, and each trunk before the
    first run that starts from it."""
    parents = {
        stage: parent_of(stage, fork, runs, forks, problems) for stage, fork in forks.items()
    }
    if problems:
        return list(runs)
    known: set[str] = set()
    found = []
    for run in runs:
        if fork := forks.get(run.stage):
            trunk = trunk_of(run, parents[run.stage], fork, trainer)
            if trunk.content not in known:
                known.add(trunk.content)
                found.append(trunk)
            content = content_of(f"{run.stage} from {trunk.content}", run.knobs, trainer)
            run = dataclasses.replace(
                run, content=content, trunk=trunk.content, first_step=fork.step
            )
        found.append(run)
    return found


def parent_of(
    stage: str, fork: Fork, runs: Sequence[Run], forks: Mapping[str, Fork], problems: Problems
) -> Run | None:
    """A run of the cell that the stage is forked from: of its own stage, else of the first stage
    that has it. None, and a problem, where there is none."""
    where = f"[stage.{stage}] fork: "
    named = [r for r in runs if fork.cell in (r.label, f"{r.stage}/{r.label}")]
    named.sort(key=lambda run: run.stage != stage)
    if not named:
        labels = list(dict.fromkeys(f"{run.stage}/{run.label}" for run in runs))
        problems.append(f"{where}no cell {fork.cell!r}; there are {', '.join(labels)}")
        return None
    if named[0].stage != stage and named[0].stage in forks:
        problems.append(f"{where}cell {fork.cell!r} of stage {named[0].stage} is itself forked")
    shortest = min([named[0], *(r for r in runs if r.stage == stage)], key=lambda run: run.steps)
    if shortest.steps <= fork.step:
        problems.append(
            f"{where}step = {fork.step}, but {shortest.label} has only {shortest.steps} steps"
        )
    return named[0]


def trunk_of(run: Run, parent: Run, fork: Fork, trainer: Trainer) -> Run:
    """The run that leaves the checkpoint for this one."""
    cfg = dataclasses.replace(parent.knobs, seed=run.seed)
    env = {**parent.env, "SEED": str(run.seed), "STAGE": run.stage, "STOP_AFTER": str(fork.step)}
    content = content_of(f"trunk to step {fork.step}", cfg, trainer)
    return dataclasses.replace(
        run, given=parent.given, env=env, knobs=cfg, is_baseline=False, content=content,
        stop_after=fork.step,
    )  # fmt: skip


def checkpoint_path(logs: Path, run_id: str, step: int) -> Path:
    """Where a trunk leaves its checkpoint."""
    return logs / run_id / f"step_{step:06d}"


def fork_problems(runs: Sequence[Run], trainer: Trainer) -> list[str]:
    """The forked cells whose parameters are not those of their trunk, with the reason."""
    trunks = {run.content: run for run in runs if run.stop_after}
    found: dict[str, None] = {}
    for run in runs:
        if run.trunk:
            ours = plan_of(run.knobs, trainer).parameters
            theirs = plan_of(trunks[run.trunk].knobs, trainer).parameters
            if ours != theirs:
                words = f"[stage.{run.stage}] {run.label}: has {ours} parameters, the cell that it "
                words += f"is forked from has {theirs}; a fork may have other knobs, but not other "
                found[words + "parameters"] = None
    return list(found)
