"""byte_models.py -- what the programs that prove train_scaled.py's memory share.

How far stacked windows see, a model that is trained on answers, text to hide things in, intervals,
and tables.

Shapes   B rows, T bytes, N = T / 4 patches, D model width, A patches that hold an answer
Units    losses in nats per byte; seconds are CPU time of the process (wall time on CUDA)
Raises   UserError: a knob, file or run that is not there or does not fit, no GPU where one is asked
         for
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "scripts")]  # for the trainer, and for what scripts share

from lib.program import add_logs_option  # noqa: E402

from plumbing.checkpoints import load_weights  # noqa: E402
from plumbing.data import TokenShards  # noqa: E402
from plumbing.exports import read_model_weights  # noqa: E402
from plumbing.knobs import ROOT, UserError, read_knobs  # noqa: E402
from plumbing.texts import embedded_corpus, text_files  # noqa: E402
from plumbing.world import flat_gradients  # noqa: E402
from train_scaled import MODEL_KNOBS, PAST, PATCH, AdamW, ByteLM, Knobs, lr_scale  # noqa: E402

TURKISH = REPO.parent / "shared/data/turkish"
# A small model on a CPU, which --knobs changes. Tables of n-grams are for prose, and the memory by
# bytes would look the answer up: what is to be shown is what the blocks' memory holds.
# fmt: off
BASE = dict(
    device="cpu", compile=False, n_layer=2, n_head=2, sliding_window=8, thinking_steps=0,
    carry_state=False, schedule="linear", beta2=0.95, weight_decay=0.1, grad_clip=1.0,
    ngram_rows=0, mem_rows=0)
# fmt: on


# ----------------------------------------------------------------------------
# What windows reach


def reach(k: Knobs) -> int | None:
    """Patches before its own that a latent can depend on through the stacked windows alone: each
    block looks window - 1 further back. None: all of them. The short convolution is part of the
    memory, and a patch's encoder sees no other patch, so neither adds to it; the decoder sees the
    patch and one before.
    """
    return (
        None
        if k.sliding_window is None
        else max(k.n_layer * (k.sliding_window - 1), PAST // PATCH - 1)
    )


def beyond(needle: int, answer: int, k: Knobs) -> bool:
    """Whether the byte at `needle` cannot move the prediction of the byte at `answer` except
    through the memory. The byte at `answer` is predicted from the patch before its own.
    """
    far = reach(k)
    return far is not None and needle // PATCH < answer // PATCH - 1 - far


def safe_gap(k: Knobs) -> int:
    """Smallest distance in bytes at which `beyond` holds wherever the patches' edges lie."""
    far = reach(k)
    if far is None:
        raise UserError(
            "SLIDING_WINDOW=off sees everything: no needle lies beyond it; set a window"
        )
    return PATCH * (far + 2)


# ----------------------------------------------------------------------------
# Models


def read_model_knobs(given: Sequence[str], base: Mapping[str, object] = BASE) -> Knobs:
    """Knobs of train_scaled.py from `name=value` words, on top of `base`."""
    if bad := next((word for word in given if "=" not in word), None):
        raise UserError(f"--knobs {bad}: expected name=value, such as n_embd=64")
    flags = [f"--{word.lstrip('-')}" for word in given]
    return read_knobs(Knobs, {"scaled": dict(base)}, argv=flags, env={}, doc="")


def check_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda, but torch {torch.__version__} sees no CUDA GPU; leave it out to use "
            f"the CPU"
        )
    if device == "cpu":
        # Small products: more threads only wait.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    return torch.device(device)


def weights_path(logs: Path, run: str | None, weights: str | None) -> Path:
    """The .pth that --run or --weights names."""
    if weights:
        return Path(weights)
    folder = logs / run
    if not folder.is_dir():
        there = ", ".join(sorted(p.parent.name for p in logs.glob("*/best_model_scaled.pth"))[:10])
        raise UserError(f"no run {run!r} in {logs}; those with weights: {there or 'none'}")
    return folder / "best_model_scaled.pth"


def load(path: Path, device: torch.device, **changes: object) -> ByteLM:
    """The model of a weights file in evaluation mode; `changes` are knobs that it gets."""
    found = read_model_weights(path, "train_scaled.py", MODEL_KNOBS)
    known = {field.name for field in dataclasses.fields(Knobs)} & found["knobs"].keys()
    model = ByteLM(Knobs(**({name: found["knobs"][name] for name in known} | changes)))
    load_weights(model, found["model"])
    return model.to(device).eval()


def other_memory(model: ByteLM, memory: str) -> ByteLM:
    """A copy with the same weights and another MEMORY; with zero its memory says nothing."""
    copy = ByteLM(dataclasses.replace(model.cfg, memory=memory))
    copy.load_state_dict(model.state_dict())
    return copy.to(model.plasticity.device).eval()


def without_latent(model: ByteLM) -> ByteLM:
    """A copy whose decoder is given latents of zero: only the last bytes and its memory by bytes
    are left to it.
    """
    copy = other_memory(model, model.cfg.memory)
    torch.nn.init.zeros_(copy.decoder.latent.weight)  # what comes of it is added to a bias
    return copy


def n_params(model: ByteLM) -> int:
    return sum(p.numel() for p in model.parameters())


def answer_logits(model: ByteLM, x_BT: Tensor, at_BA: Tensor, y_BAP: Tensor) -> Tensor:
    """Logits (B, A, 4, 256) of the bytes y of the patches `at`, each given all bytes before it. The
    same numbers as model.logits' at these places, without decoding all others.
    """
    at = (at_BA - 1)[..., None]
    places = (at * PATCH + torch.arange(PATCH, device=at.device)).flatten(1)
    y_BT = F.pad(x_BT[:, PATCH:], (0, PATCH))
    y_BAP = torch.where(y_BAP < 0, y_BT.gather(1, places).view_as(y_BAP), y_BAP)
    state = model.empty_state(len(x_BT))
    z_BND, _ = model.trunk(x_BT, state, at_start=True)
    # A patch and the one before it: (B, N, 8).
    before = F.pad(x_BT, (PAST - PATCH, 0)).unfold(1, PAST, PATCH)
    z_BAD, x_BAP = (t.gather(1, at.expand(-1, -1, t.size(-1))) for t in (z_BND, before))
    logits, hidden = model.decoder(z_BAD, x_BAP, y_BAP)
    if model.byte_memory is None or model.cfg.memory == "zero":
        return logits
    y_BT = y_BT.scatter(1, places, y_BAP.flatten(1))
    *_, (seen,), tables = state.layers
    text = torch.cat([seen, x_BT[:, :PATCH], y_BT], 1)
    first = PATCH * state.position + 1
    followers, age, _ = model.byte_memory.tables.read(text, first, tables)
    row = torch.arange(len(x_BT), device=at.device)[:, None, None]
    places = places.unflatten(1, (-1, PATCH))
    return model.byte_memory.mix(logits, hidden, followers[row, places], age[row, places])


def answer_nll(model: ByteLM, x_BT: Tensor, at_BA: Tensor, y_BAP: Tensor) -> Tensor:
    """-log p (B, A, 4), nats, of the bytes y of the patches `at`; 0 where y is -1."""
    logits = answer_logits(model, x_BT, at_BA, y_BAP)
    return F.cross_entropy(logits.permute(0, 3, 1, 2), y_BAP, ignore_index=-1, reduction="none")


def answer_hits(model: ByteLM, x_BT: Tensor, at_BA: Tensor, y_BAP: Tensor) -> Tensor:
    """Whether the likeliest byte is the right one, (B, A, 4); True where y is -1. All of an
    answer's bytes hit exactly when greedy decoding writes that answer.
    """
    return (answer_logits(model, x_BT, at_BA, y_BAP).argmax(-1) == y_BAP) | (y_BAP < 0)


Batch = tuple[Tensor, Tensor, Tensor]  # x_BT, at_BA, y_BAP


LEARNED = 0.3  # nats per byte of an answer, mean of the last 20 steps: the next stage may begin


def train_on_answers(
    k: Knobs,
    make: Callable[[int, int], Batch],
    num_stages: int,
    device: torch.device,
    say: Callable[[str], None],
    start: ByteLM | None = None,
) -> tuple[ByteLM, float]:
    """A model of these knobs, trained for NUM_ITERATIONS steps with the loss on the answers of
    make(step, stage) alone, by train_scaled.py's optimizer and schedule, from the weights of
    `start` or new ones. A stage ends when its answers are learned; a model that never learns stays
    where it is. Returns it in evaluation mode, and the seconds it took.
    """
    model = ByteLM(k)
    model.init_weights(k.seed)
    if start is not None:
        model.load_state_dict(start.state_dict())
    model.to(device).train()
    gradients = flat_gradients(model)
    adam = AdamW(model, k)
    t0 = clock(device)
    stage, recent, since = 0, [], []
    for step in range(k.num_iterations):
        x_BT, at_BA, y_BAP = (t.to(device) for t in make(step, stage))
        loss = answer_nll(model, x_BT, at_BA, y_BAP).sum() / (y_BAP >= 0).sum()
        loss.backward()
        norm = gradients.norm()
        gradients *= (k.grad_clip / norm).clamp(max=1.0)
        adam.step(k.lr * lr_scale(step, k), norm.isfinite())
        gradients.zero_()
        recent.append(loss.item())
        since.append(recent[-1])
        if (step + 1) % 100 == 0 or step + 1 == k.num_iterations:
            mean = sum(since) / len(since)
            say(
                f"step:{step + 1}/{k.num_iterations} stage:{stage} loss:{mean:.4f} "
                f"seconds:{clock(device) - t0:.0f}"
            )
            since = []
        if len(recent) >= 20 and sum(recent[-20:]) < 20 * LEARNED and stage + 1 < num_stages:
            stage, recent = stage + 1, []
    return model.eval(), clock(device) - t0


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


# ----------------------------------------------------------------------------
# Text


def read_text(source: str | None, part: str = "test") -> tuple[bytes, str]:
    """The bytes of a file, folder or pattern, and what to call them. Without one the `part`, train
    or test, of the Turkish text when it is here, else of the embedded corpus.
    """
    if source is None and TURKISH.is_dir():
        source = str(TURKISH / f"{part}.txt")
    if source is not None:
        text = b"".join(Path(p).read_bytes() for p in text_files(source))
        if not text:
            raise UserError(f"{source}: an empty file; expected text")
        return text, source
    train, val, _ = embedded_corpus(ROOT / "data")
    shards = TokenShards(train if part == "train" else val)
    text = shards.read(0, shards.total).astype(np.uint8).tobytes()
    return text, f"the embedded corpus' {part} part"


def whole_characters(text: bytes) -> bytes:
    """Without the torn UTF-8 characters at both ends."""
    start = next((i for i, b in enumerate(text[:4]) if b & 0xC0 != 0x80), 0)
    text = text[start:]
    return text.decode("utf-8", errors="ignore").encode() if text else text


# ----------------------------------------------------------------------------
# Numbers


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): right at 0 and 1 too."""
    if n == 0:
        return 0.0, 1.0
    p, scale = hits / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def share(hits: int, n: int) -> str:
    low, high = wilson(hits, n)
    return f"{hits / max(n, 1):.3f} [{low:.3f}, {high:.3f}]"


# ----------------------------------------------------------------------------
# Records


def git_says(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(REPO), *words], capture_output=True, text=True)
    return done.stdout.strip()


def facts(a: argparse.Namespace, **more: object) -> dict[str, object]:
    """What every JSON file begins with."""
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(a).items()}
    found = dict(
        command=shlex.join(sys.orig_argv),
        git_commit=git_says("rev-parse", "HEAD") or "unknown",
        dirty=bool(git_says("status", "--porcelain")),
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}",
        torch=torch.__version__,
        cores=os.cpu_count(),
        machine=platform.machine(),
        options=options,
    )
    return found | more


def write_results(
    stem: Path, rows: Sequence[Mapping[str, object]], about: Mapping[str, object]
) -> None:
    """stem.csv, a line per row, and stem.json, the facts and the rows."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(stem.with_suffix(".csv"), "w", newline="") as f:
        out = csv.DictWriter(f, columns, lineterminator="\n", restval="")
        out.writeheader()
        out.writerows(rows)
    stem.with_suffix(".json").write_text(
        json.dumps(dict(about) | dict(rows=list(rows)), indent=1, default=str) + "\n"
    )


def add_model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--run", metavar="ID", help="a run of train_scaled.py: its best_model_scaled.pth"
    )
    p.add_argument("--weights", metavar="FILE", help="or a .pth itself")
    p.add_argument("--window_run", metavar="ID", help="the window-only control (MEMORY=off), a run")
    p.add_argument("--window_weights", metavar="FILE", help="or a .pth itself")
    add_logs_option(p)


def finish_options(
    p: argparse.ArgumentParser, argv: Sequence[str] | None, name: str
) -> argparse.Namespace:
    """Adds what all programs have, and reads the command line."""
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument(
        "--out",
        type=Path,
        default=REPO / "experiments/scaled" / name,
        metavar="STEM",
        help="of the files",
    )
    a = p.parse_args(argv)
    for one, other in (("run", "weights"), ("window_run", "window_weights")):
        if getattr(a, one, None) and getattr(a, other, None):
            raise UserError(f"--{one} and --{other} both name a model; give one of them")
    for name in ("seed", "n", "batch_size", "train_length"):
        least = 0 if name == "seed" else 1
        if getattr(a, name, least) < least:
            raise UserError(f"--{name} {getattr(a, name)}: expected {least} or more")
    return a


def numbers(kind: type, text: str, flag: str, low: float, high: float) -> list:
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = []  # refused below
    if not found or not all(low <= v <= high for v in found):
        raise UserError(
            f"{flag} {text}: expected numbers from {low:g} to {high:g} with commas between"
        )
    return found


def show_table(rows: Iterable[Sequence[object]]) -> None:
    """Columns side by side on stdout; the first row is the header."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(),
            flush=True,
        )
