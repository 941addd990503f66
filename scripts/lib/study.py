"""A study file: what it may say, and the runs that it asks for.

Raises   UserError with everything that is wrong in the file, one problem a line
"""

import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.program import UserError
from lib.trainers import (
    OWNED,
    Trainer,
    clean_environment,
    content_of,
    effective_knobs,
    load_trainer,
    near,
)


@dataclass(frozen=True)
class Run:
    """One run of a study: a stage, knobs and a seed."""

    stage: str
    given: Mapping[str, str]  # what tells it from the stage's other cells
    seed: int
    env: Mapping[str, str]  # all of the study's knobs
    knobs: object  # the trainer's Knobs, as they will be
    is_baseline: bool
    content: str  # 8 hex digits: stage and effective knobs
    code: str  # 6 hex digits

    @property
    def label(self) -> str:
        """What varies, in few letters: 'elementwise lr=0.004 mlp_match'."""
        words = []
        for name, text in self.given.items():
            value = getattr(self.knobs, name)
            words.append(
                name if value is True else text if isinstance(value, str) else f"{name}={text}"
            )
        return " ".join(words) or "all"

    @property
    def key(self) -> str:
        return f"{self.content}-{self.code}"

    @property
    def default_id(self) -> str:
        words = f"{self.stage} {self.label}".replace("=", "")
        label = re.sub(r"[^A-Za-z0-9.+_]+", "-", words)[:60].strip("-.+_")
        return f"{label}-s{self.seed}-{self.key}"

    @property
    def steps(self) -> int:
        return max(1, getattr(self.knobs, "num_iterations", None) or 1)


@dataclass(frozen=True)
class Study:
    path: Path
    title: str
    trainer: Trainer
    nproc: int
    stages: Mapping[str, str]  # name: what it is about
    baselines: Mapping[str, list[str]]  # by stage: the knobs that make a cell its baseline
    targets: Mapping[str, float]  # by stage, where one is named: a validation loss to reach
    runs: tuple[Run, ...]  # in the order in which they run
    said: str  # what was done about knobs in the environment; mostly ''


class Problems(list):
    """What is wrong with a study file; all of it is said at once."""

    def check_words(self, where: str, table: object, words: Sequence[str]) -> bool:
        """Whether `table` is a table, of `words` only."""
        if not isinstance(table, dict):
            self.append(f"{where}expected a table, found {table!r}")
            return False
        for word in table.keys() - set(words):
            self.append(
                f"{where}{word} is no word of a study file{near(word, words) or '; ' + ', '.join(words)}"
            )
        return True

    def knobs(
        self, where: str, table: object, trainer: Trainer, lists: bool = False
    ) -> dict[str, object]:
        """A table of knobs by field name, values as text (with `lists`, as lists of text)."""
        if not isinstance(table, dict):
            self.append(
                f'{where}: expected a table of knobs such as {{ lr = 0.01, attngate = "none" }}'
            )
            return {}
        found: dict[str, object] = {}
        for word, value in table.items():
            f = trainer.known.get(word.upper())
            if f is None:
                self.append(
                    f"{where}: {word} is no knob of {trainer.path.name}{near(word.upper(), trainer.known).lower()}"
                )
                continue
            if f.name in OWNED:
                self.append(f"{where}: {word} is not for a study's knobs: it is {OWNED[f.name]}")
                continue
            if f.name in found:
                self.append(f"{where}: {word} is given twice (it has several spellings)")
            values = value if lists and isinstance(value, list) else [value]
            if not values:
                self.append(
                    f"{where}: {word} = []: an empty list makes an empty grid; give it a value, or leave it out"
                )
            elif not all(isinstance(v, str | int | float) for v in values):
                expected = (
                    "a value or a list of values" if lists else "one value (lists are for grid)"
                )
                self.append(f"{where}: {word} = {value!r}: expected {expected}")
            else:
                texts = [str(int(v)) if isinstance(v, bool) else str(v) for v in values]
                found[f.name] = texts if lists else texts[0]
        return found


def read_toml(path: Path) -> dict:
    try:
        import tomllib
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        raise UserError(
            f"{path}: reading a study needs Python 3.11 or later (tomllib), this is {version}"
        ) from None
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; those that come along are in experiments/studies/"
        ) from None
    except ValueError as error:  # not TOML, or not text
        raise UserError(f"{path}: {error}") from None


def read_study(
    path: Path, environ: Mapping[str, str] = os.environ, changes: Mapping[str, str] = {}
) -> Study:
    """Read and check a study file; `changes` are knobs of every run that go before the file's.
    Raises UserError with everything that is wrong, one problem a line."""
    tables, problems = read_toml(path), Problems()
    problems.check_words("", tables, ("title", "trainer", "nproc", "knobs", "stage"))
    stages = tables.get("stage", {})
    if not isinstance(tables.get("trainer"), str):
        raise UserError(f'{path}: names no trainer; write trainer = "train_gpt.py"')
    trainer = load_trainer(tables["trainer"])
    machine, said = clean_environment(trainer, environ)
    nproc = tables.get("nproc", 1)
    if isinstance(nproc, bool) or not isinstance(nproc, int) or nproc < 1:
        problems.append(f"nproc = {nproc!r}: expected a number of processes, 1 or more")
    if not isinstance(stages, dict) or not stages:
        problems.append("has no stage; a study has tables [stage.NAME]")
        stages = {}
    common = problems.knobs("[knobs]", tables.get("knobs", {}), trainer)
    changed = problems.knobs("--set", dict(changes), trainer)
    runs: list[Run] = []
    for name, table in stages.items():
        runs += read_stage(name, table, common, trainer, problems, machine, changed)
    if problems:
        text = (
            problems[0]
            if len(problems) == 1
            else "\n  ".join([f"{len(problems)} problems:", *problems])
        )
        raise UserError(f"{path}: {text}")
    about = {name: str(table.get("about", "")) for name, table in stages.items()}
    bases = {
        n: [trainer.known[w.upper()].name for w in table.get("baseline", {})]
        for n, table in stages.items()
    }
    targets = {
        name: table["target_loss"] for name, table in stages.items() if "target_loss" in table
    }
    title = str(tables.get("title", path.stem))
    return Study(path, title, trainer, nproc, about, bases, targets, tuple(runs), said)


def read_stage(
    name: str,
    table: object,
    common: Mapping[str, str],
    trainer: Trainer,
    problems: Problems,
    machine: Mapping[str, str],
    changed: Mapping[str, str],
) -> list[Run]:
    """The runs of one stage in the order in which they run; what is wrong is added to
    `problems`."""
    where = f"[stage.{name}]"
    if not problems.check_words(
        f"{where}: ", table, ("about", "seeds", "baseline", "target_loss", "knobs", "grid", "cells")
    ):
        return []
    if not re.fullmatch(r"[A-Za-z0-9][\w.+]{0,30}", name, re.ASCII):
        problems.append(
            f"{where}: a stage is named in letters, digits, '_' and '.'; it names files"
        )
    seeds = seeds_of(where, table, problems)
    base = (
        dict(machine)
        | common
        | problems.knobs(f"{where} knobs", table.get("knobs", {}), trainer)
        | changed
    )
    if (target := table.get("target_loss")) is not None:
        if isinstance(target, bool) or not isinstance(target, int | float):
            problems.append(f"{where}: target_loss = {target!r}: expected a number of nats")
        elif "TARGET_LOSS" in trainer.known:
            base["target_loss"] = str(target)

    combinations = combinations_of(where, table, trainer, problems)
    if combinations is None:
        return []

    # Effective knobs, through the trainer's own checks. One complaint that many cells share is made
    # once.
    complaints: dict[str, list[str]] = {}
    labels_of: dict[str, str] = {}  # by content
    built: list[tuple[dict[str, str], dict[str, str], object]] = []
    for given in combinations:
        label = " ".join(f"{k}={v}" for k, v in given.items())
        env = {k.upper(): v for k, v in (base | given).items()}
        try:
            k = effective_knobs(trainer, env)
        except UserError as error:
            complaints.setdefault(str(error), []).append(label)
            continue
        if (content := content_of(name, k, trainer)) in labels_of:
            problems.append(
                f"{where}: cells '{labels_of[content]}' and '{label}' are the same training; drop one"
            )
        labels_of.setdefault(content, label)
        built.append((given, env, k))
    for words, labels in complaints.items():
        more = f" (and {len(labels) - 1} more)" if len(labels) > 1 else ""
        problems.append(f"{where}{f' cell {labels[0]}' if labels[0] else ''}{more}: {words}")

    wanted = problems.knobs(f"{where} baseline", table.get("baseline", {}), trainer)
    is_baseline = [False] * len(built)
    if len(combinations) > 1 and not table.get("baseline"):
        problems.append(
            f'{where}: has no baseline; say what is compared with, such as {{ attngate = "none" }}'
        )
    elif wanted and not complaints:
        try:  # effective knobs are compared: 0.01 is 1e-2, and a knob left at its default counts
            upper = {name.upper(): value for name, value in wanted.items()}
            is_baseline = [effective_knobs(trainer, env | upper) == k for _, env, k in built]
        except UserError as error:
            problems.append(f"{where} baseline: {error}")
        else:
            if not any(is_baseline):
                words = " ".join(f"{k}={v}" for k, v in wanted.items())
                problems.append(
                    f"{where}: no cell is the baseline {words}; add it to grid or cells"
                )

    return in_order(name, built, is_baseline, wanted, seeds, trainer)


def seeds_of(where: str, table: Mapping, problems: Problems) -> list[int]:
    seeds = table.get("seeds")
    whole = (
        isinstance(seeds, list)
        and seeds
        and all(isinstance(s, int) and not isinstance(s, bool) for s in seeds)
    )
    if not whole or min(seeds) < 0:
        problems.append(
            f"{where}: seeds = {seeds!r}: expected a list of whole numbers, such as [1337, 1338]"
        )
        seeds = [0]
    elif len(set(seeds)) < len(seeds):
        problems.append(f"{where}: seeds = {seeds}: one occurs twice, and would be the same run")
    return seeds


def combinations_of(
    where: str, table: Mapping, trainer: Trainer, problems: Problems
) -> list[dict[str, str]] | None:
    """The knobs of the stage's cells, from grid and cells; None when something is wrong with
    those."""
    before = len(problems)
    combinations: list[dict[str, str]] = []
    grid = problems.knobs(f"{where} grid", table.get("grid", {}), trainer, lists=True)
    if "grid" in table and not table["grid"]:
        problems.append(
            f"{where}: grid is empty; give it knobs with lists of values, or leave it out"
        )
    if grid:
        combinations += [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]
    listed = table.get("cells", [])
    if not isinstance(listed, list) or ("cells" in table and not listed):
        problems.append(f"{where}: cells = {listed!r}: expected a list of tables of knobs")
        listed = []
    combinations += [problems.knobs(f"{where} cells", cell, trainer) for cell in listed]
    return None if len(problems) > before else combinations or [{}]


def in_order(
    name: str,
    built: Sequence[tuple[dict[str, str], dict[str, str], object]],
    is_baseline: Sequence[bool],
    wanted: Mapping[str, str],
    seeds: Sequence[int],
    trainer: Trainer,
) -> list[Run]:
    """The runs in their order: seed by seed, and within a seed each baseline before what is
    compared with it."""
    # Cells that share all but the baseline's knobs are compared with each other; groups with a
    # baseline come first.
    group = [tuple(sorted((k, v) for k, v in g.items() if k not in wanted)) for g, _, _ in built]
    has_own = {g for g, yes in zip(group, is_baseline, strict=True) if yes}
    order = sorted(
        range(len(built)),
        key=lambda i: (group[i] not in has_own, group.index(group[i]), not is_baseline[i]),
    )
    runs = []
    for seed, i in itertools.product(
        seeds, order
    ):  # seed-major: a comparison has its first pair early
        given, env, k = built[i]
        k = dataclasses.replace(k, seed=seed)
        env = env | dict(SEED=str(seed), STAGE=name)
        content = content_of(name, k, trainer)
        runs.append(Run(name, given, seed, env, k, is_baseline[i], content, trainer.code[:6]))
    return runs
