"""A stage of a study file: its words, its cells, the rule that stops its seeds, its runs in
order."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lib.program import UserError
from lib.sequential import Rule
from lib.trainers import OWNED, Trainer, content_of, effective_knobs, near

STOPPING = ("stop", "delta", "alpha", "power", "max_seeds", "sd")
WORDS = ("about", "seeds", "baseline", "target_loss", "knobs", "grid", "cells", "fork", *STOPPING)
Built = tuple[dict[str, str], dict[str, str], object]  # what tells a cell apart, environment, knobs


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
    group: tuple = ()  # cells of one group are compared with the baseline in it
    trunk: str = ""  # content of the run whose checkpoint it starts from
    first_step: int = 0  # of that checkpoint
    stop_after: int = 0  # of a trunk: the step at which it stops and leaves its checkpoint

    @property
    def label(self) -> str:
        """What varies, in few letters: 'elementwise lr=0.004 mlp_match'."""
        words = []
        for name, text in self.given.items():
            value = getattr(self.knobs, name)
            words.append(
                name if value is True else text if isinstance(value, str) else f"{name}={text}"
            )
        label = " ".join(words) or "all"
        return f"trunk of {label}" if self.stop_after else label

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
        return self.stop_after or max(1, getattr(self.knobs, "num_iterations", None) or 1)


class Problems(list):
    """What is wrong with a study file; all of it is said at once."""

    def check_words(self, where: str, table: object, words: Sequence[str]) -> bool:
        """Whether `table` is a table, of `words` only."""
        if not isinstance(table, dict):
            self.append(f"{where}expected a table, found {table!r}")
            return False
        for word in table.keys() - set(words):
            hint = near(word, words) or "; " + ", ".join(words)
            self.append(f"{where}{word} is no word of a study file{hint}")
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
                hint = near(word.upper(), trainer.known).lower()
                self.append(f"{where}: {word} is no knob of {trainer.path.name}{hint}")
                continue
            if f.name in OWNED:
                self.append(f"{where}: {word} is not for a study's knobs: it is {OWNED[f.name]}")
                continue
            if f.name in found:
                self.append(f"{where}: {word} is given twice (it has several spellings)")
            values = value if lists and isinstance(value, list) else [value]
            if not values:
                self.append(
                    f"{where}: {word} = []: an empty list makes an empty grid; give it a value, "
                    f"or leave it out"
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


def read_stage(
    name: str,
    table: object,
    base: Mapping[str, str],
    changed: Mapping[str, str],
    trainer: Trainer,
    problems: Problems,
) -> tuple[list[Run], Rule | None]:
    """The runs of one stage in their order, and the rule that stops its seeds; what is wrong is
    added to `problems`. `base`: knobs of every run of the study, before the stage's own;
    `changed`: knobs behind all of them."""
    where = f"[stage.{name}]"
    if not problems.check_words(f"{where}: ", table, WORDS):
        return [], None
    if not re.fullmatch(r"[A-Za-z0-9][\w.+]{0,30}", name, re.ASCII):
        words = "a stage is named in letters, digits, '_' and '.'; it names files"
        problems.append(f"{where}: {words}")
    seeds = seeds_of(where, table, problems)
    own = problems.knobs(f"{where} knobs", table.get("knobs", {}), trainer)
    base = {**base, **own, **changed}
    target = table.get("target_loss")
    if target is not None:
        if isinstance(target, bool) or not isinstance(target, int | float):
            problems.append(f"{where}: target_loss = {target!r}: expected a number of nats")
        elif "TARGET_LOSS" in trainer.known:
            base["target_loss"] = str(target)
    combinations = combinations_of(where, table, trainer, problems)
    if combinations is None:
        return [], None
    num_problems = len(problems)
    built = build_cells(name, where, combinations, base, trainer, problems)
    wanted = problems.knobs(f"{where} baseline", table.get("baseline", {}), trainer)
    is_baseline = [False] * len(built)
    if len(combinations) > 1 and not table.get("baseline"):
        example = 'such as { attngate = "none" }'
        problems.append(f"{where}: has no baseline; say what is compared with, {example}")
    elif wanted and len(problems) == num_problems:
        is_baseline = find_baselines(where, built, wanted, trainer, problems)
    rule = rule_of(where, table, len(built) - sum(is_baseline), seeds, problems)
    if rule:  # tables know no other order of the seeds
        seeds = [
            *sorted(seeds),
            *range(max(seeds) + 1, max(seeds) + 1 + rule.max_seeds - len(seeds)),
        ]
    return in_order(name, built, is_baseline, wanted, seeds, trainer), rule


def build_cells(
    stage: str,
    where: str,
    combinations: Sequence[Mapping[str, str]],
    base: Mapping[str, str],
    trainer: Trainer,
    problems: Problems,
) -> list[Built]:
    """Effective knobs of each cell, through the trainer's own checks. A complaint that many cells
    share is made once."""
    complaints: dict[str, list[str]] = {}
    labels_of: dict[str, str] = {}  # by content
    built = []
    for given in combinations:
        label = " ".join(f"{k}={v}" for k, v in given.items())
        env = {k.upper(): v for k, v in {**base, **given}.items()}
        try:
            cfg = effective_knobs(trainer, env)
        except UserError as error:
            complaints.setdefault(str(error), []).append(label)
            continue
        content = content_of(stage, cfg, trainer)
        if content in labels_of:
            both = f"'{labels_of[content]}' and '{label}'"
            problems.append(f"{where}: cells {both} are the same training; drop one")
        labels_of.setdefault(content, label)
        built.append((dict(given), env, cfg))
    for words, labels in complaints.items():
        cell = f" cell {labels[0]}" if labels[0] else ""
        more = f" (and {len(labels) - 1} more)" if len(labels) > 1 else ""
        problems.append(f"{where}{cell}{more}: {words}")
    return built


def find_baselines(
    where: str,
    built: Sequence[Built],
    wanted: Mapping[str, str],
    trainer: Trainer,
    problems: Problems,
) -> list[bool]:
    """Which cells are baselines. Effective knobs are compared: 0.01 is 1e-2, and a knob left at
    its default counts."""
    upper = {name.upper(): value for name, value in wanted.items()}
    try:
        found = [effective_knobs(trainer, env | upper) == cfg for _, env, cfg in built]
    except UserError as error:
        problems.append(f"{where} baseline: {error}")
        return [False] * len(built)
    if not any(found):
        words = " ".join(f"{k}={v}" for k, v in wanted.items())
        problems.append(f"{where}: no cell is the baseline {words}; add it to grid or cells")
    return found


def rule_of(
    where: str, table: Mapping, num_comparisons: int, seeds: Sequence[int], problems: Problems
) -> Rule | None:
    """The rule by which the seeds of the stage stop; None where all its seeds run."""
    if "stop" not in table:
        if extra := sorted(set(STOPPING) & set(table)):
            problems.append(f'{where}: {extra[0]} goes with stop = "decided"')
        return None
    if table["stop"] != "decided":
        problems.append(f'{where}: stop = {table["stop"]!r}: expected "decided", or leave it out')
        return None
    numbers = {word: table[word] for word in STOPPING[1:] if word in table}
    for word, value in numbers.items():
        kind = int if word == "max_seeds" else int | float
        if isinstance(value, bool) or not isinstance(value, kind):
            problems.append(f"{where}: {word} = {value!r}: expected a number")
            return None
    if missing := [word for word in ("delta", "max_seeds") if word not in numbers]:
        problems.append(f'{where}: stop = "decided" needs {" and ".join(missing)}')
        return None
    if num_comparisons < 1:
        problems.append(f'{where}: stop = "decided" needs a cell beside the baseline')
        return None
    if numbers["max_seeds"] < len(seeds):
        limit = numbers["max_seeds"]
        problems.append(f"{where}: max_seeds = {limit}, but {len(seeds)} seeds are listed")
    try:
        return Rule(**numbers, num_comparisons=num_comparisons)
    except UserError as error:
        problems.append(f"{where}: {error}")
        return None


def seeds_of(where: str, table: Mapping, problems: Problems) -> list[int]:
    """The stage's seeds as the file lists them."""
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
    built: Sequence[Built],
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
    for seed, i in itertools.product(seeds, order):  # a comparison has its first pair early
        given, env, cfg = built[i]
        cfg = dataclasses.replace(cfg, seed=seed)
        env = env | dict(SEED=str(seed), STAGE=name)
        content = content_of(name, cfg, trainer)
        runs.append(
            Run(name, given, seed, env, cfg, is_baseline[i], content, trainer.code[:6], group[i])
        )
    return runs
