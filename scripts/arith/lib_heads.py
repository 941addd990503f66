"""lib_heads.py -- shared by the programs that look inside an arithmetic model: models, test sets,
ablations, figures.

Words    a place is a head (its output before the projection, hook_z) or the MLP of a layer; a unit
         is what is counted once: an item, or a minimal pair, which is right when both its items are
Shapes   N items, B items of a batch, T tokens, H heads, D head width, C model width, R positions
         relative to the answer's first token, M columns; x_BTHD has shape (B, T, H, D)
Units    exact match and the legacy metric are fractions of units; log-probability is nats per
         token of the gold answer, its end not counted
Raises   UserError: no such model or data set, data that the model cannot read, a missing library
Source   ablation kinds: Zhang & Nanda, arXiv 2309.16042; McNemar 1947 (exact, binomial); Holm 1979
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/: lib adds the checkout

from lib.program import UserError as ToolError
from lib_hooks import HookedTransformer, hooked

import arithmetic
import plumbing
import train_arith
from arithmetic import EOS, PAD
from plumbing import ROOT, UserError, World
from plumbing.problem_scores import SCORES
from plumbing.problems import GENERATE, SAMPLE_TAG, Problems
from train_arith import CompactTransformer, Knobs

GATE = 0.5  # exact match below which no head is named: what fails the task has no part that does it
METRICS = ("exact", "logprob", "eos")
LABELS = dict(
    exact="exact match",
    logprob="answer log-probability (nats per token)",
    eos="eos_after_gold (legacy)",
)


def launch(main: Callable[[], int | None]) -> None:
    """plumbing.launch; the errors of the statistics and figures have a class of their own."""

    def run() -> int | None:
        try:
            return main()
        except ToolError as error:
            raise UserError(str(error)) from None

    plumbing.launch(run)


def need(*modules: str) -> None:
    """Raises UserError where one cannot be imported, before any work is done."""
    names = dict(sklearn="scikit-learn")
    for module in modules:
        try:
            __import__(module)
        except ImportError:
            name = names.get(module, module)
            raise UserError(f"{Path(sys.argv[0]).name} needs {name}: pip install {name}") from None


def parser(doc: str, several: bool = False, data: bool = True) -> argparse.ArgumentParser:
    """The flags that the programs share. With `several`, --checkpoint takes one model per seed."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = "a checkpoint_best.pt, or the folder of a run" + (
        "; several: one per seed" if several else ""
    )
    p.add_argument(
        "--checkpoint", required=True, nargs="+" if several else None, metavar="PATH", help=what
    )
    p.add_argument(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="cuda falls back, with a line; default cpu",
    )
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="default experiments/arith/<program>/<model>"
    )
    if data:
        what = "data sets are PREFIX_test_NAME.jsonl; default data/study"
        p.add_argument("--data", type=Path, default=Path("data/study"), metavar="PREFIX", help=what)
    return p


# ----------------------------------------------------------------------------
# Models and data


@dataclass(frozen=True, eq=False)  # by identity: a key of tables
class Subject:
    """A model with hooks, and what it was trained with."""

    name: str
    path: Path
    model: HookedTransformer
    cfg: Knobs
    language: arithmetic.Language  # with the answer digits that the model writes
    world: World

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return self.cfg.n_layer, self.cfg.n_head

    @property
    def digits(self) -> int:
        return self.language.digits


def load_model(path: str | Path) -> tuple[CompactTransformer, Knobs, dict]:
    """A checkpoint_*.pt as a model in eval mode, its knobs and the rest of the file. Raises
    UserError when the file is none."""
    hint = "pass a checkpoint_best.pt of train_arith.py"
    keys = ("train_config", "model_state_dict", "answer_digits")
    state = plumbing.read_weights(path, keys, hint)
    known = {field.name for field in fields(Knobs)}
    try:
        given = {name: value for name, value in state["train_config"].items() if name in known}
        cfg = Knobs(**given)
        model = CompactTransformer(cfg)
        model.load_state_dict(state.pop("model_state_dict"))
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not a model of train_arith.py ({reason}); {hint}") from None
    return model.eval(), cfg, state


def language_of(cfg: Knobs, digits: int) -> arithmetic.Language:
    names = [field.name for field in fields(arithmetic.Language)]
    language = arithmetic.Language(**{name: getattr(cfg, name) for name in names})
    return replace(language, answer_digits=digits)


def load(path: str, device: str) -> Subject:
    """Raises UserError when there is no model at `path`, a file or the folder of a run."""
    device = plumbing.settle_device(device, False, False)
    found = Path(path) / "checkpoint_best.pt" if Path(path).is_dir() else Path(path)
    if not found.is_file():
        make = "python train_arith.py --config configs/pilot.yaml --output-dir runs/pilot makes one"
        raise UserError(f"{found}: no such checkpoint; {make}")
    model, cfg, state = load_model(found)
    folder, stem = found.resolve().parent.name, found.stem.removeprefix("checkpoint_")
    name = folder if stem == "best" else f"{folder}_{stem}"
    language = language_of(cfg, int(state["answer_digits"]))
    world = World(0, 1, torch.device(device))
    return Subject(name, found, hooked(model.to(device)), cfg, language, world)


def load_all(paths: Sequence[str], device: str) -> list[Subject]:
    """Raises UserError also where two have one name, or models of different shape are to be
    compared."""
    found = [load(path, device) for path in paths]
    names = [s.name for s in found]
    if len(set(names)) < len(names):
        raise UserError(
            f"--checkpoint: two models are called {max(names, key=names.count)}; pass each run once"
        )
    if len({s.shape for s in found}) > 1:
        raise UserError(
            f"--checkpoint: layers and heads differ, {[s.shape for s in found]}; compare models "
            f"of one shape"
        )
    return found


def untrained(cfg: Knobs, seed: int, device: torch.device) -> HookedTransformer:
    """A model as it is before its first step."""
    model = CompactTransformer(cfg)
    model.init_weights(seed)
    return hooked(model.to(device))


def how_to_make(prefix: Path, name: str, cfg: Knobs) -> str:
    """The command that writes PREFIX_test_NAME.jsonl."""
    where = (
        f" --output-dir {shlex.quote(str(prefix.parent))}" if prefix.parent != Path("data") else ""
    )
    deep = re.fullmatch(r"depth(\d+)(_control)?", name)
    program = (
        "scripts/arith/generate_depth3_dataset.py"
        if deep
        else "scripts/arith/generate_pilot_dataset.py"
    )
    if prefix.name == "pilot" and name in ("train", "val", "flat", "paren", "depth3"):
        return f"python {program}{where}"
    flags = f" --prefix {prefix.name}{where} --operators='{cfg.operators}'"
    flags += f" --operand-max {cfg.operand_max}"
    flags += " --held-out --dedup"
    if deep:
        depths = " ".join(dict.fromkeys(["3", "4", "5", deep[1]]))
        return f"python {program}{flags} --depths {depths} --size 1000 --controls"
    sizes = "--num-train 0 --num-val 0 --num-test 1000 --minimal-pairs 1000"
    return f"python {program}{flags} {sizes} --grammar {cfg.grammar}"


@dataclass(frozen=True, eq=False)
class TestSet:
    __test__ = False  # not one of pytest's
    name: str
    path: Path
    exprs: list[str]
    problems: Problems
    pairs: bool  # items 2i and 2i + 1 differ in grouping only
    left_out: int = 0  # records whose values the model's answers have too few digits for

    @property
    def n(self) -> int:
        """Units."""
        return len(self.exprs) // (2 if self.pairs else 1)


def read_set(s: Subject, prefix: Path, name: str, limit: int = 0) -> TestSet:
    """PREFIX_test_NAME.jsonl (looked for here, then in the repository) as the model reads it, at
    most `limit` units; what its answers have too few digits for is left out, with a line. Raises
    UserError when the file is missing, saying how to make it, or when the model can hold none of
    it."""
    path = Path(f"{prefix}_test_{name}.jsonl")
    if not path.exists() and not (ROOT / path).exists():
        raise UserError(
            f"{path}: no such data set; make it with: {how_to_make(prefix, name, s.cfg)}"
        )
    exprs, values = arithmetic.read_records(str(path))
    pairs = name.endswith("pairs")
    if pairs and len(exprs) % 2:
        raise UserError(
            f"{path}: {len(exprs)} lines are no whole pairs; make it with: "
            f"{how_to_make(prefix, name, s.cfg)}"
        )
    fits = writable(s, np.array(values))
    if pairs:
        fits = fits.reshape(-1, 2).all(1).repeat(2)
    if left_out := int((~fits).sum()):
        print(
            f"{path}: {left_out} of {len(fits)} records left out: {s.name} writes {s.digits} digits"
        )
    keep = np.flatnonzero(fits)[: limit * (2 if pairs else 1) or None]
    if not len(keep):
        raise UserError(
            f"{path}: {s.name} writes {s.digits} digits, too few for all of it; use other records"
        )
    exprs, values = [exprs[i] for i in keep], [values[i] for i in keep]
    return TestSet(name, path, exprs, as_read(s, exprs, values, str(path)), pairs, left_out)


def writable(s: Subject, values_N: np.ndarray) -> np.ndarray:
    """(N,) whether the model's answer format has digits enough for each value."""
    if s.cfg.answer_format == "plain":
        return np.ones(len(values_N), bool)
    return np.abs(values_N) * (2 if s.cfg.answer_format == "complement_bare" else 1) < 10**s.digits


def as_read(s: Subject, exprs: Sequence[str], values: Sequence[int], where: str) -> Problems:
    """Raises UserError where the model's answers have too few digits, or its positions end too
    early."""
    if not writable(s, np.array(values)).all():
        top = max(map(abs, values))
        raise UserError(
            f"{where}: answers up to {top:,}, but {s.name} writes {s.digits} digits; use other "
            f"records"
        )
    problems = arithmetic.problems_of(exprs, values, s.language)
    room = len(s.model.cos) if s.cfg.use_rope else s.cfg.sequence_length
    if (longest := int(problems.lengths_N.max())) > room:
        raise UserError(
            f"{where}: up to {longest} tokens, but {s.name} has {room} positions; use shorter "
            f"expressions"
        )
    return problems


def could_have_trained_on(s: Subject, exprs: Sequence[str]) -> int:
    """How many of these a model whose training data are generated may have met."""
    if s.cfg.train_path != GENERATE:
        seen = set(arithmetic.read_records(s.cfg.train_path)[0])
        return sum(expr in seen for expr in exprs)
    kept = arithmetic.BUCKET_OF["test"]
    return sum(arithmetic.hash_expr(expr) % arithmetic.BUCKETS != kept for expr in exprs)


def most_frequent(s: Subject) -> int:
    """The training data's most frequent value: what to answer when one knows nothing."""
    if s.cfg.train_path == GENERATE:
        rng = np.random.default_rng([s.cfg.seed, SAMPLE_TAG])
        values = arithmetic.draw_split(s.language, rng, 4096, "train").values_N
    else:
        values = arithmetic.read_records(s.cfg.train_path)[1]
    found, counts = np.unique(np.array(values), return_counts=True)
    return int(found[counts.argmax()])


# ----------------------------------------------------------------------------
# Scores


def nothing(rows: np.ndarray, T: int) -> list:
    """Hooks that change nothing, so that a baseline is computed by the same code as what is
    compared with it."""
    return [("hook_embed", lambda x, point: None)]


def measure(
    s: Subject, problems: Problems, hooks: Callable = nothing, batch: int = 256
) -> np.ndarray:
    """(N, METRICS) float64, from one pass over the gold text; hooks(rows, T) are the hook
    functions of a batch. exact is that of greedy decoding: an answer is right when each of its
    tokens and its end is the likeliest one after the gold tokens before it; the first that is not
    ends it either way. eos is the original's "accuracy"."""
    out = np.empty((len(problems), 3))
    for at in range(0, len(problems), batch):
        rows = np.arange(at, min(at + batch, len(problems)))
        part = problems.rows(rows)
        with s.model.hooks(hooks(rows, int(part.lengths_N.max()) - 1)):
            table = train_arith.teacher_forced(s.model, part, s.cfg, s.world)
        t = dict(zip(SCORES, table.cpu().numpy().T, strict=True))
        out[rows] = np.stack([t["exact"], -t["answer_loss"] / t["answer_tokens"], t["end_ok"]], 1)
    return out


def units(table_NM: np.ndarray, pairs: bool) -> np.ndarray:
    """A score per unit. A pair is right when both its items are; its log-probability is their
    mean."""
    if not pairs:
        return table_NM
    both = table_NM.reshape(-1, 2, table_NM.shape[1])
    return np.stack([both[..., 0].min(1), both[..., 1].mean(1), both[..., 2].min(1)], 1)


@torch.no_grad()
def generate(s: Subject, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Greedy continuations of at most `new` tokens, up to and with EOS. Prompts are padded on the
    right, where the causal mask hides what stands behind the last token."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=s.world.device)
    ids = torch.full((len(prompts), int(lengths.max()) + new), PAD, device=s.world.device)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    at = torch.arange(len(prompts), device=s.world.device)
    goes_on = torch.ones_like(at, dtype=torch.bool)
    for _ in range(new):
        with train_arith.autocast(s.cfg, s.world.device):
            logits = s.model(ids[:, : int(lengths.max())])
        token = logits[at, lengths - 1].float().argmax(dim=-1)
        ids[at[goes_on], lengths[goes_on]] = token[goes_on]
        lengths = lengths + goes_on.long()
        goes_on &= token != EOS
        if not goes_on.any():
            break
    ends = zip(ids.tolist(), prompts, lengths.tolist(), strict=True)
    return [row[len(prompt) : length] for row, prompt, length in ends]


def answers(s: Subject, problems: Problems, batch: int = 256) -> list[list[int]]:
    """What the model writes for each problem, token by token, with its end."""
    found = []
    new = int((problems.lengths_N - problems.starts_N).max()) + 2
    for at in range(0, len(problems), batch):
        part = problems.rows(slice(at, at + batch))
        texts = zip(part.tokens_NT.tolist(), part.starts_N.tolist(), strict=True)
        found += generate(s, [tokens[:start] for tokens, start in texts], new)
    return found


def greedy_exact(s: Subject, problems: Problems) -> np.ndarray:
    """(N,) exact match by generating, token by token."""
    gold = zip(problems.tokens_NT, problems.starts_N, problems.lengths_N, strict=True)
    wanted = [tokens[start:end].tolist() for tokens, start, end in gold]
    pairs = zip(answers(s, problems), wanted, strict=True)
    return np.array([float(found == want) for found, want in pairs])


def competent(exact: float, allow: bool, s: Subject, what: str) -> bool:
    """Whether heads may be named; prints why not."""
    if exact >= GATE:
        return True
    words = (
        f"{s.name}: exact match {exact:.1%} on {what} is below the competence gate of {GATE:.0%}"
    )
    print(
        f"{words}: "
        f"{'heads are named all the same (--allow-incompetent)' if allow else 'no head is named'}"
    )
    return False
