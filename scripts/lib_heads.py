"""lib_heads.py -- shared by the programs that look inside an arithmetic model: models, test sets, ablations, figures.

Words    a place is a head (its output before the projection, hook_z) or the MLP of a layer; a unit is what is counted
         once: an item, or a minimal pair, which is right when both its items are
Shapes   N items, B items of a batch, T tokens, H heads, D head width, C model width, R positions relative to the
         answer's first token, M columns; x_BTHD has shape (B, T, H, D)
Units    exact match and the legacy metric are fractions of units; log-probability is nats per token of the gold
         answer, its end not counted
Raises   UserError: no such model or data set, data that the model cannot read, a missing library
Source   ablation kinds: Zhang & Nanda, arXiv 2309.16042; McNemar 1947 (exact, binomial); Holm 1979
"""

import argparse
import csv
import hashlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib import plots, stats
from lib.program import UserError as ProgramError
from lib.program import write_whole

import plumbing
import train_arith as arith
from plumbing import HERE, UserError, World
from train_arith import CompactTransformer, Knobs, Problems

GATE = 0.5  # exact match below which no head is named: what fails the task has no part that does it
METRICS = ("exact", "logprob", "eos")
KINDS = ("zero", "mean", "resample")
LABELS = dict(
    exact="exact match",
    logprob="answer log-probability (nats per token)",
    eos="eos_after_gold (legacy)",
)
OUT = HERE / "experiments/arith"


def launch(main: Callable[[], int | None]) -> None:
    """plumbing.launch; the errors of the statistics and figures have a class of their own."""

    def run() -> int | None:
        try:
            return main()
        except ProgramError as error:
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
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
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
    """A model in eval mode and what it was trained with."""

    name: str
    path: Path
    model: CompactTransformer
    k: Knobs
    digits: int
    w: World

    @property
    def shape(self) -> tuple[int, int]:
        return self.k.num_layers, self.k.num_heads


def load(path: str, device: str) -> Subject:
    """Raises UserError when there is no model at `path`, a file or the folder of a run."""
    device = arith.settle_device(device, False, False)
    found = Path(path) / "checkpoint_best.pt" if Path(path).is_dir() else Path(path)
    if not found.is_file():
        make = "python train_arith.py --config configs/pilot.yaml --output-dir runs/pilot makes one"
        raise UserError(f"{found}: no such checkpoint; {make}")
    model, k, state = arith.load_model(found, device)
    folder, stem = found.resolve().parent.name, found.stem.removeprefix("checkpoint_")
    name = folder if stem == "best" else f"{folder}_{stem}"
    return Subject(
        name, found, model, k, int(state["answer_digits"]), World(0, 1, torch.device(device))
    )


def load_all(paths: Sequence[str], device: str) -> list[Subject]:
    """Raises UserError also where two have one name, or models of different shape are to be compared."""
    found = [load(path, device) for path in paths]
    names = [s.name for s in found]
    if len(set(names)) < len(names):
        raise UserError(
            f"--checkpoint: two models are called {max(names, key=names.count)}; pass each run once"
        )
    if len({s.shape for s in found}) > 1:
        raise UserError(
            f"--checkpoint: layers and heads differ, {[s.shape for s in found]}; compare models of one shape"
        )
    return found


def untrained(k: Knobs, seed: int, device: torch.device) -> CompactTransformer:
    """A model as it is before its first step."""
    model = CompactTransformer(k)
    model.init_weights(seed)
    return model.to(device).eval()


def how_to_make(prefix: Path, name: str, k: Knobs) -> str:
    """The command that writes PREFIX_test_NAME.jsonl."""
    where = (
        f" --output-dir {shlex.quote(str(prefix.parent))}" if prefix.parent != Path("data") else ""
    )
    deep = re.fullmatch(r"depth(\d+)(_control)?", name)
    program = "scripts/generate_depth3_dataset.py" if deep else "scripts/generate_pilot_dataset.py"
    if prefix.name == "pilot" and name in ("train", "val", "flat", "paren", "depth3"):
        return f"python {program}{where}"
    flags = (
        f" --prefix {prefix.name}{where} --operators='{k.operators}' --operand-max {k.operand_max}"
    )
    flags += " --held-out --dedup"
    if deep:
        depths = " ".join(dict.fromkeys(["3", "4", "5", deep[1]]))
        return f"python {program}{flags} --depths {depths} --size 1000 --controls"
    sizes = "--num-train 0 --num-val 0 --num-test 1000 --minimal-pairs 1000"
    return f"python {program}{flags} {sizes} --grammar {k.grammar}"


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
    """PREFIX_test_NAME.jsonl (looked for here, then in the repository) as the model reads it, at most `limit` units;
    what its answers have too few digits for is left out, with a line. Raises UserError when the file is missing, saying
    how to make it, or when the model can hold none of it."""
    path = Path(f"{prefix}_test_{name}.jsonl")
    if not path.exists() and not (HERE / path).exists():
        raise UserError(f"{path}: no such data set; make it with: {how_to_make(prefix, name, s.k)}")
    exprs, values = arith.read_records(str(path))
    pairs = name.endswith("pairs")
    if pairs and len(exprs) % 2:
        raise UserError(
            f"{path}: {len(exprs)} lines are no whole pairs; make it with: {how_to_make(prefix, name, s.k)}"
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
    if s.k.answer_format == "plain":
        return np.ones(len(values_N), bool)
    return np.abs(values_N) * (2 if s.k.answer_format == "complement_bare" else 1) < 10**s.digits


def as_read(s: Subject, exprs: Sequence[str], values: Sequence[int], where: str) -> Problems:
    """Raises UserError where the model's answers have too few digits, or its positions end too early."""
    if not writable(s, np.array(values)).all():
        top = max(map(abs, values))
        raise UserError(
            f"{where}: answers up to {top:,}, but {s.name} writes {s.digits} digits; use other records"
        )
    problems = arith.problems_of(exprs, values, s.k, s.digits)
    room = len(s.model.cos) if s.model.position is None else s.k.sequence_length
    if (longest := int(problems.lengths_N.max())) > room:
        raise UserError(
            f"{where}: up to {longest} tokens, but {s.name} has {room} positions; use shorter expressions"
        )
    return problems


def could_have_trained_on(s: Subject, exprs: Sequence[str]) -> int:
    """How many of these a model whose training data are generated may have met."""
    if s.k.train_path != arith.GENERATE:
        seen = set(arith.read_records(s.k.train_path)[0])
        return sum(expr in seen for expr in exprs)
    return sum(arith.hash_expr(expr) % arith.BUCKETS != arith.TEST for expr in exprs)


def most_frequent(s: Subject) -> int:
    """The training data's most frequent value: what to answer when one knows nothing."""
    if s.k.train_path == arith.GENERATE:
        rng, none = np.random.default_rng([s.k.seed, 4]), np.empty(0, np.uint64)
        values = arith.draw_split(
            s.k, rng, 4096, "train", s.k.operands_max, s.digits, none
        ).values_N
    else:
        values = arith.read_records(s.k.train_path)[1]
    found, counts = np.unique(np.array(values), return_counts=True)
    return int(found[counts.argmax()])


# ----------------------------------------------------------------------------
# Scores


def nothing(rows: np.ndarray, T: int) -> list:
    """Hooks that change nothing, so that a baseline is computed by the same code as what is compared with it."""
    return [("hook_embed", lambda x, hook: None)]


def measure(
    s: Subject, problems: Problems, hooks: Callable = nothing, batch: int = 256
) -> np.ndarray:
    """(N, METRICS) float64, from one pass over the gold text; hooks(rows, T) are the hook functions of a batch.
    exact is that of greedy decoding: an answer is right when each of its tokens and its end is the likeliest one after
    the gold tokens before it; the first that is not ends it either way. eos is the original's "accuracy"."""
    out = np.empty((len(problems), 3))
    for at in range(0, len(problems), batch):
        rows = np.arange(at, min(at + batch, len(problems)))
        part = problems.rows(rows)
        with s.model.hooks(hooks(rows, int(part.lengths_N.max()) - 1)):
            t = dict(
                zip(arith.SCORES, arith.teacher_forced(s.model, part, s.k, s.w).T, strict=False)
            )
        right = (t["digits_ok"] == t["answer_tokens"]) & (t["end_ok"] == 1)
        out[rows] = np.stack([right, -t["answer_loss"] / t["answer_tokens"], t["end_ok"]], 1)
    return out


def units(table_NM: np.ndarray, pairs: bool) -> np.ndarray:
    """A score per unit. A pair is right when both its items are; its log-probability is their mean."""
    if not pairs:
        return table_NM
    both = table_NM.reshape(-1, 2, table_NM.shape[1])
    return np.stack([both[..., 0].min(1), both[..., 1].mean(1), both[..., 2].min(1)], 1)


def greedy_exact(s: Subject, problems: Problems) -> np.ndarray:
    """(N,) exact match by generating, as train_arith.py does while it trains."""
    return arith.score(s.model, problems, s.k, s.w)[:, arith.SCORES.index("exact")]


def competent(exact: float, allow: bool, s: Subject, what: str) -> bool:
    """Whether heads may be named; prints why not."""
    if exact >= GATE:
        return True
    words = (
        f"{s.name}: exact match {exact:.1%} on {what} is below the competence gate of {GATE:.0%}"
    )
    print(
        f"{words}: {'heads are named all the same (--allow-incompetent)' if allow else 'no head is named'}"
    )
    return False


# ----------------------------------------------------------------------------
# Ablation


@dataclass(frozen=True)
class Place:
    layer: int
    head: int | None  # None: the MLP

    def __str__(self) -> str:
        return f"L{self.layer}-{'MLP' if self.head is None else f'H{self.head}'}"

    @property
    def hook(self) -> str:
        return f"blocks.{self.layer}." + ("hook_mlp_out" if self.head is None else "attn.hook_z")


def places(s: Subject) -> list[Place]:
    """All heads, then all MLPs."""
    layers, heads = (range(n) for n in s.shape)
    return [Place(l, h) for l in layers for h in heads] + [Place(l, None) for l in layers]


def draw_donors(starts_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each item another one with a prompt of the same length; where no other has that length, the nearest in
    length. Raises UserError for a single item."""
    N = len(starts_N)
    if N < 2:
        raise UserError(
            "resample ablation takes from other items, but there is one item only; give more"
        )
    order = rng.permutation(N)
    order = order[np.argsort(starts_N[order], kind="stable")]
    donor = np.empty(N, int)
    for at, i in enumerate(order):  # an item of equal length, if there is one, stands beside it
        near = [order[j] for j in (at - 1, at + 1) if 0 <= j < N]
        donor[i] = min(near, key=lambda j: abs(starts_N[j] - starts_N[i]))
    return donor


class Bank:
    """What every head and MLP of one layer puts out on the items of a set, unablated."""

    def __init__(self, s: Subject, problems: Problems, seed: int, batch: int = 256):
        self.s, self.problems, self.batch = s, problems, batch
        self.donor_N = draw_donors(problems.starts_N, np.random.default_rng(seed))
        self.layer = lru_cache(maxsize=1)(self._layer)
        self.means = lru_cache(maxsize=2)(self._means)

    @torch.no_grad()
    def _layer(self, layer: int) -> dict[str, Tensor]:
        """(N, T, ...) by hook name; rows are meaningless behind an item's last input token."""
        names = [Place(layer, 0).hook, Place(layer, None).hook]
        ids = torch.from_numpy(arith.inputs_and_labels(self.problems, False, len(self.problems))[0])
        parts = []
        for rows in ids.split(self.batch):
            with arith.autocast(self.s.k, self.s.w):
                parts.append(
                    self.s.model.run_with_cache(
                        rows.to(self.s.w.device), lambda name: name in names
                    )[1]
                )
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _means(self, place: Place) -> tuple[Tensor, int]:
        """(R, D) mean over items by position relative to the answer's first token, and what to add to find a row."""
        x = self.of(place)
        p, offset = self.problems, int(self.problems.starts_N.max())
        at = torch.arange(x.size(1)) - torch.from_numpy(p.starts_N)[:, None] + offset
        real = (torch.arange(x.size(1)) < torch.from_numpy(p.lengths_N)[:, None] - 1).to(x.device)
        at, real_x = at.to(x.device)[real], x[real].double()
        size = int(at.max()) + 1
        total = torch.zeros(size, x.size(-1), dtype=torch.float64, device=x.device).index_add_(
            0, at, real_x
        )
        count = torch.bincount(at, minlength=size).clamp(min=1)[:, None]
        return (total / count).to(x.dtype), offset

    def of(self, place: Place) -> Tensor:
        x = self.layer(place.layer)[place.hook]
        return x if place.head is None else x[:, :, place.head]

    def replacement(self, place: Place, kind: str, rows: np.ndarray, T: int) -> Tensor:
        """(B, T, D) of a head, (B, T, C) of an MLP: what to put there for these items."""
        x, p = self.of(place), self.problems
        if kind == "zero":
            return torch.zeros(len(rows), T, x.size(-1), dtype=x.dtype, device=x.device)
        at = np.arange(T) - p.starts_N[rows, None]  # relative to the answer
        if kind == "mean":
            mean, offset = self.means(place)
            return mean[torch.from_numpy((at + offset).clip(0, len(mean) - 1)).to(x.device)]
        donor = self.donor_N[rows]
        at = (at + p.starts_N[donor, None]).clip(0, p.lengths_N[donor, None] - 2)
        return x[torch.from_numpy(donor)[:, None].to(x.device), torch.from_numpy(at).to(x.device)]

    def hooks(self, place: Place, kind: str) -> Callable:
        """For measure(): the hook functions of a batch that put `kind` in `place`, at all positions."""

        def of_batch(rows: np.ndarray, T: int) -> list:
            new = self.replacement(place, kind, rows, T)

            def put(x: Tensor, hook: arith.Hook) -> None:
                (x if place.head is None else x[:, :, place.head])[:] = new

            return [(place.hook, put)]

        return of_batch


# ----------------------------------------------------------------------------
# Statistics


def mcnemar(before_N: np.ndarray, after_N: np.ndarray) -> tuple[int, int, float]:
    """Units lost (right before, wrong after) and gained, and the exact two-sided p that both are equally likely."""
    lost, gained = (
        int(((before_N == 1) & (after_N == 0)).sum()),
        int(((before_N == 0) & (after_N == 1)).sum()),
    )
    below = stats.special().bdtr(min(lost, gained), lost + gained, 0.5)
    return lost, gained, min(1.0, 2 * float(below))


@lru_cache(maxsize=8)
def resamplings(n: int, seed: int = 0, draws: int = 2000) -> np.ndarray:
    """(draws, n) weights of a bootstrap over n units: the same for everything that is measured on them, so that
    differences are paired."""
    rng = np.random.default_rng([seed, n])
    return rng.multinomial(n, np.full(n, 1 / n), draws) / n


def intervals(values_NM: np.ndarray, seed: int = 0) -> np.ndarray:
    """(2, M) ends of the 95% percentile bootstrap intervals of the columns' means."""
    return np.quantile(resamplings(len(values_NM), seed) @ values_NM, [0.025, 0.975], axis=0)


def wilson(right: float, n: int) -> tuple[float, float]:
    """95% interval of a fraction, `right` of n."""
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, float((middle - half) / (1 + z * z / n))), min(
        1.0, float((middle + half) / (1 + z * z / n))
    )


# ----------------------------------------------------------------------------
# Files and figures


def out_folder(a: argparse.Namespace, program: str, subjects: Sequence[Subject]) -> Path:
    return a.out or OUT / program / "+".join(s.name for s in subjects)[:100]


def provenance(subjects: Sequence[Subject], files: Sequence[Path]) -> dict:
    """What a result came from: the command, the models and data by SHA-256."""

    def digest(path: Path) -> str:
        return hashlib.sha256((path if path.exists() else HERE / path).read_bytes()).hexdigest()

    models = {
        s.name: dict(path=str(s.path), sha256=digest(s.path), seed=s.k.seed) for s in subjects
    }
    data = {str(path): digest(path) for path in files}
    return dict(command=shlex.join(sys.argv), models=models, data=data, torch=torch.__version__)


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """A column for every key, in the order of their first appearance; floats to 6 significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    show = lambda v: f"{v:.6g}" if isinstance(v, float) else "" if v is None else v
    writer.writerows({key: show(value) for key, value in row.items()} for row in rows)
    write_whole(path, text.getvalue())


def write_json(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_figure(path: Path, figure) -> None:
    """PNG and SVG beside each other."""
    for kind in ("png", "svg"):
        write_whole(path.with_suffix(f".{kind}"), plots.figure_bytes(figure, kind))
    print(path.with_suffix(".png"))


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure without pyplot, and its axes as an array (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def heat(
    axes,
    values_YX: np.ndarray,
    limit: float,
    text: str | None = "{:.2f}",
    marked_YX: np.ndarray | None = None,
):
    """A map with 0 white; beyond +-limit the colour stays. Marked cells have a frame and bold text. The image."""
    from matplotlib.patches import Rectangle

    image = axes.imshow(values_YX, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for (y, x), value in np.ndenumerate(values_YX):
        bold = marked_YX is not None and marked_YX[y, x]
        if text and np.isfinite(value):
            colour = "white" if abs(value) > 0.6 * limit else "0.1"
            words = text.format(value).replace("-0.00", "0.00")
            weight = "bold" if bold else "normal"
            axes.text(
                x, y, words, ha="center", va="center", fontsize=7, color=colour, weight=weight
            )
        if bold:
            frame = dict(fill=False, edgecolor="black", linewidth=1.4)
            axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, **frame))
    axes.tick_params(labelsize=8)
    return image
