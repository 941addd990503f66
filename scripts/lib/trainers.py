"""A trainer as a study sees it: its knobs, its code, and what a run with given knobs would be.

Needs torch, since a trainer imports it.
Raises   UserError when a program is no trainer, or as the trainer itself would for bad knobs
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

import plumbing
from lib.program import ROOT, UserError
from plumbing.knobs import spellings
from plumbing.records import read_sources, sources_sha256

OWNED = dict(  # knobs that a study file does not set, and what does
    run_id="made of the run's content",
    stage="the name of the stage's table",
    seed="one of the stage's seeds",
    target_loss="a word of the stage, beside its knobs",
    logs_folder="given with --logs_folder",
    results_file="given with --results_file",
    dry_run="given with --dry_run",
    fork_from="the word fork of a stage",
    stop_after="the word fork of a stage",
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


@dataclass(frozen=True)
class Trainer:
    """A trainer's program, its knobs by spelling, and the SHA-256 of its code."""

    path: Path
    module: ModuleType
    known: Mapping[str, dataclasses.Field]
    code: str

    @property
    def free(self) -> set[str]:
        """Knobs that make no other run of the study. (A resume accepts other paths of the same
        data; in a study, other data are another run.)"""
        return set(self.module.RESUME_MAY_DIFFER) - {"data", "input_bin", "input_val_bin"}


def sources_of(module: ModuleType) -> list[Path]:
    """The trainer's own files: its program, and the data modules beside it that it imports."""
    beside = [Path(m.__file__) for m in vars(module).values() if getattr(m, "__file__", None)]
    return [Path(module.__file__), *sorted({p for p in beside if p.parent == ROOT})]


def code_sha256(module: ModuleType) -> str:
    """As the run's log computes it, and as it stands in the results row."""
    return sources_sha256(read_sources(sources_of(module)))


def load_trainer(name: str) -> Trainer:
    """Import a trainer (which does nothing else) by its path, relative to the repository."""
    path = ROOT / name
    if path.suffix != ".py" or not path.is_file():
        there = ", ".join(sorted(p.name for p in ROOT.glob("train*.py")))
        raise UserError(f"trainer = {name!r}: no such program in {ROOT}; it has {there}")
    spec = importlib.util.spec_from_file_location(f"trainer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"trainer = {name!r}: cannot be imported ({type(error).__name__}: {error})"
        ) from None
    if missing := [
        word for word in ("Knobs", "PRESETS", "RESUME_MAY_DIFFER") if not hasattr(module, word)
    ]:
        raise UserError(
            f"trainer = {name!r}: defines no {', '.join(missing)}, so it is no trainer of this "
            "house"
        )
    fields = dataclasses.fields(module.Knobs)
    if missing := [word.upper() for word in NEEDED if word not in {f.name for f in fields}]:
        raise UserError(f"trainer = {name!r}: has no knob {', '.join(missing)}, which a study sets")
    known = spellings(module.Knobs)
    return Trainer(path, module, known, code_sha256(module))


def near(word: str, words: Iterable[str]) -> str:
    """'; did you mean ...?' for a word that is nearly one of these, else ''."""
    found = get_close_matches(word, list(words), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def clean_environment(trainer: Trainer, environ: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The environment's knobs that the runs may take, and a line on what became of them and of
    the others. Raises UserError for a near miss (SEDE=1), at which the trainer would stop as
    well."""
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


def effective_knobs(trainer: Trainer, env: Mapping[str, str]) -> object:
    """The trainer's knobs as a run with this environment would have them. Raises UserError as
    the trainer would."""
    try:
        return plumbing.read_knobs(trainer.module.Knobs, trainer.module.PRESETS, argv=[], env=env)
    except plumbing.UserError as error:
        raise UserError(str(error)) from None


def content_of(stage: str, cfg: object, trainer: Trainer) -> str:
    """8 hex digits of the stage and of all knobs that can move a loss. Paths inside the
    repository count relative to it, so that a study stays finished when its folder is moved or
    mounted elsewhere."""
    moving = {n: v for n, v in dataclasses.asdict(cfg).items() if n not in trainer.free}
    text = json.dumps([stage, moving], sort_keys=True).replace(str(ROOT), ".")
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Plan:
    """What a run would be, as far as its trainer says: '' and 0 for what it does not."""

    parameters: str = ""
    tokens: int = 0  # of training, over all ranks
    problem: str = ""  # why the trainer would refuse to run


def plan_of(cfg: object, trainer: Trainer) -> Plan:
    """From the trainer's own plan(), which --dry_run shows."""
    if not hasattr(trainer.module, "plan"):
        return Plan()
    try:
        facts = trainer.module.plan(cfg, plumbing.planned_world())
    except plumbing.UserError as error:
        return Plan(problem=str(error))
    told = str(facts.get("training tokens", "")).partition(" ")[0].replace(",", "")
    names = ("batch_size", "sequence_length", "num_iterations")
    sizes = [getattr(cfg, name, None) or 0 for name in names]  # None: left to the run
    return Plan(str(facts.get("parameters", "")), int(told or math.prod(sizes)))
