"""run_study.py -- run what is missing of a study, and only that.

    python scripts/run_study.py experiments/studies/mini.toml              # again after any interruption: it goes on
    python scripts/run_study.py experiments/studies/gating.toml --stage stage1,stage2 --nproc 8
    python scripts/run_study.py FILE --dry_run                             # the cells, their state, their tokens
    python scripts/run_study.py FILE --slurm jobs --nodes 2                # job files instead of runs
    python scripts/run_study.py FILE --set device=cuda --set data=PATH     # knobs of every run, before the file's

A study file (TOML, Python 3.11) says what is compared with what:

    title = "Which gate"
    trainer = "train_gpt.py"                     # relative to the repository; any program with Knobs, PRESETS, FREE
    nproc = 8                                    # processes of a run (default 1); --nproc overrides

    [knobs]                                      # of every run; names as in `python TRAINER --help`
    val_every = 125

    [stage.stage1]                               # stages run in this order; the name goes into the results row
    about = "at the record's learning rate"      # may be left out, as all below but seeds and baseline
    seeds = [1337, 1338]                         # every cell runs once per seed
    baseline = { attngate = "none" }             # what the others are compared with
    target_loss = 3.6                            # nats; tables give steps and seconds to it
    knobs = { num_iterations = 1500 }            # of every run of the stage; go before [knobs]
    grid = { attngate = ["none", "headwise"], lr = [0.003, 0.004] }  # all combinations are cells
    cells = [{ attngate = "const" }]             # further cells, one by one; with neither, one cell

A run is a stage, a cell's knobs and a seed; its RUN_ID is made of them and of the code (trainer and plumbing), so
that a finished run is known by its content, a half-done one resumes, and a change makes it missing again. Whatever
knobs the environment sets are dropped, and named: results are a function of the study file. (LOGS_FOLDER,
RESULTS_FILE, DEVICE_BATCH_SIZE and RUNPOD_INSTANCE_TYPE move no loss, and are used.) Two launchers on one
study share the work. Ctrl-C, SIGTERM and SIGUSR1 are passed on to the run, which saves; a second Ctrl-C kills it.

Exit     0 all finished, 1 some failed (listed with their last lines), 2 bad input, 128 + n after signal n
Raises   UserError, before anything runs, with all that is wrong in the file. docs/studies.md has more
"""

import argparse
import ctypes
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from types import ModuleType

from filelock import FileLock, Timeout

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import lib_results as lib  # noqa: E402

import plumbing  # noqa: E402
from plumbing import DONE, UserError  # noqa: E402

OWNED = dict(  # knobs that a study file does not set, and what does
    run_id="made of the run's content",
    stage="the name of the stage's table",
    seed="one of the stage's seeds",
    target_loss="a word of the stage, beside its knobs",
    logs_folder="given with --logs_folder",
    results_file="given with --results_file",
    dry_run="given with --dry_run",
)
NEEDED = (
    "run_id",
    "stage",
    "seed",
    "logs_folder",
    "results_file",
)  # knobs without which a trainer cannot be told
OF_THE_MACHINE = (
    "device_batch_size",
    "runpod_instance_type",
)  # the environment may set these: they move no loss
ID = re.compile(
    r"-([0-9a-f]{8})-([0-9a-f]{6})$"
)  # ends a RUN_ID: hash of stage and knobs, hash of the code
FORWARDED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


# ----------------------------------------------------------------------------
# The study file


@dataclass(frozen=True)
class Trainer:
    """A trainer's program, its knobs by spelling, and the SHA-256 of its code."""

    path: Path
    module: ModuleType
    known: Mapping[str, dataclasses.Field]
    code: str

    @property
    def free(self) -> list[str]:
        return self.module.FREE.split()


@dataclass(frozen=True)
class Cell:
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
    cells: tuple[Cell, ...]  # in the order in which they run
    said: str  # what was done about knobs in the environment; mostly ''


def code_sha256(path: Path) -> str:
    """As RunLog.header computes it, and as it stands in the results row."""
    return hashlib.sha256(
        (path.read_text() + Path(plumbing.__file__).read_text()).encode()
    ).hexdigest()


def load_trainer(name: str) -> Trainer:
    """Import a trainer (which does nothing else) by its path, relative to the repository."""
    path = REPO / name
    if path.suffix != ".py" or not path.is_file():
        there = ", ".join(sorted(p.name for p in REPO.glob("train*.py")))
        raise UserError(f"trainer = {name!r}: no such program in {REPO}; it has {there}")
    spec = importlib.util.spec_from_file_location(f"trainer_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(
        spec
    )  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"trainer = {name!r}: cannot be imported ({type(error).__name__}: {error})"
        ) from None
    if missing := [word for word in ("Knobs", "PRESETS", "FREE") if not hasattr(module, word)]:
        raise UserError(
            f"trainer = {name!r}: defines no {', '.join(missing)}, so it is no trainer of this house"
        )
    fields = dataclasses.fields(module.Knobs)
    if missing := [word.upper() for word in NEEDED if word not in {f.name for f in fields}]:
        raise UserError(f"trainer = {name!r}: has no knob {', '.join(missing)}, which a study sets")
    known = {s.upper(): f for f in fields for s in (f.name, *f.metadata["alias"])}
    return Trainer(path, module, known, code_sha256(path))


def near(word: str, words: Iterable[str]) -> str:
    found = get_close_matches(word, list(words), n=1)
    return f"; did you mean {found[0]}?" if found else ""


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


def clean_environment(trainer: Trainer, environ: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The environment's knobs that the runs may take, and a line on what became of them and of the others.
    Raises UserError for a near miss (SEDE=1), at which the trainer would stop as well."""
    effective_knobs(
        trainer, {name: value for name, value in environ.items() if name not in trainer.known}
    )
    named = {
        name: trainer.known[name].name for name in sorted(environ.keys() & trainer.known.keys())
    }
    taken = {
        knob: environ[name]
        for name, knob in named.items()
        if knob in OF_THE_MACHINE and knob in trainer.free
    }
    dropped = [
        f"{n}={environ[n]}"
        for n, knob in named.items()
        if knob not in (*taken, "logs_folder", "results_file")
    ]
    words = [f"not used, the study decides: {', '.join(dropped)}"] if dropped else []
    words += (
        [f"from the environment: {', '.join(f'{k.upper()}={v}' for k, v in taken.items())}"]
        if taken
        else []
    )
    return taken, "; ".join(words)


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
    """Read and check a study file; `changes` are knobs of every run that go before the file's. Raises UserError with
    everything that is wrong, one problem a line."""
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
    cells: list[Cell] = []
    for name, table in stages.items():
        cells += read_stage(name, table, common, trainer, problems, machine, changed)
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
    return Study(path, title, trainer, nproc, about, bases, targets, tuple(cells), said)


def read_stage(
    name: str,
    table: object,
    common: Mapping[str, str],
    trainer: Trainer,
    problems: Problems,
    machine: Mapping[str, str],
    changed: Mapping[str, str],
) -> list[Cell]:
    """The cells of one stage in the order in which they run; what is wrong is added to `problems`."""
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

    # Effective knobs, through the trainer's own checks. One complaint that many cells share is made once.
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
    """The knobs of the stage's cells, from grid and cells; None when something is wrong with those."""
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
) -> list[Cell]:
    """The cells as they run: seed by seed, and within a seed each baseline before what is compared with it."""
    # Cells that share all but the baseline's knobs are compared with each other; groups with a baseline come first.
    group = [tuple(sorted((k, v) for k, v in g.items() if k not in wanted)) for g, _, _ in built]
    has_own = {g for g, yes in zip(group, is_baseline, strict=True) if yes}
    order = sorted(
        range(len(built)),
        key=lambda i: (group[i] not in has_own, group.index(group[i]), not is_baseline[i]),
    )
    cells = []
    for seed, i in itertools.product(
        seeds, order
    ):  # seed-major: a comparison has its first pair early
        given, env, k = built[i]
        k = dataclasses.replace(k, seed=seed)
        env = env | dict(SEED=str(seed), STAGE=name)
        content = content_of(name, k, trainer)
        cells.append(Cell(name, given, seed, env, k, is_baseline[i], content, trainer.code[:6]))
    return cells


def effective_knobs(trainer: Trainer, env: Mapping[str, str]) -> object:
    """The trainer's knobs as a run with this environment would have them. Raises UserError as the trainer would."""
    return plumbing.read_knobs(trainer.module.Knobs, trainer.module.PRESETS, argv=[], env=env)


def content_of(stage: str, k: object, trainer: Trainer) -> str:
    """8 hex digits of the stage and of all knobs that can move a loss. Paths inside the repository count relative
    to it, so that a study stays finished when its folder is moved or mounted elsewhere."""
    moving = {n: v for n, v in dataclasses.asdict(k).items() if n not in trainer.free}
    text = json.dumps([stage, moving], sort_keys=True).replace(str(REPO), ".")
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------
# What is there already


@dataclass
class Progress:
    """How far a cell is. States: waiting, half-done, running, elsewhere, done, failed."""

    cell: Cell
    run_id: str
    state: str = "waiting"
    step: int = 0
    loss: float = math.nan  # nats; validation when done, else the last known
    tokens_per_s: float = math.nan
    note: str = ""
    began: float = math.nan  # monotonic, first seen running here, and at which step
    began_step: int = 0
    wall_s: float = 0.0  # spent here
    log: Path | None = None

    @property
    def eta_s(self) -> float:
        done = self.step - self.began_step
        return (
            (self.cell.steps - self.step) * (time.monotonic() - self.began) / done
            if done > 0
            else math.nan
        )


class Records:
    """What the results file and the status files say of runs, read again when the file has changed."""

    def __init__(self, logs: Path, results: Path):
        self.logs, self.results, self.stamp = logs, results, None
        self.rows: dict[str, lib.Row] = {}  # of finished runs, by id; of several, the last

    def refresh(self) -> None:
        try:
            info = self.results.stat()
        except OSError:
            self.rows, self.stamp = {}, None
            return
        if self.stamp != (info.st_mtime_ns, info.st_size):
            try:
                rows, _ = lib.read_results(self.results)
            except lib.UserError as error:
                raise UserError(error) from None
            self.rows = {row["run_id"]: row for row in rows if row.status in DONE}
            self.stamp = (info.st_mtime_ns, info.st_size)

    def status(self, run_id: str) -> dict:
        try:
            return json.loads((self.logs / run_id / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def ids(self, content: str, code: str = "*") -> list[str]:
        """Runs of this content, with a row or a folder, newest row last."""
        pattern = re.compile(f"-{content}-{'[0-9a-f]{6}' if code == '*' else code}$")
        folders = (p.name for p in self.logs.glob(f"*-{content}-{code}") if p.is_dir())
        return list(dict.fromkeys([*folders, *(i for i in self.rows if pattern.search(i))]))

    def look(self, p: Progress, ignore_code: bool) -> bool:
        """Bring `p` up to date; whether it is done."""
        self.refresh()
        own = self.ids(p.cell.content, p.cell.code)
        p.run_id = next(iter(own), p.run_id)  # a run keeps the id under which it was started
        others = [i for i in self.ids(p.cell.content) if i not in own] if ignore_code else []
        for run_id in [*own, *others[::-1]]:
            row, status = self.rows.get(run_id), self.status(run_id)
            if row is None and status.get("status") not in DONE:
                continue
            p.state, p.run_id, p.note = "done", run_id, ""
            p.loss = (
                row.number("final_val_loss") if row else float(status.get("val_loss", math.nan))
            )
            p.step = (
                int(status.get("step", p.cell.steps))
                if row is None
                else int(row["steps_done"] or p.cell.steps)
            )
            if run_id in others:
                p.note = f"code {run_id[-6:]}"
            elif row is None:
                p.note = "no row"
            return True
        saved = sorted(path.name for path in (self.logs / p.run_id).glob("step_??????"))
        p.step = int(saved[-1][-6:]) if saved else 0  # it would go on from its newest checkpoint
        if p.state in ("waiting", "half-done"):
            p.state = "half-done" if saved else "waiting"
        return False

    def follow(self, p: Progress, since: float = 0.0) -> None:
        """Take over what status.json says of a run that goes on, if it was written after `since` (unix time)."""
        status = self.status(p.run_id)
        if status and status.get("updated", since) >= since:
            p.step = int(status.get("step", 0))
            loss = status.get("train_loss", status.get("val_loss"))
            p.loss = float(loss) if loss is not None else math.nan
            p.tokens_per_s = float(status.get("tokens_per_s") or "nan")

    def is_trained_elsewhere(self, run_id: str) -> bool:
        """Whether a trainer holds the run's own lock: one that its launcher left behind, or one started by hand."""
        path = self.logs / run_id / ".lock"
        if not path.exists():
            return False
        try:
            with FileLock(path).acquire(timeout=0):
                return False
        except Timeout:
            return True


# ----------------------------------------------------------------------------
# Showing it


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    s = max(0, round(seconds))
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"
    return (
        f"{s // 3600}h{s % 3600 // 60:02d}m"
        if s < 86400
        else f"{s // 86400}d{s % 86400 // 3600:02d}h"
    )


def rate(tokens_per_s: float) -> str:
    if not math.isfinite(tokens_per_s):
        return ""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if tokens_per_s >= unit:
            return f"{tokens_per_s / unit:.{1 if tokens_per_s < 100 * unit else 0}f}{name}"
    return f"{tokens_per_s:.0f}"


def fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 2)] + ".."


COLOURS = {"done": "32", "running": "36", "failed": "31", "elsewhere": "35"}


class Board:
    """A live table on a terminal, redrawn in place; elsewhere a line per event and one every 30 seconds."""

    def __init__(self, study: Study, cells: Sequence[Progress]):
        self.study, self.cells = study, cells
        self.live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.drawn: list[str] = []  # the table as it stands on the screen
        self.told = time.monotonic()
        self.doing = ""

    def summary(self) -> str:
        counts = {
            s: sum(p.state == s for p in self.cells) for s in ("running", "elsewhere", "failed")
        }
        words = [f"{sum(p.state == 'done' for p in self.cells)} of {len(self.cells)} done"]
        words += [f"{n} {state}" for state, n in counts.items() if n]
        if waiting := sum(p.state in ("waiting", "half-done") for p in self.cells):
            words.append(f"{waiting} waiting")
        eta = duration(self.eta_s())
        return ", ".join(words) + (f", ETA {eta}" if eta and waiting + counts["running"] else "")

    def eta_s(self) -> float:
        """Seconds until nothing is left for this launcher; nan before there is anything to go by."""
        spent = sum(p.wall_s for p in self.cells)
        steps = sum(p.step - p.began_step for p in self.cells if p.wall_s)
        left = sum(
            p.cell.steps - p.step
            for p in self.cells
            if p.state in ("waiting", "half-done", "running")
        )
        return left * spent / steps if steps > 0 else math.nan

    def line(self, p: Progress, width: int, colour: bool) -> str:
        step = f"{p.step}/{p.cell.steps}" if p.step or p.state == "running" else f"{p.cell.steps}"
        loss = f"{p.loss:.4f}" if math.isfinite(p.loss) else ""
        speed, eta = (rate(p.tokens_per_s), duration(p.eta_s)) if p.state == "running" else ("", "")
        tail = f"{p.cell.seed:>6}  {p.state:<9} {step:>11} {loss:>8} {speed:>6} {eta or p.note:>7}"
        room = width - len(tail) - 3
        label = fit(p.cell.label, room)
        if colour and p.state in COLOURS:
            tail = tail.replace(p.state, f"\x1b[{COLOURS[p.state]}m{p.state}\x1b[0m", 1)
        return f"  {label:<{room}} {tail}"

    def table(self, width: int, height: int, colour: bool) -> list[str]:
        """The whole table, or, where it is higher than the screen, what is going on and what comes next."""
        head = f"{'seed':>6}  {'state':<9} {'step':>11} {'loss':>8} {'tok/s':>6} {'ETA':>7}"
        lines: list[str] = []
        heads: list[int] = []  # of each line: where its stage's heading is
        busy = None  # the first line with something left to do
        for stage, group in itertools.groupby(self.cells, key=lambda p: p.cell.stage):
            title = fit(f"{stage}  {self.study.stages[stage]}".rstrip(), width - len(head) - 2)
            at = len(lines)
            lines.append(f"{title:<{width - len(head) - 1}} {head}")
            for p in group:
                if busy is None and p.state not in ("done", "failed"):
                    busy = len(lines)
                lines.append(self.line(p, width, colour))
            heads += [at] * (len(lines) - at)
        room = (
            height - 5
        )  # but for the summary, the count of what is hidden, what goes on, and the cursor
        if len(lines) > room:
            start = max(0, min((busy or 0) - 2, len(lines) - room))
            end = start + room
            below, heading = len(lines) - end, lines[heads[start]]
            lines = [heading, *lines[start + 1 : end], f"  .. {start} lines above, {below} below"]
        summary = self.summary()
        top = fit(f"{fit(self.study.title, max(8, width - len(summary) - 2))}: {summary}", width)
        return [top, *lines, *([fit(self.doing, width)] if self.doing else [])]

    def draw(self) -> None:
        size = shutil.get_terminal_size()
        width = max(
            40, min(size.columns, 140) - 1
        )  # never the last column: some terminals wrap there
        lines = self.table(width, size.lines, colour=True)
        sys.stdout.write(
            self._erase(size.columns) + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J"
        )
        sys.stdout.flush()
        self.drawn = lines

    def _erase(self, columns: int) -> str:
        """To the start of the table; a window made narrower has wrapped its lines."""
        plain = [re.sub(r"\x1b\[\d+m", "", line) for line in self.drawn]
        rows = sum(max(1, math.ceil(len(line) / columns)) for line in plain)
        return f"\x1b[{rows}A\r" if rows else ""

    def event(self, text: str, quiet: bool = False) -> None:
        """One lasting line; `quiet` ones are left to the table where there is one."""
        if not self.live:
            print(text, flush=True)
        elif not quiet:
            columns = shutil.get_terminal_size().columns
            sys.stdout.write(self._erase(columns) + "\x1b[J" + text + "\n")
            self.drawn = []
            self.draw()

    def tick(self) -> None:
        if self.live:
            if time.monotonic() - self.told >= 0.5:
                self.told = time.monotonic()
                self.draw()
        elif time.monotonic() - self.told >= 30:
            self.told = time.monotonic()
            for p in self.cells:
                if p.state == "running":
                    words = [f"{p.run_id}: step {p.step}/{p.cell.steps}"]
                    words += [f"loss {p.loss:.4f}"] if math.isfinite(p.loss) else []
                    words += (
                        [f"{rate(p.tokens_per_s)} tokens/s"]
                        if math.isfinite(p.tokens_per_s)
                        else []
                    )
                    words += [f"ETA {duration(p.eta_s)}"] if math.isfinite(p.eta_s) else []
                    print(f"{', '.join(words)}; {self.summary()}", flush=True)

    def close(self) -> None:
        """The whole table, whatever its height, as the last word on a terminal."""
        self.doing = ""
        if self.live:
            size = shutil.get_terminal_size()
            width = max(40, min(size.columns, 140) - 1)
            lines = self.table(width, 10**6, colour=True)
            sys.stdout.write(
                self._erase(size.columns) + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J"
            )
            sys.stdout.flush()
            self.drawn = []


# ----------------------------------------------------------------------------
# Running it


class Signals:
    """Passes the first signal on to the run that is going on, once; a second Ctrl-C kills it and all below it."""

    def __init__(self):
        self.number, self.child, self.forwarded, self.before = 0, None, False, {}
        for name in FORWARDED:
            number = getattr(signal, name)
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
                self.before[number] = signal.signal(number, self.hear)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def watch(self, child: subprocess.Popen | None) -> None:
        self.child, self.forwarded = child, False
        self.forward()  # one that came while the process was being made

    def hear(self, number: int, frame: object) -> None:
        again, self.number = bool(self.number), self.number or number
        if again and number == signal.SIGINT and self.child is not None:
            kill_tree(self.child.pid)
        self.forward()

    def forward(self) -> None:
        if self.number and self.child is not None and not self.forwarded:
            self.forwarded = True
            # SIGHUP says nothing to a trainer, and torchrun does not pass SIGUSR1 on unless told to.
            number = signal.SIGINT if self.number == signal.SIGINT else signal.SIGTERM
            try:
                os.killpg(self.child.pid, number)
            except ProcessLookupError:
                pass


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it: torchrun's workers are in sessions of their own."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    todo = [pid]
    while todo:
        one = todo.pop()
        todo += parents.get(one, [])
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _die_with_launcher() -> None:
    """Runs in the child before exec: a launcher that is killed takes its run along, by SIGTERM, so it saves. Without
    this, the run would go on unseen, on the GPUs that the next launcher wants."""
    _PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def command(trainer: Path, nproc: int) -> list[str]:
    if nproc == 1:
        return [sys.executable, str(trainer)]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={nproc}",
    ]
    return [*torchrun, str(trainer)]


def cell_env(p: Progress, logs: Path, results: Path) -> dict[str, str]:
    return {
        **p.cell.env,
        "RUN_ID": p.run_id,
        "LOGS_FOLDER": str(logs),
        "RESULTS_FILE": str(results),
    }


def last_lines(path: Path, start: int, n: int = 5) -> list[str]:
    """The last lines of an attempt's output that say something: without torchrun's own report, which ends it. Where
    ranks left tracebacks, the last line of each, the first to fail first: the others only miss its company."""
    with open(path, "rb") as f:
        f.seek(start)
        text = f.read()[-100_000:].decode("utf-8", "replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if not re.match(r"[EWI]\d{4} |-{20}|={20}|\[rank\d+\]:\[", line)]
    for i, line in enumerate(ours):
        if line.startswith("Traceback") and any(
            "torch/distributed/run.py" in x for x in ours[i + 1 : i + 8]
        ):
            ours = ours[:i]
            break
    ends: dict[str, str] = {}
    for line in ours:
        if rank := re.match(r"\[rank\d+\]: ", line):
            ends[rank[0]] = line
    if ends:
        return list(ends.values())[:n]
    return (ours or lines)[-n:]


class Runner:
    def __init__(
        self, study: Study, cells: Sequence[Progress], records: Records, a: argparse.Namespace
    ):
        self.study, self.cells, self.records, self.a = study, cells, records, a
        self.nproc = a.nproc or study.nproc
        self.signals, self.board = Signals(), Board(study, cells)
        self.errors: dict[str, tuple[Path, list[str]]] = {}
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        self.base_env = {n: v for n, v in os.environ.items() if n not in study.trainer.known}
        self.base_env.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.nproc)))

    def run(self) -> int:
        """Run what is missing; returns the exit code."""
        try:
            self.run_all()
        finally:
            self.board.close()
            self.signals.restore()
        return self.report()

    def run_all(self) -> None:
        waits = False
        while not self.signals.number:
            took = self.take_one()
            busy = [p for p in self.cells if p.state == "elsewhere"]
            if took:
                waits = False
            elif not busy:
                break
            else:
                if not waits:
                    self.board.event(
                        f"waiting for {lib.count(len(busy), 'run')} that other launchers have taken "
                        f"(Ctrl-C leaves them alone)",
                        quiet=True,
                    )
                    self.board.doing = "waiting for other launchers' runs; Ctrl-C leaves them alone"
                waits = True
                for _ in range(4):
                    self.board.tick()
                    if not self.signals.number:
                        time.sleep(0.5)

    def take_one(self) -> bool:
        """Run the first missing cell that nobody else has; whether there was one."""
        for p in self.cells:
            if p.state in ("done", "failed"):
                continue
            lock = FileLock(self.a.logs_folder / ".locks" / f"{p.cell.key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                p.state = "elsewhere"
                self.records.follow(p)
                continue
            try:
                # Finished while we waited, by another launcher? Only now, under its lock, can we know.
                if self.records.look(p, self.a.ignore_code):
                    self.board.event(f"done elsewhere: {p.run_id}", quiet=True)
                elif self.records.is_trained_elsewhere(p.run_id):
                    p.state = "elsewhere"
                    continue
                else:
                    self.run_cell(p)
                return True
            finally:
                lock.release()
        return False

    def run_cell(self, p: Progress) -> None:
        """Train one cell, again if it fails, until it is done, given up or we are told to stop."""
        out = self.a.logs_folder / f"{p.run_id}.out"
        p.log = out
        for attempt in range(1 + self.a.retries):
            if code_sha256(self.study.trainer.path) != self.study.trainer.code:
                raise UserError(
                    f"{self.study.trainer.path.name} or plumbing.py was changed while the study ran; what is finished "
                    f"counts for the code as it was (--ignore-code accepts it), the rest was not started"
                )
            verb = "start" if not (p.step or attempt) else "resume" if p.step else "again"
            self.board.event(
                f"{verb}: {p.run_id}{f' at step {p.step}' if p.step else ''}", quiet=True
            )
            code, start = self.attempt(p, out)
            if self.records.look(p, ignore_code=False):
                took = f" in {duration(p.wall_s)}" if p.wall_s else ""
                self.board.event(f"done: {p.run_id}, loss {p.loss:.4f}{took}", quiet=True)
                return
            status = self.records.status(p.run_id).get("status", "")
            p.state = "half-done" if p.step else "waiting"
            if self.signals.number:
                self.board.event(f"stopped: {p.run_id} at step {p.step}/{p.cell.steps}", quiet=True)
                return
            tail = last_lines(out, start)
            refused = code == 2 or any(
                re.match(rf"{re.escape(self.study.trainer.path.name)}: error: ", x) for x in tail
            )
            reason = "refused" if refused else status if status == "nan" else f"exit code {code}"
            if (
                refused or status == "nan" or attempt == self.a.retries
            ):  # neither would go another way next time
                p.state, p.note = "failed", "nan" if status == "nan" else ""
                self.errors[p.run_id] = out, tail
                self.board.event(f"failed ({reason}): {p.run_id}, see {out}", quiet=True)
                return
            self.board.event(f"failed ({reason}), trying again: {p.run_id}", quiet=True)

    def attempt(self, p: Progress, out: Path) -> tuple[int, int]:
        """One process (or one torchrun) on a cell; its exit code, and where in `out` its words begin."""
        line = command(self.study.trainer.path, self.nproc)
        env = self.base_env | cell_env(p, self.a.logs_folder, self.a.results_file)
        with open(out, "ab") as f:
            said = " ".join(
                f"{k}={shlex.quote(v)}" for k, v in env.items() if k in self.study.trainer.known
            )
            f.write(f"# {datetime.now():%Y-%m-%d %H:%M:%S} {said} {shlex.join(line)}\n".encode())
            f.flush()
            start = f.tell()
            t0, before, p.state = time.monotonic(), p.wall_s, "running"
            p.began, p.began_step = math.nan, p.step
            # A session of its own: the terminal's Ctrl-C reaches the launcher alone, which passes it on once.
            child = subprocess.Popen(
                line, env=env, cwd=REPO, stdin=subprocess.DEVNULL, stdout=f, stderr=f, start_new_session=True,
                preexec_fn=_die_with_launcher if _PRCTL else None,
            )  # fmt: skip
        self.signals.watch(child)
        asked, first, since = time.monotonic(), p.step, time.time()
        while True:
            try:
                code = child.wait(timeout=0.25)
                break
            except subprocess.TimeoutExpired:
                pass
            p.wall_s = before + time.monotonic() - t0
            if self.signals.number:
                self.board.doing = (
                    "saves and stops; Ctrl-C again kills it (what was saved before stays)"
                )
            if time.monotonic() - asked >= 0.5:
                asked = time.monotonic()
                self.records.follow(p, since)
                if math.isnan(p.began) and p.step > first:
                    p.began, p.began_step = time.monotonic(), p.step
                for other in self.cells:
                    if other.state == "elsewhere" and not self.records.look(
                        other, self.a.ignore_code
                    ):
                        self.records.follow(other)
            self.board.tick()
        self.signals.watch(None)
        return code, start

    def report(self) -> int:
        """What happened; the exit code."""
        failed = [p for p in self.cells if p.state == "failed"]
        for p in failed:
            path, tail = self.errors[p.run_id]
            print(f"\nfailed: {p.run_id}{f' ({p.note})' * bool(p.note)}; {path} ends in")
            for line in tail:
                print(f"    {fit(line, 300)}")
        for p in self.cells:
            if p.note == "no row":
                print(
                    f"{p.run_id} is finished, but {self.a.results_file} has no row of it; to run it again, move "
                    f"{self.records.logs / p.run_id} away"
                )
        other = [p for p in self.cells if p.note.startswith("code ")]
        if other:
            print(
                f"{lib.count(len(other), 'run')} of other code accepted (--ignore-code): their rows say which"
            )
        print(f"{self.study.title}: {self.board.summary().split(', ETA')[0]}")
        if stages := write_stages(self.study, self.cells, self.records):
            source = os.path.relpath(self.a.results_file)
            print(
                f"tables: python scripts/split_results.py --source {source} --stages {os.path.relpath(stages)}"
            )
        if number := self.signals.number:
            print(
                f"stopped by {signal.Signals(number).name}; the same command goes on from here",
                flush=True,
            )
            return 128 + number
        return 1 if failed else 0


def baseline_columns(
    study: Study, stage: str, cells: Sequence[Progress], records: Records
) -> dict[str, str]:
    """The columns of the results that make a row of this stage its baseline. Of a stage with one baseline cell they
    are all that vary, so that every other cell is compared with it; else those of the knobs that the study names."""
    rows = {
        p.run_id: records.rows[p.run_id]
        for p in cells
        if p.cell.stage == stage and p.run_id in records.rows
    }
    bases = [p for p in cells if p.cell.stage == stage and p.cell.is_baseline and p.run_id in rows]
    keys = lib.keys_of(list(rows.values()))
    varied = [key for key in keys if len({lib.key_value(row, key) for row in rows.values()}) > 1]
    if len({json.dumps(p.cell.given) for p in bases}) > 1:
        plain = {key.replace("_", "").upper(): key for key in keys}
        spelled = {
            f.name: plain.get(s.replace("_", ""))
            for s, f in study.trainer.known.items()
            if s.replace("_", "") in plain
        }
        varied = [spelled.get(knob, "notes") for knob in study.baselines[stage]]
    found = {
        key: lib.key_value(rows[p.run_id], key) for p in bases[:1] for key in dict.fromkeys(varied)
    }
    return {
        key: value for key, value in found.items() if value != "-"
    }  # a gate's knob, where there is no gate


def write_stages(study: Study, cells: Sequence[Progress], records: Records) -> Path | None:
    """What split_results.py, plot.py and report.py need to know of this study's stages, beside its results; None
    while no baseline has finished."""
    records.refresh()
    lines = []
    for stage in study.stages:
        if base := baseline_columns(study, stage, cells, records):
            words = ", ".join(f"{key} = {json.dumps(value)}" for key, value in base.items())
            lines += [f"[stage.{json.dumps(stage)}]", f"baseline = {{ {words} }}"]
            if stage in study.targets:
                lines.append(f"target_loss = {study.targets[stage]}")
    if not lines:
        return None
    path = records.results.parent / "tables" / f"{study.path.stem}.toml"
    lib.write_whole(
        path, f"# made by run_study.py of {study.path.name}\n" + "\n".join(lines) + "\n"
    )
    return path


# ----------------------------------------------------------------------------
# Only saying it


def plan_of(k: object, trainer: Trainer) -> tuple[str, str, str]:
    """Parameters, training tokens and what is wrong with the data, as the trainer's own --dry_run says; else ''."""
    if not hasattr(trainer.module, "show_plan"):
        return "", "", ""
    with redirect_stdout(StringIO()) as out:
        trainer.module.show_plan(k)
    found: dict[str, str] = {}
    for line in out.getvalue().splitlines():
        name, colon, text = line.partition(":")
        if colon and not line.startswith((" ", "{")):
            found[name] = text.strip()
    tokens = found.get("training tokens", "").partition(" ")[0]
    return found.get("parameters", ""), tokens, found.get("problem", "")


def check_data(study: Study, cells: Sequence[Progress]) -> None:
    """Raise UserError when the data of runs that are to do are missing or too few: better now than in every one."""
    problems: dict[str, list[str]] = {}
    for label, p in {(p.cell.stage, p.cell.label): p for p in cells if p.state != "done"}.items():
        if problem := plan_of(p.cell.knobs, study.trainer)[2]:
            problems.setdefault(problem, []).append(f"[stage.{label[0]}] {label[1]}")
    words = [
        f"{w[0]}{f' (and {len(w) - 1} more)' * (len(w) > 1)}: {problem}"
        for problem, w in problems.items()
    ]
    if words:
        raise UserError(
            words[0] if len(words) == 1 else "\n  ".join([f"{len(words)} problems:", *words])
        )


def show_study(study: Study, cells: Sequence[Progress], ignored: str) -> None:
    """--dry_run: every cell, its state, its size."""
    print(
        f"{study.title}: {study.path}, {study.trainer.path.name}, code {study.trainer.code[:6]}{ignored}"
    )
    missing = total = 0
    problems: dict[str, int] = {}
    for stage, group in itertools.groupby(cells, key=lambda p: p.cell.stage):
        print(f"\n{stage}  {study.stages[stage]}".rstrip())
        rows = [("cell", "seed", "state", "steps", "params", "tokens", "run id")]
        plans: dict[str, tuple[str, str, str]] = {}  # the same for all seeds
        for p in group:
            if p.cell.label not in plans:
                plans[p.cell.label] = plan_of(p.cell.knobs, study.trainer)
            params, tokens, problem = plans[p.cell.label]
            size = int(tokens.replace(",", "") or 0)
            total += size
            if p.state != "done":
                missing += size
                problems[problem] = problems.get(problem, 0) + 1
            label, state = p.cell.label + "*" * p.cell.is_baseline, f"{p.state} {p.note}".rstrip()
            rows.append(
                (label, str(p.cell.seed), state, str(p.cell.steps), params, tokens, p.run_id)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            cols = [f"{t:{'<' if i in (0, 2, 6) else '>'}{widths[i]}}" for i, t in enumerate(row)]
            print("  " + "  ".join(cols).rstrip())
    done = sum(p.state == "done" for p in cells)
    print(
        f"\n* baseline\n{lib.count(len(cells), 'run')}, {done} done, {len(cells) - done} to do",
        end="",
    )
    print(f"; {missing:,} of {total:,} training tokens to do" if total else "")
    for problem, n in problems.items():
        if problem:
            print(f"data of {lib.count(n, 'run')}: {problem}")


SBATCH = """\
#!/bin/bash
# {run_id}: written by scripts/run_study.py, {study}. sbatch's own options override these.
#SBATCH --job-name={run_id}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1{gpus}
#SBATCH --output={out}
#SBATCH --open-mode=append
#SBATCH --signal=USR1@90
#SBATCH --requeue
# USR1 comes 90 s before the time is up: the trainer saves and leaves, and the job queues itself again. A job that
# is preempted or loses a node is queued again by Slurm. RUN_ID is fixed, so it resumes each time.
set -u
cd {repo} || exit 1
unset {unset}
{exports}
cores=$(( ${{SLURM_CPUS_ON_NODE:-{nproc}}} / {nproc} ))
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$(( cores > 0 ? cores : 1 ))}}"
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$(( 20000 + SLURM_JOB_ID % 20000 ))
srun --kill-on-bad-exit=1 {python} -m torch.distributed.run \\
    --nnodes={nodes} --nproc_per_node={nproc} --rdzv_backend=c10d --rdzv_endpoint="$head_node:$port" \\
    --rdzv_id="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}" --signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \\
    {trainer}
code=$?
if grep -q '"status": "preempted"' {status}; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def write_slurm(study: Study, cells: Sequence[Progress], a: argparse.Namespace) -> None:
    """One batch file per missing run, and a script that submits them all."""
    nproc, repo = a.nproc or study.nproc, shlex.quote(str(REPO))
    todo = [p for p in cells if p.state != "done"]
    for p in todo:
        env = cell_env(p, a.logs_folder, a.results_file)
        gpus = (
            f"\n#SBATCH --gpus-per-node={nproc}"
            if getattr(p.cell.knobs, "device", "cuda") == "cuda"
            else ""
        )
        text = SBATCH.format(
            run_id=p.run_id,
            study=study.path.name,
            nodes=a.nodes or 1,
            nproc=nproc,
            gpus=gpus,
            out=a.logs_folder / f"{p.run_id}.out",
            repo=repo,
            unset=" ".join(sorted(study.trainer.known)),
            exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
            python=shlex.quote(sys.executable),
            trainer=shlex.quote(str(study.trainer.path)),
            status=shlex.quote(str(a.logs_folder / p.run_id / "status.json")),
        )
        lib.write_whole(a.slurm / f"{p.run_id}.sbatch", text)
    names = " \\\n    ".join(shlex.quote(f"{p.run_id}.sbatch") for p in todo)
    text = (
        f"#!/bin/bash\n# Submits the missing runs of {study.path.name}; arguments go to sbatch: "
        f"submit_all.sh --partition=gpu --time=04:00:00\n"
        f'set -eu\ncd "$(dirname "$0")"\nmkdir -p {shlex.quote(str(a.logs_folder))}\n'
    )
    text += (
        f'for job in {names}; do\n    sbatch "$@" "$job"\ndone\n'
        if todo
        else "echo nothing is missing\n"
    )
    lib.write_whole(a.slurm / "submit_all.sh", text)
    (a.slurm / "submit_all.sh").chmod(0o755)
    print(
        f"wrote {lib.count(len(todo), 'job')} and {a.slurm / 'submit_all.sh'}; nothing was submitted"
    )


# ----------------------------------------------------------------------------


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "file", type=Path, metavar="FILE", help="the study, such as experiments/studies/mini.toml"
    )
    p.add_argument("--stage", metavar="S,S", help="these stages only")
    p.add_argument(
        "--nproc", type=int, metavar="N", help="processes of a run, per node; default: the study's"
    )
    p.add_argument(
        "--retries", type=int, default=1, metavar="N", help="further attempts at a run that fails"
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KNOB=VALUE",
        help="of every run, before the file's",
    )
    p.add_argument(
        "--ignore-code",
        "--ignore_code",
        action="store_true",
        help="runs of other code count as finished",
    )
    p.add_argument("--dry_run", "--dry-run", action="store_true", help="list the runs and stop")
    p.add_argument(
        "--slurm", type=Path, metavar="DIR", help="write batch files there instead of running"
    )
    p.add_argument("--nodes", type=int, metavar="N", help="nodes of a run; with --slurm")
    p.add_argument(
        "--logs_folder", "--logs-folder", type=Path, metavar="DIR", help="default: the trainer's"
    )
    p.add_argument(
        "--results_file", "--results-file", type=Path, metavar="CSV", help="default: the trainer's"
    )
    a = p.parse_args(argv)
    for name, low in (("nproc", 1), ("nodes", 1), ("retries", 0)):
        if (value := getattr(a, name)) is not None and value < low:
            raise UserError(f"--{name} {value}: expected a whole number >= {low}")
    if wrong := [text for text in a.set if "=" not in text]:
        raise UserError(f"--set {wrong[0]}: expected KNOB=VALUE, such as --set num_iterations=100")
    if a.nodes and not a.slurm:
        raise UserError(
            "--nodes goes with --slurm DIR, which writes job files; this machine alone runs without it (on several "
            "machines by hand, see torchrun --nnodes)"
        )
    return a


def main(argv: Sequence[str] | None = None) -> int:
    a = read_arguments(argv)
    study = read_study(a.file, changes=dict(text.split("=", 1) for text in a.set))
    if a.stage:
        names = [s.strip() for s in a.stage.split(",") if s.strip()]
        if unknown := [s for s in names if s not in study.stages]:
            raise UserError(
                f"--stage {unknown[0]}: {a.file} has {', '.join(study.stages)}{near(unknown[0], study.stages)}"
            )
        study = dataclasses.replace(study, cells=tuple(c for c in study.cells if c.stage in names))
    defaults = {f.name: f.default for f in dataclasses.fields(study.trainer.module.Knobs)}
    for name in (
        "logs_folder",
        "results_file",
    ):  # a flag beats the environment, as it does for knobs
        path = getattr(a, name) or Path(os.environ.get(name.upper()) or defaults[name])
        setattr(a, name, path.resolve())
    records = Records(a.logs_folder, a.results_file)
    cells = [Progress(cell, cell.default_id) for cell in study.cells]
    for p in cells:
        records.look(p, a.ignore_code)
    if study.said:
        print(study.said, flush=True)
    if a.dry_run:
        show_study(study, cells, ", other code counts (--ignore-code)" if a.ignore_code else "")
        return 0
    if a.slurm:
        write_slurm(study, cells, a)
        return 0
    check_data(study, cells)
    (a.logs_folder / ".locks").mkdir(parents=True, exist_ok=True)
    return Runner(study, cells, records, a).run()


if __name__ == "__main__":
    plumbing.launch(main)
