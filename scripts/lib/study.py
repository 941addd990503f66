"""A study file: what it may say, and the runs that it asks for.

Raises   UserError with everything that is wrong in the file, one problem a line
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lib.fork_stage import add_trunks, read_fork
from lib.program import UserError, read_toml
from lib.sequential import Rule
from lib.study_stage import Problems, Run, read_stage
from lib.trainers import Trainer, clean_environment, load_trainer


@dataclass(frozen=True)
class Study:
    """What a study file asks for."""

    path: Path
    title: str
    trainer: Trainer
    nproc: int
    stages: Mapping[str, str]  # name: what it is about
    baselines: Mapping[str, list[str]]  # by stage: the knobs that make a cell its baseline
    targets: Mapping[str, float]  # by stage, where one is named: a validation loss to reach
    rules: Mapping[str, Rule]  # by stage, where its seeds stop when all is decided
    runs: tuple[Run, ...]  # in the order in which they run
    budget_s: float  # of training, start to end; 0: no limit
    said: str  # what was done about knobs in the environment; mostly ''


def read_study(
    path: Path, environ: Mapping[str, str] = os.environ, changes: Mapping[str, str] = {}
) -> Study:
    """Read and check a study file; `changes` are knobs of every run that go before the file's.
    Raises UserError with everything that is wrong, one problem a line."""
    tables = read_toml(path, "experiments/studies/ has examples")
    problems = Problems()
    problems.check_words("", tables, ("title", "trainer", "nproc", "budget_s", "knobs", "stage"))
    stages = tables.get("stage", {})
    if not isinstance(tables.get("trainer"), str):
        raise UserError(f'{path}: names no trainer; write trainer = "train_gpt.py"')
    trainer = load_trainer(tables["trainer"])
    machine, said = clean_environment(trainer, environ)
    nproc = tables.get("nproc", 1)
    if isinstance(nproc, bool) or not isinstance(nproc, int) or nproc < 1:
        problems.append(f"nproc = {nproc!r}: expected a number of processes, 1 or more")
    budget_s = tables.get("budget_s", 0.0)
    if isinstance(budget_s, bool) or not isinstance(budget_s, int | float) or budget_s < 0:
        problems.append(f"budget_s = {budget_s!r}: expected seconds, above 0")
    if not isinstance(stages, dict) or not stages:
        problems.append("has no stage; a study has tables [stage.NAME]")
        stages = {}
    common = problems.knobs("[knobs]", tables.get("knobs", {}), trainer)
    changed = problems.knobs("--set", dict(changes), trainer)
    runs, rules, forks = [], {}, {}
    for name, table in stages.items():
        own, rule = read_stage(name, table, machine | common, changed, trainer, problems)
        runs += own
        if rule:
            rules[name] = rule
        if fork := read_fork(name, table, trainer, problems):
            forks[name] = fork
    runs = add_trunks(runs, forks, trainer, problems)
    if problems:
        head = [f"{len(problems)} problems:"] if len(problems) > 1 else []
        raise UserError(f"{path}: " + "\n  ".join([*head, *problems]))
    about = {name: str(table.get("about", "")) for name, table in stages.items()}
    bases = {
        n: [trainer.known[w.upper()].name for w in table.get("baseline", {})]
        for n, table in stages.items()
    }
    targets = {
        name: table["target_loss"] for name, table in stages.items() if "target_loss" in table
    }
    title = str(tables.get("title", path.stem))
    words = (path, title, trainer, nproc, about, bases, targets, rules, tuple(runs))
    return Study(*words, budget_s, said)
