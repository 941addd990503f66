"""compare_baselines.py -- train_gpu.py's models beside attention and published models: quality, speed, memory, state.

    python scripts/compare_baselines.py --run HAMT_ID ATTENTION_ID                  with gpt2 and distilgpt2
    python scripts/compare_baselines.py --hamt_checkpoint logs/ID/step_001000 --baselines gpt2 pythia-160m --device cuda
    python scripts/compare_baselines.py --run ID --baselines none --dataset ../shared/data/wikitext2 --max_samples 200
    python scripts/compare_baselines.py --speed_only --preset 33m --mixer both     training, memory, decoding, untrained

All models read the same text in the same windows; each is scored on all of its own tokens but the first, and the summed
loss is then divided by tokens, words and bytes: only the last two compare models with different tokenizers. Published
models are looked for on this machine first, then on the hub; one that cannot be had is one line, and left out.

Writes   OUTPUT_DIR/quality.csv, inference.csv, comparison.md, comparison.json and figures as PNG and SVG;
         --speed_only: training.csv, training_memory.csv, decoding.csv, speed.md, speed.json and figures
Shapes   B sequences, T tokens, V vocabulary
Units    losses in nats; a CPU's times are CPU time of the process, a GPU's are synchronised seconds; memory in MiB is
         the process's peak resident memory, or max_memory_allocated on a GPU, each in a process of its own
Raises   UserError: no such run, another program's, a text that is not there, a bad flag
"""

import argparse
import contextlib
import csv
import dataclasses
import inspect
import io
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lib import plots, program, stats
from lib import runs as lib
from torch import Tensor

import plumbing
import train_gpu
from plumbing import UserError, World

NOTE = (
    "Note: GPT-2's published 29.41 is WikiText-2 and 37.50 is WikiText-103, both zero-shot, per word, on de-tokenised "
    "text; published models are zero-shot here too, on the text as it stands. A hybrid has attention layers in it."
)
PRECISIONS = dict(none=torch.float32, bf16=torch.bfloat16)
FEED = 1024  # tokens that go into a carried state at a time


# ----------------------------------------------------------------------------
# Models, one interface: encode, logits, prefill, decode. A spec (JSON) says which, so that a child can open it again.


class Ours:
    """A model of train_gpu.py, from a checkpoint or with its initial weights."""

    def __init__(self, spec: Mapping[str, object], device: torch.device):
        if "path" in spec:
            self.model, _ = lib.load(Path(spec["path"]))
            if lib.trainer_of(self.model) != "train_gpu":
                raise UserError(
                    f"{spec['path']}: a run of {lib.trainer_of(self.model)}.py; expected one of train_gpu.py"
                )
        else:
            self.model = train_gpu.Model(train_gpu.Knobs(**spec["knobs"])).eval()
            self.model.init_weights(self.model.k.seed)
        self.k, self.device, self.limit = self.model.k, device, None
        self.model.to(device)
        self.mixer, self.context = self.k.label, self.k.max_seq_length
        self.streams = self.k.mixer == "hamt"
        self.vocabulary = self.k.vocabulary

    def encode(self, text: str) -> np.ndarray:
        return train_gpu.encoder(self.k.tokens)(text)

    def logits(self, x_BT: Tensor) -> Tensor:
        return self.model.logits(x_BT)

    def prefill(self, x_BT: Tensor) -> tuple[Tensor, train_gpu.State]:
        """Logits behind the last token (B, V), and the state; the head is not applied to the others."""
        return self.decode(x_BT, self.model.empty_state(len(x_BT)))

    def decode(self, x_BT: Tensor, state: train_gpu.State) -> tuple[Tensor, train_gpu.State]:
        h_BTC, _, state = self.model(F.embedding(x_BT, self.model.wte), state)
        return F.linear(h_BTC[:, -1], self.model.wte), state

    def state_bytes(self, state: train_gpu.State) -> int:
        return train_gpu.state_bytes(state)


def hub_name(name: str) -> str:
    """Where a short name lives on the hub; a folder is itself."""
    return f"EleutherAI/{name}" if "pythia" in name and "/" not in name else name


def tensors_of(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors inside a cache, whatever form this version of transformers gives it."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        yield from (t for part in thing.values() for t in tensors_of(part, seen))
    elif isinstance(thing, (list, tuple)):
        yield from (t for part in thing for t in tensors_of(part, seen))
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from tensors_of(vars(thing), seen)


class Published:
    """A causal model of transformers, in fp32, with its own tokenizer. Raises UserError where it cannot be had."""

    def __init__(self, spec: Mapping[str, object], device: torch.device):
        try:
            import transformers
        except ImportError:
            raise UserError(
                "the package transformers is not installed; pip install transformers"
            ) from None
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        name, self.device = hub_name(spec["name"]), device
        for local in (True,) if spec["offline"] else (True, False):
            try:
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                    name, local_files_only=local
                )
                self.model = transformers.AutoModelForCausalLM.from_pretrained(
                    name, local_files_only=local
                )
                break
            except (
                Exception
            ) as error:  # many kinds in many versions: no network, no such name, a broken file
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        else:
            where = (
                "on this machine" if spec["offline"] else "neither on this machine nor from the hub"
            )
            raise UserError(f"no weights of {name} {where} ({why})") from None
        self.model = self.model.float().eval().to(device)
        self.mixer, self.streams = "attention", False
        self.limit = getattr(self.model.config, "max_position_embeddings", None)
        self.context, self.vocabulary = self.limit or 1024, self.model.config.vocab_size
        known = inspect.signature(self.model.forward).parameters
        self.last_only = dict(logits_to_keep=1) if "logits_to_keep" in known else {}

    def encode(self, text: str) -> np.ndarray:
        return np.array(
            self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64
        )

    def logits(self, x_BT: Tensor) -> Tensor:
        return self.model(input_ids=x_BT, use_cache=False).logits

    def prefill(self, x_BT: Tensor) -> tuple[Tensor, object]:
        return self.decode(x_BT, None)

    def decode(self, x_BT: Tensor, state: object) -> tuple[Tensor, object]:
        found = self.model(input_ids=x_BT, past_key_values=state, use_cache=True, **self.last_only)
        return found.logits[:, -1], found.past_key_values

    def state_bytes(self, state: object) -> int:
        return sum(t.numel() * t.element_size() for t in tensors_of(state, set()))


Subject = Ours | Published


def open_subject(spec: Mapping[str, object], device: torch.device) -> Subject:
    return (Published if "name" in spec else Ours)(spec, device)


def n_params(subject: Subject) -> int:
    return sum(p.numel() for p in subject.model.parameters())  # tied weights are one parameter


# ----------------------------------------------------------------------------
# Quality


def raw_text(k: train_gpu.Knobs, split: str, max_samples: int | None) -> tuple[str, int]:
    """The text of a split, as every tokenizer gets it, and its words, counted as WikiText's tables do (with line ends).
    At most so many lines that are not empty, so that all models still read the same text."""
    shards = train_gpu.open_text(dataclasses.replace(k, tokenizer="bytes", vocab_size=None))[
        split
    ].shards
    text = shards.read(0, shards.total).astype(np.uint8).tobytes().decode("utf-8", "replace")
    if max_samples is not None:
        lines, left = text.splitlines(keepends=True), max_samples
        for i, line in enumerate(lines):
            left -= bool(line.strip())
            if left < 0:
                text = "".join(lines[:i])
                break
    return text, len(text.split()) + text.count("\n")


def autocast(subject: Subject, precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast(
        subject.device.type, dtype=PRECISIONS[precision], enabled=precision != "none"
    )


@torch.inference_mode()
def window_nats(
    subject: Subject,
    tokens: np.ndarray,
    window: int,
    stride: int,
    micro: int,
    precision: str = "none",
) -> float:
    """Summed loss of all tokens but the first, in train_gpu.py's own windows; short ones are filled up behind, where a
    causal model cannot look and nothing is scored."""
    plan, total = train_gpu.windows(len(tokens), window, stride), 0.0
    for at in range(0, len(plan), micro):
        rows = plan[at : at + micro]
        x, y = np.zeros((len(rows), window), np.int64), np.full((len(rows), window), -1, np.int64)
        for row, (start, inputs, scored) in enumerate(rows):
            x[row, :inputs] = tokens[start : start + inputs]
            y[row, inputs - scored : inputs] = tokens[
                start + inputs - scored + 1 : start + inputs + 1
            ]
        x_BT, y_BT = (torch.from_numpy(t).to(subject.device) for t in (x, y))
        with autocast(subject, precision):
            logits = subject.logits(x_BT)
        nats = F.cross_entropy(
            logits.flatten(0, 1).float(), y_BT.flatten(), ignore_index=-1, reduction="none"
        )
        total += nats.double().sum().item()
    return total


@torch.inference_mode()
def stream_nats(ours: Ours, tokens: np.ndarray, precision: str = "none") -> float:
    """The same, read once from front to back with the state carried on."""
    total, state = 0.0, ours.model.empty_state(1)
    for at in range(0, len(tokens) - 1, FEED):
        part = torch.from_numpy(tokens[at : at + FEED + 1].astype(np.int64)).to(ours.device)
        part = part[: min(FEED, len(tokens) - 1 - at) + 1]
        with autocast(ours, precision):
            logits, state = ours.model.stream(part[None, :-1], state)
        total += (
            F.cross_entropy(logits[0].float(), part[1:], reduction="none").double().sum().item()
        )
    return total


def scored(nats: float, tokens: int, words: int, n_bytes: int) -> train_gpu.Score:
    """Of a text of so many tokens, the first of which is not scored; words and bytes in that proportion."""
    share = (tokens - 1) / tokens
    return train_gpu.Score(nats, tokens - 1, words * share, n_bytes * share)


def quality(
    subject: Subject, text: str, words: int, a: argparse.Namespace, window: int, stride: int
) -> dict:
    """A row of quality.csv."""
    tokens, n_bytes = subject.encode(text), len(text.encode())
    if len(tokens) < 2:
        raise UserError(
            f"--dataset {a.dataset}: {len(tokens)} token(s) of text; 2 are needed to score one"
        )
    if tokens.max() >= subject.vocabulary:
        raise UserError(
            f"token {tokens.max()} of the text is outside a vocabulary of {subject.vocabulary}"
        )
    nats = window_nats(subject, tokens, window, stride, a.batch_size, a.precision)
    found = scored(nats, len(tokens), words, n_bytes)
    row = dict(
        window=window, stride=stride, nats=nats, tokens=found.tokens, words=words, bytes=n_bytes
    )
    row |= dict(
        loss=found.loss, ppl=found.ppl, word_ppl=found.word_ppl, bits_per_byte=found.bits_per_byte
    )
    if subject.streams:
        found = scored(stream_nats(subject, tokens, a.precision), len(tokens), words, n_bytes)
        row |= dict(
            stream_ppl=found.ppl,
            stream_word_ppl=found.word_ppl,
            stream_bits_per_byte=found.bits_per_byte,
        )
    return row


# ----------------------------------------------------------------------------
# Meters


def now(device: torch.device) -> float:
    """Seconds: CPU time of this process, which a busy machine does not stretch; a GPU's end of work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def status_mib(name: str) -> float | None:
    """VmRSS or VmHWM of this process from the kernel; ru_maxrss would also count what the parent had at the fork."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{name}:")), None
    )


class Peak:
    """Peak memory from here on, and what was held at the start, MiB."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.base = torch.cuda.memory_allocated(device) / 2**20
            return
        with contextlib.suppress(OSError):  # elsewhere than on Linux the peak includes loading
            Path("/proc/self/clear_refs").write_text("5")
        self.base = status_mib("VmRSS")

    def row(self) -> dict[str, float | None]:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak = status_mib("VmHWM") or World(0, 1, self.device).peak_memory_mib()
        return dict(
            peak_mib=peak,
            base_mib=self.base,
            above_mib=None if self.base is None else peak - self.base,
        )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


# ----------------------------------------------------------------------------
# What a child process measures


@torch.inference_mode()
def child_inference(spec: Mapping[str, object], device: torch.device) -> dict:
    """A context of T tokens, alone in this process: prefill of all but the last `decode`, then those, one by one."""
    subject, T, n = open_subject(spec["subject"], device), spec["context"], spec["decode"]
    x_BT = torch.from_numpy(
        np.random.default_rng(0).integers(0, min(subject.vocabulary, 50257), (1, T))
    ).to(device)
    with autocast(subject, spec["precision"]):
        subject.decode(
            x_BT[:, -1:], subject.prefill(x_BT[:, : min(T - n, 32)])[1]
        )  # first uses of kernels
        peak, prefills, decodes = Peak(device), [], []
        for _ in range(spec["repeats"]):
            state, t0 = None, now(device)
            _, state = subject.prefill(x_BT[:, : T - n])
            prefills.append(now(device) - t0)
            for i in range(T - n, T):
                t0 = now(device)
                _, state = subject.decode(x_BT[:, i : i + 1], state)
                decodes.append(now(device) - t0)
    low, middle, high = quartiles(decodes)
    row = dict(
        context=T, prefill_tokens=T - n, prefill_tokens_per_s=(T - n) / float(np.median(prefills))
    )
    row |= dict(
        decode_ms=1000 * middle,
        decode_ms_low=1000 * low,
        decode_ms_high=1000 * high,
        n=len(decodes),
    )
    return (
        row
        | dict(decode_tokens_per_s=1 / middle, state_bytes=subject.state_bytes(state))
        | peak.row()
    )


def grown(ours: Ours, state: train_gpu.State, T: int) -> train_gpu.State:
    """A state as it is after T tokens: attention's keys and values are filled up with drawn numbers, which cost as much
    to read as real ones; a memory's has its size from the first token on."""
    out = [torch.full_like(state[0], T)]
    for block, layer in zip(ours.model.blocks, state[1:], strict=True):
        if isinstance(block.mixer, train_gpu.Attention):
            window = block.mixer.window
            kept = T if window is None else min(T, window - 1)
            layer = tuple(
                torch.randn(1, kept, *t.shape[2:], device=t.device, dtype=t.dtype) for t in layer
            )
        out.append(layer)
    return out


@torch.inference_mode()
def child_decoding(spec: Mapping[str, object], device: torch.device) -> list[dict]:
    """Time per token and state at each context. Contexts are really read, 1024 tokens at a time; where full attention
    would take too long, from `fed` tokens on, its cache is drawn instead."""
    ours, rows, at = open_subject(spec["subject"], device), [], 0
    full = any(getattr(block.mixer, "window", 0) is None for block in ours.model.blocks)
    state, rng = ours.model.empty_state(1), np.random.default_rng(0)
    draw = lambda n: torch.from_numpy(rng.integers(0, min(ours.vocabulary, 50257), (1, n))).to(
        device
    )
    with autocast(ours, spec["precision"]):
        for T in sorted(spec["contexts"]):
            fed = not (full and T > spec["fed"])
            while fed and at < T:
                step = min(FEED, T - at)
                (_, state), at = ours.decode(draw(step), state), at + step
            here, times = state if fed else grown(ours, state, T), []
            size, peak = ours.state_bytes(here), Peak(device)
            for i in range(5 + spec["decode"]):  # the first five warm the caches up
                x_BT, t0 = draw(1), now(device)
                _, here = ours.decode(x_BT, here)
                times += [now(device) - t0] * (i >= 5)
            low, middle, high = (1000 * t for t in quartiles(times))
            row = dict(
                context=T, read="fed" if fed else "drawn", decode_ms=middle, decode_ms_low=low
            )
            rows.append(
                row | dict(decode_ms_high=high, n=len(times), state_bytes=size) | peak.row()
            )
    return rows


class Trainer:
    """A training step of train_gpu.py on drawn tokens: loss, gradients, AdamW, nothing else."""

    def __init__(self, k: train_gpu.Knobs, device: torch.device):
        self.k, self.w, self.one = k, World(0, 1, device), torch.ones((), device=device)
        self.model = train_gpu.Model(k)
        self.model.init_weights(k.seed)
        self.adam = train_gpu.AdamW(self.model.to(device), k, self.w)
        self.adam.moments()  # there from the start, as in every step but the first
        self.micro_step, self.rng = (
            train_gpu.MicroStep(self.model, k, self.w),
            np.random.default_rng(0),
        )

    def step(self, B: int, T: int) -> float:
        """Seconds of a step on (B, T) tokens."""
        tokens = self.rng.integers(0, min(self.k.vocabulary, 50257), (B, T + 1))
        x_BT, y_BT = (
            torch.from_numpy(t.copy()).to(self.w.device) for t in (tokens[:, :-1], tokens[:, 1:])
        )
        self.model.train()
        t0 = now(self.w.device)
        self.micro_step.backward(x_BT, y_BT, 1.0, self.one)
        norms = self.adam.reduce(self.one)
        self.adam.step(
            self.k.learning_rate, norms.square().sum().sqrt(), self.one, norms.isfinite().all()
        )
        self.micro_step.refresh()
        self.adam.grads.zero_()
        return now(self.w.device) - t0


def child_training_memory(spec: Mapping[str, object], device: torch.device) -> dict:
    """Peak of one training step on (B, T); weights, gradients and moments are there before it."""
    trainer = Trainer(train_gpu.Knobs(**spec["knobs"]), device)
    trainer.step(
        1, min(16, spec["context"])
    )  # what libraries allocate at first use is not the step's
    peak = Peak(device)
    trainer.step(spec["batch"], spec["context"])
    return dict(context=spec["context"], batch=spec["batch"]) | peak.row()


CHILDREN = dict(
    inference=child_inference, decoding=child_decoding, training_memory=child_training_memory
)


def measure_apart(what: str, spec: Mapping[str, object], device: str) -> object | None:
    """What CHILDREN[what] finds in a process of its own; None, and a line, where it does not get through."""
    if device == "cuda":
        torch.cuda.empty_cache()  # what quality needed here, the child may need
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--device",
        device,
        "--child",
        json.dumps([what, spec]),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = next(
        (line for line in reversed(done.stderr.splitlines()) if line.strip()),
        f"exit code {done.returncode}",
    )
    why = "out of memory" if done.returncode == -9 or "emory" in last else last[:200]
    where = {name: value for name, value in spec.items() if name in ("context", "batch")}
    show(f"  {what} {where or ''}: left out, {why}")
    return None


# ----------------------------------------------------------------------------
# Tables and figures


def show(line: str = "") -> None:
    print(line, flush=True)


def cell(value: object) -> str:
    """A number as a table shows it."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown(rows: Sequence[dict], columns: Mapping[str, str]) -> str:
    """A table of these columns, headed as the mapping says; numbers to the right. Columns that no row has are out."""
    columns = {
        name: head
        for name, head in columns.items()
        if any(row.get(name) is not None for row in rows)
    }
    numeric = {name for name in columns if not any(isinstance(row.get(name), str) for row in rows)}
    lines = ["| " + " | ".join(columns.values()) + " |"]
    lines.append("|" + "|".join("---:" if name in numeric else "---" for name in columns) + "|")
    return (
        "\n".join(
            lines
            + ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows]
        )
        + "\n"
    )


def csv_of(rows: Sequence[dict]) -> str:
    """CSV with the columns of all rows, in the order in which they first occur."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out, list(dict.fromkeys(n for row in rows for n in row)), restval="", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(
        {name: "" if value is None else value for name, value in row.items()} for row in rows
    )
    return out.getvalue()


def lines_figure(
    rows: Sequence[dict], panels: Mapping[str, str], x: str, label: str, title: str, caption: str
):
    """A panel per column, one above the other, over a shared logarithmic x: a line for each model."""
    figure, all_axes = plots.new_figure(0.9 + 2.1 * len(panels), len(panels), sharex=True)
    names = list(dict.fromkeys(row["model"] for row in rows))
    for axes, (column, text) in zip(all_axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            points = sorted(
                (row[x], row[column])
                for row in rows
                if row["model"] == name and row.get(column) is not None
            )
            if points:
                axes.plot(*zip(*points, strict=True), label=plots.plain(name), **plots.style_of(i))
        axes.set_ylabel(text, fontsize=9)
        axes.set_ylim(bottom=0)
    ticks = sorted({row[x] for row in rows})
    all_axes[-1].set_xscale("log", base=2)
    all_axes[-1].set_xticks(
        ticks, [f"{t // 1024}k" if t % 1024 == 0 and t > 1024 else str(t) for t in ticks]
    )
    all_axes[-1].minorticks_off()
    all_axes[-1].set_xlabel(label, fontsize=10)
    plots.finish(figure, all_axes, title, caption)
    plots.add_legend(all_axes[0], all_axes[-1], len(names))
    return figure


def quality_figure(rows: Sequence[dict], title: str):
    """Bits per byte of each model, a line of text with its size for each, from top to bottom."""
    figure, (axes,) = plots.new_figure(1.4 + 0.45 * len(rows))
    for i, row in enumerate(rows):
        axes.plot(row["bits_per_byte"], i, **plots.style_of(i) | dict(linestyle="", markersize=7))
        axes.annotate(f"{row['bits_per_byte']:.3f}", (row["bits_per_byte"], i), (0, 7), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    names = [
        f"{plots.plain(row['model'])}\n{row['parameters'] / 1e6:.1f} million parameters"
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.margins(x=0.1)
    axes.set_xlabel("bits per byte (lower is better; the axis does not begin at zero)", fontsize=10)
    how = f"window {rows[0]['window']} tokens, stride {rows[0]['stride']}; published models are zero-shot"
    plots.finish(figure, [axes], title, how)
    return figure


def save_figure(out: Path, name: str, figure) -> None:
    for kind in ("png", "svg"):
        program.write_whole(out / f"{name}.{kind}", plots.figure_bytes(figure, kind))


def facts(a: argparse.Namespace) -> dict:
    """With what, where and when."""
    device = torch.cuda.get_device_name() if a.device == "cuda" else f"CPU ({os.cpu_count()} cores)"
    commit = subprocess.run(
        ["git", "-C", str(program.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    found = dict(command=shlex.join(sys.orig_argv), git_commit=commit.stdout.strip() or "unknown")
    found |= dict(
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}",
        device=device,
        torch=torch.__version__,
    )
    return found | dict(
        threads=torch.get_num_threads(), load=os.getloadavg()[0], precision=a.precision
    )


def machine_line(found: Mapping[str, object]) -> str:
    clock = "process CPU time" if str(found["device"]).startswith("CPU") else "synchronised seconds"
    threads = f"{found['threads']} thread(s), " if clock == "process CPU time" else ""
    return f"{found['device']}, {threads}torch {found['torch']}, {clock}, precision {found['precision']}"


# ----------------------------------------------------------------------------
# Compare


def find_path(name: str, logs: Path) -> Path:
    """The checkpoint that a run id, a run's folder or a checkpoint's folder names."""
    path = Path(name)
    if path.name.startswith("step_") and path.is_dir():
        return lib.find_checkpoint(path.parent, path.name)
    return lib.find_checkpoint(path if path.is_dir() else lib.find_run(logs, name))


def specs_of(a: argparse.Namespace) -> list[dict]:
    """All models asked for, ours first. An untrained attention model stands beside ours where none is given."""
    paths = [
        find_path(name, Path(a.logs_folder))
        for name in [*(a.run or []), *(a.hamt_checkpoint or [])]
    ]
    specs = [dict(path=str(path)) for path in dict.fromkeys(paths)]
    knobs = [Ours(spec, torch.device("cpu")).k for spec in specs]
    for spec, k in zip(specs, knobs, strict=True):
        spec["label"] = f"{Path(spec['path']).parent.name} ({k.label})"
    if knobs and not any(k.mixer == "attention" for k in knobs):
        try:
            k = attention_beside(knobs[0])
            specs.append(
                dict(
                    knobs=dataclasses.asdict(k),
                    label="attention of the same size (untrained: speed only)",
                )
            )
        except ValueError as error:
            show(f"attention of the same size: left out, {error}")
    names = [name for name in dict.fromkeys(a.baselines) if name != "none"]
    return specs + [
        dict(name=name, offline=a.offline, label=f"{name} (zero-shot)") for name in names
    ]


def attention_beside(k: train_gpu.Knobs) -> train_gpu.Knobs:
    return dataclasses.replace(
        k, mixer="attention", memory="on", use_auxiliary_loss=False, window_every=0
    )


def opened(specs: Sequence[dict], device: torch.device) -> Iterator[tuple[dict, Subject]]:
    """One model after the other, none kept; those that cannot be had are a line each."""
    for spec in specs:
        try:
            subject = open_subject(spec, device)
        except UserError as error:
            if "name" not in spec:
                raise
            show(f"{spec['name']}: left out, {error}")
            continue
        yield spec, subject


def window_of(a: argparse.Namespace, subjects: Sequence[tuple[dict, dict]]) -> tuple[int, int]:
    """Window and stride for all: by default the shortest context among the models, without overlap."""
    window = a.window or min(facts["context"] for _, facts in subjects)
    stride = a.stride or window
    if stride > window:
        raise UserError(
            f"--stride {stride} is more than --window {window}: tokens would be left out; use up to {window}"
        )
    for spec, found in subjects:
        if found["limit"] and window > found["limit"]:
            raise UserError(
                f"--window {window}: {spec['label']} takes {found['limit']} tokens at most"
            )
    return window, stride


QUALITY = dict(
    model="model", mixer="mixer", parameters="parameters", tokens="tokens", nats="summed loss, nats"
)
QUALITY |= dict(ppl="ppl per token", word_ppl="ppl per word", bits_per_byte="bits per byte")
QUALITY |= dict(stream_ppl="streamed: ppl per token", stream_word_ppl="ppl per word")
QUALITY |= dict(stream_bits_per_byte="bits per byte")
INFERENCE = dict(model="model", context="context, tokens", prefill_tokens_per_s="prefill, tokens/s")
INFERENCE |= dict(
    decode_ms="decode, ms per token", state_bytes="state, bytes", peak_mib="peak, MiB"
)
INFERENCE |= dict(base_mib="before it, with weights, MiB", above_mib="above that, MiB")


def compare(a: argparse.Namespace, out: Path) -> None:
    device, specs = torch.device(a.device), specs_of(a)
    found = []  # what can be had, and its size
    for spec, s in opened(specs, device):
        found.append(
            (spec, dict(limit=s.limit, context=s.context, mixer=s.mixer, parameters=n_params(s)))
        )
        del s
    trained = [(spec, f) for spec, f in found if "knobs" not in spec]
    if not trained:
        raise UserError(
            "no model to compare: give --run ID, or --baselines whose weights are at hand"
        )
    window, stride = window_of(a, trained)
    k = next(
        (Ours(s, torch.device("cpu")).k for s in specs if "path" in s),
        train_gpu.Knobs(dataset="wikitext-2"),
    )
    changes = {name: getattr(a, name) for name in ("dataset", "data_folder") if getattr(a, name)}
    a.dataset = changes.get("dataset", k.dataset)
    text, words = raw_text(dataclasses.replace(k, **changes), a.split, a.max_samples)
    show(
        f"{a.dataset}, {a.split}: {words:,} words, {len(text.encode()):,} bytes; window {window}, stride {stride}"
    )

    rows, speeds = [], []
    for spec, f in found:
        row = dict(model=spec["label"], mixer=f["mixer"], parameters=f["parameters"])
        if "knobs" not in spec:
            row |= quality(open_subject(spec, device), text, words, a, window, stride)
            show(f"{row['model']}: {row['ppl']:.3f} per token, {row['word_ppl']:.3f} per word, "
                 f"{row['bits_per_byte']:.4f} bits per byte")  # fmt: skip
        rows.append(row)
        for T in a.contexts if not a.quality_only else []:
            if f["limit"] and f["limit"] < T:
                show(
                    f"  {spec['label']}: context {T} left out, it takes {f['limit']} tokens at most"
                )
                continue
            more = dict(
                subject=spec, context=T, decode=a.decode, repeats=a.repeats, precision=a.precision
            )
            if speed := measure_apart("inference", more, a.device):
                speeds.append(dict(model=spec["label"]) | speed)
    write_comparison(a, out, rows, speeds, words, len(text.encode()))


def write_comparison(
    a: argparse.Namespace, out: Path, rows: list[dict], speeds: list[dict], words: int, n_bytes: int
) -> None:
    start = facts(a)
    scored_rows = [row for row in rows if "nats" in row]
    window, stride = scored_rows[0]["window"], scored_rows[0]["stride"]
    text = f"{a.dataset}, {a.split} split: {words:,} words with line ends, {n_bytes:,} bytes"
    page = f"{text}. Window {window} tokens, stride {stride}, all tokens but the first.\n\n{markdown(rows, QUALITY)}"
    page += f"\n{NOTE}\n"
    if speeds:
        page += f"\nOne sequence, {machine_line(start)}; memory is each process's own.\n\n{markdown(speeds, INFERENCE)}"
    show(f"\n{page}")
    program.write_whole(out / "comparison.md", page)
    program.write_whole(out / "quality.csv", csv_of(rows))
    everything = start | dict(text=text, quality=rows, inference=speeds, note=NOTE)
    program.write_whole(out / "comparison.json", json.dumps(everything, indent=1) + "\n")
    save_figure(
        out, "quality", quality_figure(scored_rows, f"{Path(a.dataset).name}, {a.split} split")
    )
    if speeds:
        program.write_whole(out / "inference.csv", csv_of(speeds))
        panels = dict(
            prefill_tokens_per_s="prefill\n(tokens/s)", decode_ms="decode\n(ms per token)"
        )
        panels |= dict(peak_mib="peak memory\n(MiB)", state_mib="decode state\n(MiB)")
        drawn = [row | dict(state_mib=row["state_bytes"] / 2**20) for row in speeds]
        figure = lines_figure(
            drawn, panels, "context", "context (tokens)", "one sequence", machine_line(start)
        )
        save_figure(out, "inference", figure)


# ----------------------------------------------------------------------------
# Speed and memory of untrained models


def preset_knobs(a: argparse.Namespace, mixer: str, T: int) -> train_gpu.Knobs:
    """train_gpu.py's knobs of a preset, with --knobs over them."""
    given = [f"--{part}" for part in a.knobs.split()]
    if wrong := [part for part in given if "=" not in part]:
        raise UserError(f"--knobs {a.knobs!r}: {wrong[0][2:]!r} is not of the form name=value")
    values = dict(preset=a.preset, mixer=mixer, device=a.device, max_seq_length=T, dropout=0.0)
    values |= dict(mixed_precision=a.precision, use_auxiliary_loss=0)
    argv = [f"--{name}={value}" for name, value in values.items()] + given
    return plumbing.read_knobs(train_gpu.Knobs, train_gpu.PRESETS, argv, {})


def training_speed(
    a: argparse.Namespace, mixers: Sequence[str], device: torch.device
) -> list[dict]:
    """Training tokens/s at each length with the same tokens per step, the mixers taking turns: A B A B, then B A B A.
    With two, the ratio of the first to the second, and its 95% interval over the paired turns."""
    longest = max(a.lengths)
    trainers = {mixer: Trainer(preset_knobs(a, mixer, longest), device) for mixer in mixers}
    rows = []
    for T in a.lengths:
        B, times = max(1, a.tokens_per_step // T), {mixer: [] for mixer in mixers}
        for turn in range(a.repeats + 1):
            for mixer in mixers if turn % 2 else mixers[::-1]:
                spent = trainers[mixer].step(B, T)
                times[mixer] += [spent] * (turn > 0)  # the first is a warm-up
        for mixer in mixers:
            low, middle, high = quartiles([B * T / t for t in times[mixer]])
            row = dict(
                model=trainers[mixer].k.label,
                length=T,
                batch=B,
                tokens_per_s=middle,
                low=low,
                high=high,
                n=a.repeats,
            )
            if len(mixers) == 2 and mixer == mixers[0]:
                row |= ratio_of(times[mixers[1]], times[mixer])
            rows.append(row)
            ratio = (
                "{ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f}) of the other"
                if "ratio" in row
                else ""
            )
            show(f"{row['model']}, T={T}, B={B}: {middle:,.0f} tokens/s  {ratio.format(**row)}")
    for row in rows:  # time per token against the shortest length's
        first = next(r for r in rows if r["model"] == row["model"])
        row["time_per_token"] = first["tokens_per_s"] / row["tokens_per_s"]
    return rows


def ratio_of(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Ratio of paired times, with its 95% interval: Student's, of the mean difference of logarithms."""
    test = stats.paired([math.log(t) for t in above], [math.log(t) for t in below])
    mean = float(np.mean(np.log(above) - np.log(below)))
    low, high = (math.exp(test.lo), math.exp(test.hi)) if test else (math.nan, math.nan)
    return dict(ratio=math.exp(mean), ratio_low=low, ratio_high=high)


def training_memory(a: argparse.Namespace, mixers: Sequence[str]) -> list[dict]:
    rows = []
    for mixer in mixers:
        for kept in (False, True):
            for T in a.lengths:
                k = dataclasses.replace(preset_knobs(a, mixer, T), gradient_checkpointing=kept)
                spec = dict(knobs=dataclasses.asdict(k), context=T, batch=a.memory_batch)
                name = f"{k.label}, {'with' if kept else 'no'} checkpointing"
                if found := measure_apart("training_memory", spec, a.device):
                    rows.append(dict(model=name, mixer=mixer, checkpointing=int(kept)) | found)
                    above = cell(found["above_mib"])
                    show(
                        f"{name}, T={T}: peak {found['peak_mib']:,.0f} MiB, {above} above weights and moments"
                    )
    return rows


def decoding(a: argparse.Namespace, mixers: Sequence[str]) -> list[dict]:
    rows = []
    for mixer in mixers:
        k = preset_knobs(a, mixer, FEED)
        subject = dict(knobs=dataclasses.asdict(k), label=k.label)
        spec = dict(
            subject=subject,
            contexts=a.decode_contexts,
            decode=a.decode,
            fed=a.fed,
            precision=a.precision,
        )
        for row in measure_apart("decoding", spec, a.device) or []:
            rows.append(dict(model=k.label) | row)
            show(f"{k.label}, {row['context']} tokens ({row['read']}): {row['decode_ms']:.2f} ms per token, state "
                 f"{row['state_bytes']:,} bytes")  # fmt: skip
    return rows


TRAINING = dict(
    model="mixer", length="length, tokens", batch="sequences", tokens_per_s="training, tokens/s"
)
TRAINING |= dict(
    low="quartile", high="quartile", n="n", ratio="ratio", ratio_low="95% from", ratio_high="to"
)
TRAINING |= dict(time_per_token="time per token, shortest = 1")
MEMORY = dict(
    model="mixer",
    context="length, tokens",
    batch="sequences",
    peak_mib="peak, MiB",
    base_mib="before it, MiB",
)
MEMORY |= dict(above_mib="above that, MiB")
DECODING = dict(
    model="mixer", context="context, tokens", read="context is", decode_ms="decode, ms per token"
)
DECODING |= dict(
    decode_ms_low="quartile", decode_ms_high="quartile", n="n", state_bytes="state, bytes"
)
DECODING |= dict(peak_mib="peak, MiB")
# By part: the table's columns, the figure's x and its label, the figure's panels.
LENGTH = "sequence length (tokens)"
TABLES = dict(training=(TRAINING, "length", LENGTH, dict(tokens_per_s="training\n(tokens/s)")))
PEAKS = dict(peak_mib="peak (MiB)", above_mib="above weights and\nmoments (MiB)")
TABLES |= dict(training_memory=(MEMORY, "context", LENGTH, PEAKS))
STEPS = dict(decode_ms="decode\n(ms per token)", state_mib="state\n(MiB)")
TABLES |= dict(decoding=(DECODING, "context", "tokens so far", STEPS))


def speed_only(a: argparse.Namespace, out: Path) -> None:
    mixers = ("hamt", "attention") if a.mixer == "both" else (a.mixer,)
    device, parts, start = torch.device(a.device), a.parts, facts(a)
    sizes = {}
    for mixer in mixers:
        with torch.device("meta"):
            sizes[mixer] = sum(
                p.numel() for p in train_gpu.Model(preset_knobs(a, mixer, FEED)).parameters()
            )
    name = f"{a.preset or 'default'} {a.knobs}".strip()
    title = f"{name}: " + ", ".join(f"{mixer} {n:,} parameters" for mixer, n in sizes.items())
    show(f"{title}\n{machine_line(start)}")
    found: dict[str, list[dict]] = {}
    page = f"{title}, untrained. {machine_line(start)}.\n"
    measure = dict(
        training=lambda: training_speed(a, mixers, device),
        training_memory=lambda: training_memory(a, mixers),
    )
    measure |= dict(decoding=lambda: decoding(a, mixers))
    for part in parts:
        found[part] = rows = measure[part]()
        columns, x, label, panels = TABLES[part]
        if not rows:
            continue
        page += f"\n{markdown(rows, columns)}"
        program.write_whole(out / f"{part}.csv", csv_of(rows))
        drawn = [
            r | (dict(state_mib=r["state_bytes"] / 2**20) if part == "decoding" else {})
            for r in rows
        ]
        save_figure(out, part, lines_figure(drawn, panels, x, label, title, machine_line(start)))
    show(f"\n{page}")
    program.write_whole(out / "speed.md", page)
    program.write_whole(
        out / "speed.json", json.dumps(start | dict(sizes=sizes) | found, indent=1) + "\n"
    )


# ----------------------------------------------------------------------------
# Command line


def numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers above 0, with commas")
    return found


def one_number(text: str) -> int:
    if len(found := numbers(text)) != 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one whole number above 0")
    return found[0]


PARTS = ("training", "training_memory", "decoding")


def some_parts(text: str) -> list[str]:
    if wrong := [part for part in text.split(",") if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {wrong[0]!r}; there are {', '.join(PARTS)}")
    return text.split(",")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    both = lambda name: dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    add = lambda name, **more: p.add_argument(*both(name), **more)
    add("run", nargs="+", metavar="ID", help="runs of train_gpu.py, HAMT and attention alike")
    add(
        "hamt_checkpoint",
        nargs="+",
        metavar="PATH",
        help="the same by the folder of a run or of a checkpoint",
    )
    add("baselines", nargs="+", default=["distilgpt2", "gpt2"], metavar="NAME",
        help="gpt2, gpt2-medium, distilgpt2, pythia-160m, ..., a folder with weights, or none")  # fmt: skip
    add("offline", action="store_true", help="published models from this machine only")
    add(
        "dataset",
        metavar="X",
        help="as of train_gpu.py; default: that of the first run, else wikitext-2",
    )
    add(
        "data_folder",
        metavar="DIR",
        help="downloaded texts and token shards; default: that of the first run",
    )
    add("split", choices=("val", "test"), default="test")
    add(
        "max_samples",
        type=one_number,
        metavar="N",
        help="lines of text at most that are not empty (all)",
    )
    add(
        "window",
        type=one_number,
        metavar="T",
        help="tokens of a window; default: the shortest context",
    )
    add(
        "stride",
        type=one_number,
        metavar="T",
        help="tokens that a later window scores; default: the window",
    )
    add("batch_size", type=one_number, default=1, metavar="N", help="windows at a time (1)")
    add("precision", choices=tuple(PRECISIONS), default="none", help="autocast; none is fp32")
    add("device", choices=("cpu", "cuda"), default="cpu")
    add(
        "contexts",
        type=numbers,
        default=[256, 512, 1024],
        metavar="T,...",
        help="for speed and memory (256,512,1024)",
    )
    add(
        "decode",
        type=one_number,
        default=16,
        metavar="N",
        help="tokens decoded at each context (16)",
    )
    add("repeats", type=one_number, default=5, metavar="N", help="measurements of each time (5)")
    add("quality_only", action="store_true", help="no speed, no memory")
    add("logs_folder", default=str(program.ROOT / "logs"), metavar="DIR")
    add("output_dir", metavar="DIR", help="default: experiments/comparison/<date and time>")
    add("speed_only", action="store_true", help="measure untrained models of a preset instead")
    add("preset", choices=tuple(train_gpu.PRESETS), default="33m", help="of train_gpu.py (33m)")
    add("mixer", choices=("both", *train_gpu.MIXERS), default="both")
    add("knobs", default="", metavar='"NAME=VALUE ..."', help="more of train_gpu.py's knobs")
    add(
        "parts",
        type=some_parts,
        default=list(PARTS),
        metavar="X,...",
        help=f"some of {', '.join(PARTS)}",
    )
    add(
        "lengths",
        type=numbers,
        default=[128, 256, 512, 1024, 2048, 4096],
        metavar="T,...",
        help="of training",
    )
    add(
        "tokens_per_step",
        type=one_number,
        default=4096,
        metavar="N",
        help="the same at every length (4096)",
    )
    add(
        "memory_batch",
        type=one_number,
        default=1,
        metavar="N",
        help="sequences where memory is measured (1)",
    )
    add(
        "decode_contexts",
        type=numbers,
        default=[2**i * 1024 for i in range(7)],
        metavar="T,...",
        help="1k to 64k",
    )
    add(
        "fed",
        type=one_number,
        default=4096,
        metavar="T",
        help="longer caches of full attention are drawn (4096)",
    )
    add("child", help=argparse.SUPPRESS)
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments(argv)
    if a.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda, but torch {torch.__version__} sees no CUDA GPU; leave it out to use the CPU"
        )
    if a.child:
        what, spec = json.loads(a.child)
        print(json.dumps(CHILDREN[what](spec, torch.device(a.device))))
        return
    if not a.speed_only and min(a.contexts) <= a.decode:
        raise UserError(f"--contexts {min(a.contexts)} must be longer than --decode {a.decode}")
    default = program.ROOT / f"experiments/comparison/{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    out = Path(a.output_dir or default)
    try:
        program.need("matplotlib.figure", "a figure")  # said before anything is measured
        (speed_only if a.speed_only else compare)(a, out)
    except program.UserError as error:
        raise UserError(error) from None
    show(f"\n{out}")


if __name__ == "__main__":
    plumbing.launch(main)
