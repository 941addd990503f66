"""train_arith.py -- a compact transformer that reads an arithmetic expression and writes its value, in one file.

    python train_arith.py --config configs/pilot.yaml --output-dir runs/pilot --seed 42
    python train_arith.py --config configs/scale_10m.yaml --output-dir runs/scale_10m --seed 42 --device cuda --fp16 \
        --gpu-only
    python train_arith.py --config configs/pilot.yaml --set training.optimizer.lr=1e-3 --set batch_size=64
    python train_arith.py --help                    every knob; --dry_run shows the plan and stops

A flag beats the environment, the environment beats --set KEY=VALUE, --set beats the file of --config, the file beats
the defaults (which are configs/pilot.yaml's). The two data modes: records of a .jsonl file, in shuffled epochs, or
expressions drawn on the fly (TRAIN_PATH=generate), where no expression of a test set can ever be drawn.

Expect   configs/pilot.yaml: val_loss about 1.52 after 50 epochs, entropy floor (the random operands) 1.076; the
         legacy metric 0.93 at depth 3, and an exact match of about 0: 2000 examples do not teach arithmetic
Shapes   B sequences, T tokens, C model width, H heads, D head width, F MLP width, V vocabulary, N examples, L slots of
         a template, W digits of an operand; x_BTC has shape (B, T, C)
Units    losses in nats per scored token; BATCH_SIZE in examples over all ranks; times in seconds or ms, as named
Raises   UserError (one line, exit code 2) for a bad knob, key, file or checkpoint, before training starts; RuntimeError
         (exit code 1) when --gpu-only or --fp16 cannot be kept
Sources  model, tokenizer, schedule, messages: github.com/Nishal14/Step-free-arithmetic-transformers. Answers: Lee
         et al., arXiv 2307.03381. Rotary: Su et al., arXiv 2104.09864. Muon: kellerjordan.github.io/posts/muon, scaled
         as in Liu et al., arXiv 2502.16982. Hook names: TransformerLens
Shared   plumbing.py keeps the run alive and accounted for. Everything that can change the loss is in this file.
"""

import argparse
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import plumbing
from plumbing import (
    HERE,
    Clock,
    Prefetch,
    Pulse,
    RunLog,
    UserError,
    World,
    knob,
    knobs_json,
    launch,
)

# ----------------------------------------------------------------------------
# Knobs

PRESETS = {"pilot": {}}
# What may differ when a run is resumed: nothing here moves the loss curve.
FREE = "preset config output_dir gpu_only val_every eval_interval save_every save_interval keep device compile attention "
FREE += "log_interval track track_project run_id stage logs_folder results_file dry_run model_name"
GENERATE = "generate"
FORMATS, GRAMMARS = (
    ("plain", "reversed", "complement", "complement_bare"),
    ("pilot", "redundant", "trees"),
)


@dataclass(frozen=True)
class Knobs:
    preset: str = knob("pilot", "named set of defaults", choices=tuple(PRESETS))
    # model
    model_name: str = knob("pilot-arithmetic", "copied into the checkpoints")
    d_model: int = knob(128, "model width, channels", low=2)
    num_layers: int = knob(4, "transformer blocks", low=1)
    num_heads: int = knob(4, "attention heads", low=1)
    d_ff: int = knob(384, "MLP width", low=1)
    ffn_type: str = knob(
        "gelu", "MLP: plain, or gated by a second projection", choices=("gelu", "geglu", "swiglu")
    )
    dropout: float = knob(0.1, "probability, at five places", low=0, high=0.99)
    use_rope: bool = knob(True, "rotary positions; 0: a learned table")
    tie_weights: bool = knob(True, "the head is the embedding")
    attention: str = knob(
        "auto", "sdpa where nothing looks inside, or by hand", choices=("auto", "manual", "sdpa")
    )
    # what the text looks like
    sequence_length: int = knob(
        32, "tokens; longer records are refused", low=8, alias=("max_seq_len",)
    )
    answer_format: str = knob("plain", "how the value is written", choices=FORMATS)
    answer_digits: int | None = knob(
        None, "digits of a reversed or complement answer", low=1, high=17, none="auto"
    )
    spaces: bool = knob(True, "a space on both sides of '='")
    # data
    train_path: str = knob("data/pilot_train.jsonl", f"records, or '{GENERATE}'")
    val_path: str = knob("data/pilot_val.jsonl", f"records, or '{GENERATE}'")
    test_path: str = knob(
        "data/pilot_test_flat.jsonl", "records scored at the end, files with spaces between; or ''"
    )
    train_examples: int = knob(
        0,
        "generated examples, in epochs, or drawn anew under a curriculum; 0: every batch is fresh",
        low=0,
    )
    val_examples: int = knob(1000, "generated validation examples", low=1)
    grammar: str = knob(
        "pilot",
        "the original's 18 templates, all nestings, or all without double brackets",
        choices=GRAMMARS,
    )
    operators: str = knob("+-*", "operators to draw from, of + - *")
    operand_min: int = knob(1, "smallest operand", low=0)
    operand_max: int = knob(99, "largest operand", low=1)
    operand_sampling: str = knob(
        "uniform", "over values, or first over digit counts", choices=("uniform", "balanced")
    )
    operands_min: int = knob(2, "operands of an expression, from", low=2)
    operands_max: int = knob(4, "operands of an expression, to", low=2, high=9)
    operands_weights: str = knob(
        "", "how often each operand count is drawn, such as 1,1,1.5; '': alike"
    )
    depth_min: int = knob(0, "nesting, from", low=0)
    depth_max: int = knob(2, "nesting, to", low=0, high=8)
    curriculum: float = knob(
        0.0, "part of training over which the operand count grows to its maximum", low=0, high=1
    )
    curriculum_exact: float = knob(
        0.0,
        "draw one more operand when the training batches' running exact match passes this; 0: off",
        low=0,
        high=1,
    )
    # schedule
    num_epochs: int = knob(50, "passes over the records", low=1)
    num_iterations: int | None = knob(
        None, "optimizer steps; auto: from NUM_EPOCHS", low=0, none="auto"
    )
    batch_size: int = knob(32, "examples per step, over all ranks", low=1)
    schedule: str = knob(
        "linear",
        "to zero from the warm-up on, or in the last part",
        choices=("linear", "trapezoid"),
    )
    warmup_steps: int = knob(100, "steps of linear warm-up from 0", low=0)
    warmdown_frac: float = knob(0.4, "last part of a trapezoid, falling to 0", above=0, high=1)
    # optimizers
    answer_only_loss: bool = knob(False, "score the answer and its end only")
    optimizer: str = knob(
        "adamw", "muon: for the blocks' matrices, AdamW for the rest", choices=("adamw", "muon")
    )
    lr: float = knob(0.0003, "peak rate of AdamW", low=0, alias=("learning_rate",))
    muon_lr: float = knob(0.004, "peak rate of Muon, on AdamW's scale", low=0)
    weight_decay: float = knob(0.01, "decoupled, on every parameter", low=0)
    betas: str = knob("0.9,0.95", "AdamW's two decay rates")
    grad_clip: float = knob(1.0, "largest norm of the whole gradient; 0: off", low=0)
    seed: int = knob(42, "weights, order, dropout and generated data", low=0)
    # evaluation and saving
    eval_interval: int = knob(5, "epochs between validations", low=1)
    val_every: int | None = knob(
        None, "steps between validations; auto: EVAL_INTERVAL; 0: the last only", low=0, none="auto"
    )
    save_interval: int = knob(10, "epochs between saved models", low=1)
    save_every: int | None = knob(
        None, "steps between checkpoints; auto: SAVE_INTERVAL; 0: at the end", low=0, none="auto"
    )
    keep: int = knob(2, "checkpoints kept for a resume", low=1)
    # the run
    config: str = knob("", "YAML file of knobs")
    output_dir: str = knob("", "folder of models and records; its name is the run's id")
    device: str = knob(
        "cpu",
        "where to train; cuda falls back, with a line, unless --gpu-only",
        choices=("cpu", "cuda"),
    )
    fp16: bool = knob(False, "half precision with loss scaling; needs CUDA")
    bf16: bool = knob(False, "bfloat16 autocast")
    gpu_only: bool = knob(False, "abort where training would not run on a GPU")
    compile: bool = knob(False, "torch.compile")
    log_interval: int = knob(25, "steps between printed steps", low=1)
    track: str = knob("", "also send the curves there", choices=("", "wandb", "trackio"))
    track_project: str = knob(
        "math-compact-pilot", "project of the tracker", alias=("wandb_project",)
    )
    run_id: str = knob(
        "", "an unfinished run's id resumes it; empty: OUTPUT_DIR's name, or made once per launch"
    )
    stage: str = knob("", "stage of a study, copied into the results row")
    logs_folder: str = knob(str(HERE / "logs"), "folder of runs without OUTPUT_DIR")
    results_file: str = knob(
        str(HERE / "experiments/results_arith.csv"), "file that gets one row per run"
    )
    dry_run: bool = knob(False, "show knobs, sizes and data, and stop")

    def __post_init__(self):
        if self.d_model % self.num_heads or self.d_model // self.num_heads % 2:
            raise ValueError(
                f"D_MODEL={self.d_model} must be NUM_HEADS={self.num_heads} times an even head width (rotary)"
            )
        if not re.fullmatch(r"0?\.\d+,0?\.\d+", self.betas):
            raise ValueError(
                f"BETAS={self.betas!r}: expected two numbers in (0, 1), such as 0.9,0.95"
            )
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"OPERATORS={self.operators!r}: expected some of + - *, such as +-")
        for low, high in (
            (self.operand_min, self.operand_max),
            (self.operands_min, self.operands_max),
        ):
            if low > high:
                raise ValueError(
                    f"a range from {low} to {high} is empty: swap OPERAND(S)_MIN and OPERAND(S)_MAX"
                )
        if self.depth_min > self.depth_max:
            raise ValueError(
                f"DEPTH_MIN={self.depth_min} is above DEPTH_MAX={self.depth_max}; swap them"
            )
        if self.grammar == "pilot" and (self.operands_max > 4 or self.depth_max > 2):
            raise ValueError(
                "GRAMMAR=pilot ends at 4 operands and depth 2; use GRAMMAR=redundant or trees for more"
            )
        if self.largest > 10**17:
            raise ValueError(
                f"OPERAND_MAX={self.operand_max} and OPERANDS_MAX={self.operands_max}: values beyond 1e17"
            )
        counts = self.operands_max - self.operands_min + 1
        if self.operands_weights and (len(self.weights) != counts or min(self.weights) < 0):
            raise ValueError(
                f"OPERANDS_WEIGHTS={self.operands_weights!r}: one number >= 0 per operand count, {counts} with commas"
            )
        if self.fp16 and self.bf16:
            raise ValueError("FP16=1 and BF16=1 exclude each other; set one of them")
        if self.fp16 and self.optimizer == "muon":
            raise ValueError(
                "FP16=1 scales the loss for AdamW only; with OPTIMIZER=muon use BF16=1"
            )
        if (
            self.train_path == GENERATE
            and self.num_iterations is None
            and (self.staged or not self.train_examples)
        ):
            raise ValueError(
                "TRAIN_PATH=generate has epochs only with TRAIN_EXAMPLES and without a curriculum; set NUM_ITERATIONS"
            )
        if self.staged and self.train_path != GENERATE:
            raise ValueError(
                "CURRICULUM and CURRICULUM_EXACT sort generated examples: set TRAIN_PATH=generate"
            )
        if self.curriculum_exact and not self.answer_only_loss:
            raise ValueError(
                "CURRICULUM_EXACT goes by the training answers: set ANSWER_ONLY_LOSS=1"
            )
        if self.curriculum_exact and self.curriculum:
            raise ValueError("CURRICULUM and CURRICULUM_EXACT exclude each other; set one of them")
        if self.output_dir and self.run_id and Path(self.output_dir).name != self.run_id:
            raise ValueError(
                f"OUTPUT_DIR={self.output_dir} names the run, RUN_ID={self.run_id} differs; leave one out"
            )

    @property
    def weights(self) -> list[float]:
        """How often each operand count is drawn, from OPERANDS_MIN on."""
        try:
            return (
                [float(x) for x in self.operands_weights.split(",")]
                if self.operands_weights
                else []
            )
        except ValueError:
            return []

    @property
    def staged(self) -> bool:
        """Whether the operand count grows during training."""
        return bool(self.curriculum or self.curriculum_exact)

    @property
    def largest(self) -> int:
        """No generated value is larger."""
        n, x = self.operands_max, self.operand_max
        return max(x**n, n * x) if "*" in self.operators else n * x

    @property
    def separator(self) -> str:
        return " = " if self.spaces else "="

    @property
    def operand_width(self) -> int:
        return len(str(self.operand_max))

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else None


# Sections of the YAML file: keys that are knobs, and KEY=KNOB where the names differ.
YAML = {
    "model": "name=model_name d_model num_layers num_heads d_ff max_seq_len=sequence_length dropout use_rope "
    "tie_weights ffn_type attention",
    "data": "train_path val_path test_path max_seq_len=sequence_length answer_format answer_digits spaces "
    "train_examples val_examples grammar operators operand_min operand_max operand_sampling operands_min operands_max "
    "operands_weights depth_min depth_max curriculum curriculum_exact",
    "training": "num_epochs num_iterations batch_size schedule warmdown_frac answer_only_loss grad_clip eval_interval "
    "val_every save_interval save_every",
    "training.optimizer": "name=optimizer lr muon_lr weight_decay warmup_steps betas",
    "logging": "log_interval use_wandb=track wandb_project=track_project track",
}
YAML = {
    f"{s}.{w.split('=')[0]}": w.split("=")[-1] for s, words in YAML.items() for w in words.split()
}
# Keys of the original's files that describe what this trainer always does: their only accepted value, and why.
FIXED = {
    "model.vocab_size": (35, "the tokenizer has 35 ids"),
    "data.use_steps": (False, "there are no steps in the text"),
}
FIXED |= {
    "data.step_masking_mode": (
        "none",
        "there are no steps in the text; ANSWER_ONLY_LOSS masks all but the answer",
    )
}


def flat_items(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flat_items(value, path + ".")
        else:
            yield path, value


def as_text(path: str, value: object) -> str:
    """A YAML value as one would type it as a flag."""
    if path == "logging.use_wandb" and isinstance(value, bool):
        return "wandb" if value else ""
    if isinstance(value, bool):
        return str(int(value))
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def knob_of(path: str, value: object, source: str) -> tuple[str, str] | None:
    """The knob's name and text for a YAML key or --set's, None for a key that may only have one value and has it.
    Raises UserError for an unknown key, with the nearest one."""
    if path in FIXED:
        want, why = FIXED[path]
        if value != want:
            raise UserError(
                f"{source}: {path}: {value} is refused: {why}; write {want}, or leave the key out"
            )
        return None
    names = {f.name for f in dataclasses.fields(Knobs)}
    if path in YAML or (source == "--set" and path in names):
        return YAML.get(path, path), as_text(path, value)
    known = [*YAML, *FIXED, *(names if source == "--set" else ())]
    leaf = path.rsplit(".", 1)[-1]
    near = [key for key in known if key.rsplit(".", 1)[-1] == leaf] or difflib.get_close_matches(
        path, known, n=1
    )
    hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(YAML)}"
    raise UserError(f"{source}: {path} is not a key; {hint}")


def read_yaml(path: str) -> dict:
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(
            f"--config {path}: cannot be read ({error.strerror}); configs/ has examples"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(
            f"--config {path}: not YAML ({' '.join(str(error).split())}); configs/ has examples"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(
            f"--config {path}: expected sections such as model: and training:, as in configs/pilot.yaml"
        )
    return tree


def read_all(argv: Sequence[str], env: dict[str, str], config: str, sets: Sequence[str]) -> Knobs:
    """Flags over environment over --set over YAML over defaults, all checked as flags are."""
    given: dict[str, tuple[str, str]] = {}
    items = [(config, *item) for item in flat_items(read_yaml(config))] if config else []
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(
                f"--set {text}: expected key=value, such as training.optimizer.lr=0.001"
            )
        items.append(
            (
                "--set",
                key,
                yaml.safe_load(value) if key in FIXED or key == "logging.use_wandb" else value,
            )
        )
    for source, path, value in items:
        if found := knob_of(path, value, source):
            name, text = found
            if (
                name in given
                and given[name][0] != text
                and given[name][1].startswith(f"{source}: ")
                and config == source
            ):
                raise UserError(
                    f"{source}: {path}: {text}, but {given[name][1]}; they are one knob, give one value"
                )
            given[name] = (text, f"{source}: {path}: {text}")
    spellings = {
        s.upper(): f.name for f in dataclasses.fields(Knobs) for s in (f.name, *f.metadata["alias"])
    }
    by_env = {spellings[name] for name in env if name in spellings}
    below = {name.upper(): text for name, (text, _) in given.items() if name not in by_env}
    try:
        return plumbing.read_knobs(Knobs, PRESETS, argv, {**below, **env}, __doc__)
    except UserError as error:
        name = str(error).split("=")[0]
        where = given[name.lower()][1] if name in below else ""
        raise UserError(f"{error} [{where}]" if where else str(error)) from None


def settle_device(
    device: str, fp16: bool, gpu_only: bool, say: Callable[[str], None] = print
) -> str:
    """The device to train on. Raises RuntimeError, in the original's words and order, where GPU-only mode or fp16
    cannot be kept; without GPU-only mode the way down to the CPU is one line."""
    if gpu_only and device != "cuda":
        raise RuntimeError(
            "GPU-only mode requires --device cuda. Aborting to prevent accidental CPU training."
        )
    if gpu_only and not torch.cuda.is_available():
        raise RuntimeError(
            "CUDA requested but not available. GPU-only mode cannot fall back to CPU. Aborting."
        )
    if gpu_only:
        rule = "=" * 60
        say(
            f"{rule}\nGPU-ONLY MODE ENABLED\nCPU training is disabled. Will abort if GPU unavailable.\n{rule}"
        )
    if device == "cuda" and not torch.cuda.is_available():
        say("CUDA not available, using CPU")
        device = "cpu"
    if fp16 and device != "cuda":
        raise RuntimeError("FP16 mixed precision requires CUDA device")
    return device


def settings(argv: Sequence[str]) -> Knobs:
    """Knobs from the command line; the device is settled before any file is opened."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--set", action="append", default=[])
    early.add_argument("--config", default=os.environ.get("CONFIG", ""))
    early.add_argument("--device", default=os.environ.get("DEVICE", "cpu"))
    for name in ("fp16", "gpu_only"):
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        early.add_argument(
            *spellings, nargs="?", const="1", default=os.environ.get(name.upper(), "0")
        )
    found, rest = early.parse_known_args(argv)
    if found.device not in ("cpu", "cuda"):
        raise UserError(f"DEVICE={found.device!r}: expected one of cpu, cuda")
    say = print if os.environ.get("RANK", "0") == "0" else lambda line: None
    device = settle_device(found.device, found.fp16 == "1", found.gpu_only == "1", say)
    rest += [
        f"--device={device}",
        f"--config={found.config}",
        f"--fp16={found.fp16}",
        f"--gpu_only={found.gpu_only}",
    ]
    return read_all(rest, dict(os.environ), found.config, found.set)


# ----------------------------------------------------------------------------
# Tokens and answers

VOCABULARY = ["<PAD>", "<BOS>", "<EOS>", "<UNK>", *"0123456789+-*/()=ABCDEFabcdef ,"]
PAD, BOS, EOS, UNK, ZERO = 0, 1, 2, 3, 4
IDS = {character: i for i, character in enumerate(VOCABULARY)}
IGNORE = -100  # label of a token that is not scored


def encode(text: str, special: bool = True) -> list[int]:
    """Character ids, between BOS and EOS when `special`; an unknown character is UNK."""
    ids = [IDS.get(c, UNK) for c in text]
    return [BOS, *ids, EOS] if special else ids


def decode(ids: Sequence[int]) -> str:
    """The text without PAD, BOS and EOS."""
    return "".join(VOCABULARY[int(i)] for i in ids if int(i) not in (PAD, BOS, EOS))


def write_answer(value: int, form: str, digits: int) -> str:
    """plain: the number. reversed: |value| in `digits` digits, least significant first, then the sign. complement:
    value mod 10^digits (ten's complement), written alike: every digit depends on lower ones only. complement_bare:
    without the sign, which is then that of the last digit: 5 and more are negative."""
    if form == "plain":
        return str(value)
    body = abs(value) if form == "reversed" else value % 10**digits
    return f"{body:0{digits}d}"[::-1] + (
        "" if form == "complement_bare" else "-" if value < 0 else "+"
    )


def read_answer(text: str, form: str) -> int | None:
    """The value that `text` writes; None where it writes none."""
    if form == "plain":
        return int(text) if re.fullmatch(r"-?\d+", text) else None
    if not re.fullmatch(r"\d+" if form == "complement_bare" else r"\d+[+-]", text):
        return None
    if form == "complement_bare":
        text += "-" if text[-1] >= "5" else "+"
    body = int(text[-2::-1])
    if text[-1] == "+":
        return body
    return -body if form == "reversed" else body - 10 ** (len(text) - 1)


def depth_labels(expr: str) -> list[int]:
    """Nesting depth of each character: '(' counts itself, ')' does not."""
    steps = np.cumsum([(c == "(") - (c == ")") for c in expr])
    return steps.tolist()


def evaluate_expr(expr: str) -> int:
    """The integer value of an expression of digits, + - * and brackets. Raises ValueError for any other text."""
    if not re.fullmatch(r"[\d+*()-]+", expr):
        raise ValueError(f"not an arithmetic expression: {expr!r}")
    try:
        value = eval(expr, {"__builtins__": {}})
    except SyntaxError:
        raise ValueError(f"not an arithmetic expression: {expr!r}") from None
    if not isinstance(value, int) or abs(value) > 2**63 - 1:
        raise ValueError(f"no 64-bit integer: {expr!r}")
    return value


@dataclass(frozen=True)
class Problems:
    """N sequences: BOS, expression, separator, answer, EOS, then PAD."""

    tokens_NT: np.ndarray  # uint8
    lengths_N: np.ndarray  # of BOS to EOS
    starts_N: np.ndarray  # position of the answer's first token
    values_N: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.lengths_N)

    def rows(self, index) -> "Problems":
        return Problems(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))

    def exprs(self, k: Knobs) -> list[str]:
        ends = self.starts_N - len(k.separator)
        return [decode(row[1:end]) for row, end in zip(self.tokens_NT, ends, strict=True)]


def pack(rows: Sequence[Sequence[int]], starts: Sequence[int], values: Sequence[int]) -> Problems:
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.uint8)
    for out, row in zip(tokens, rows, strict=True):
        out[: len(row)] = row
    return Problems(tokens, lengths, np.array(starts), np.array(values, np.int64))


def problems_of(exprs: Sequence[str], values: Sequence[int], k: Knobs, digits: int) -> Problems:
    """Encode written expressions; `digits` of a reversed or complement answer."""
    heads = [expr + k.separator for expr in exprs]
    answers = [write_answer(value, k.answer_format, digits) for value in values]
    rows = [encode(head + answer) for head, answer in zip(heads, answers, strict=True)]
    return pack(rows, [1 + len(head) for head in heads], values)


# ----------------------------------------------------------------------------
# Drawing expressions

# The original's templates by (depth, operands), in its order: N an operand, o an operator.
PILOT = {
    (0, 2): "NoN",
    (0, 3): "NoNoN",
    (0, 4): "NoNoNoN",
    (1, 2): "(NoN)",
    (1, 3): "(NoN)oN No(NoN) (NoNoN)",
}
PILOT |= {(1, 4): "(NoN)o(NoN) (NoNoN)oN No(NoNoN)", (2, 2): "((NoN))"}
PILOT |= {
    (2, 3): "((NoN)oN) (No(NoN)) ((NoN))oN No((NoN))",
    (2, 4): "((NoN)o(NoN)) (No(NoN))oN No((NoN)oN)",
}
BUCKETS, TEST, VAL = (
    32,
    0,
    1,
)  # of a hash of the expression without brackets: 0 is kept for tests, 1 for validation


def is_bracketed(template: str) -> bool:
    """Whether one bracket spans all of it."""
    return template[0] == "(" and min(depth_labels(template)[:-1]) > 0


@cache
def nestings(n: int, depth: int, redundant: bool) -> tuple[str, ...]:
    """Templates of n operands nested at most `depth` deep, also ones in a bracket of their own; a bracket holds at
    least two operands, and unless `redundant` not just another bracket."""

    def items(m: int) -> list[str]:
        inner = nestings(m, depth - 1, redundant) if m > 1 and depth else ()
        return ["N"] if m == 1 else [f"({s})" for s in inner if redundant or not is_bracketed(s)]

    found = [
        a + "o" + b
        for m in range(1, n)
        for a in items(m)
        for b in nestings(n - m, depth, redundant)
    ]
    return (*found, *items(n))


@cache
def templates(n: int, depth: int, grammar: str) -> tuple[str, ...]:
    """All templates of exactly n operands and exactly this depth."""
    if grammar == "pilot":
        return tuple(PILOT.get((depth, n), "").split())
    redundant = grammar == "redundant"
    found = nestings(n, depth, redundant)
    return tuple(
        s for s in found if max(depth_labels(s)) == depth and (redundant or not is_bracketed(s))
    )


@dataclass(frozen=True)
class Table:
    """The templates that may be drawn, slot by slot, and how often."""

    texts: list[str]
    share_S: np.ndarray  # probability of each
    n_S: np.ndarray  # operands
    kind_SL: np.ndarray  # the slot's character as a code point, 0 behind the end
    nth_SL: np.ndarray  # which operand or operator a slot holds


@lru_cache(maxsize=16)
def table(k: Knobs, most: int) -> Table:
    """Operand count by its weight, then depth alike, then template alike; expressions of at most `most` operands.
    Raises UserError when no template fits, or too many do."""
    counts, depths = range(k.operands_min, most + 1), range(k.depth_min, k.depth_max + 1)
    texts, share = [], []
    for n in counts:
        cells = [cell for depth in depths if (cell := templates(n, depth, k.grammar))]
        weight = k.weights[n - k.operands_min] if k.weights else 1.0
        for cell in cells:
            texts += cell
            share += [weight / len(cells) / len(cell)] * len(cell)
    if not texts or sum(share) <= 0:
        raise UserError(
            f"GRAMMAR={k.grammar}: no template has {counts} operands and depth {depths}; change a range"
        )
    length = max(map(len, texts))
    kind = np.array([[*map(ord, text), *[0] * (length - len(text))] for text in texts])
    nth = [np.cumsum(kind == ord(c), axis=1) - 1 for c in "No"]
    nth_SL = np.where(kind == ord("N"), nth[0], np.where(kind == ord("o"), nth[1], 0))
    return Table(texts, np.array(share) / sum(share), (kind == ord("N")).sum(1), kind, nth_SL)


def draw_operands(k: Knobs, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if k.operand_sampling == "uniform":
        return rng.integers(k.operand_min, k.operand_max + 1, shape)
    spans = digit_spans(k)
    low, high = np.array(spans)[rng.integers(0, len(spans), shape)].transpose(
        -1, *range(len(shape))
    )
    return low + (rng.random(shape) * (high - low + 1)).astype(np.int64)


def digit_spans(k: Knobs) -> list[tuple[int, int]]:
    """Smallest and largest operand of each digit count in use."""
    spans = [(10**w if w else 0, 10 ** (w + 1) - 1) for w in range(k.operand_width)]
    spans = [(max(low, k.operand_min), min(high, k.operand_max)) for low, high in spans]
    return [(low, high) for low, high in spans if low <= high]


def hash_of(num_BN: np.ndarray, op_BN: np.ndarray, n_B: np.ndarray) -> np.ndarray:
    """uint64 of operands and operators in their order. Brackets do not enter: all groupings of the same operands share
    it, so that minimal pairs and controls fall on the same side as what they are compared with."""
    h = np.full(len(n_B), 0x9E3779B97F4A7C15, np.uint64)
    for i in range(num_BN.shape[1]):
        op = np.where(i + 1 < n_B, op_BN[:, i] if i < op_BN.shape[1] else 0, 0)
        x = h ^ (num_BN[:, i].astype(np.uint64) * np.uint64(64) + op.astype(np.uint64))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = np.where(i < n_B, x ^ (x >> np.uint64(31)), h)
    return h


def hash_expr(expr: str) -> int:
    """hash_of a written expression; `hash_expr(e) % BUCKETS` is its bucket."""
    num, op = (
        [int(x) for x in re.findall(r"\d+", expr)],
        [IDS[c] for c in re.sub(r"[\d()]", "", expr)],
    )
    return int(hash_of(np.array([num]), np.array([[*op, 0]]), np.array([len(num)]))[0])


def values_of(kind_BL: np.ndarray, num_BL: np.ndarray, op_BL: np.ndarray, depth: int) -> np.ndarray:
    """int64 values of B expressions at once, slot by slot: per level a sum, the term being multiplied up, and the
    operator that waits for the next operand."""
    B, plus, times = len(kind_BL), IDS["+"], IDS["*"]
    total, term = (np.zeros((B, depth + 1), np.int64) for _ in range(2))
    waits, level = np.full((B, depth + 1), plus), np.zeros(B, np.int64)
    for kind, num, op in zip(kind_BL.T, num_BL.T, op_BL.T, strict=True):
        into = np.flatnonzero(kind == ord("("))
        level[into] += 1
        total[into, level[into]] = term[into, level[into]] = 0
        waits[into, level[into]] = plus
        out = np.flatnonzero(kind == ord(")"))
        value = num.copy()
        value[out] = total[out, level[out]] + term[out, level[out]]
        level[out] -= 1
        rows = np.flatnonzero((kind == ord("N")) | (kind == ord(")")))
        at, value = (rows, level[rows]), value[rows]
        how, old = waits[at], term[at]
        total[at] += np.where(how == times, 0, old)
        term[at] = np.where(how == times, old * value, np.where(how == plus, value, -value))
        rows = np.flatnonzero(kind == ord("o"))
        waits[rows, level[rows]] = op[rows]
    return total[:, 0] + term[:, 0]


def compress(wide_BX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token rows with holes (-1) to rows without, PAD at the end; and what is left of each, up to every column."""
    kept = wide_BX >= 0
    ends = kept.cumsum(1)
    rows, columns = np.nonzero(kept)
    tokens = np.zeros((len(wide_BX), int(ends[:, -1].max())), np.uint8)
    tokens[rows, ends[rows, columns] - 1] = wide_BX[rows, columns]
    return tokens, ends


def digit_tokens(x_B: np.ndarray, width: int, strip: bool) -> np.ndarray:
    """(..., width) digit ids, most significant first; `strip` makes holes (-1) of leading zeros."""
    powers = 10 ** np.arange(width - 1, -1, -1)
    digits = x_B[..., None] // powers % 10 + ZERO
    return np.where((x_B[..., None] >= powers) | (powers == 1), digits, -1) if strip else digits


def answer_tokens(value_B: np.ndarray, k: Knobs, digits: int) -> np.ndarray:
    """write_answer for many values: (B, digits + 1) ids with holes."""
    sign = np.where(value_B < 0, IDS["-"], -1 if k.answer_format == "plain" else IDS["+"])[:, None]
    if k.answer_format == "plain":
        return np.concatenate([sign, digit_tokens(abs(value_B), digits, True)], 1)
    body = abs(value_B) if k.answer_format == "reversed" else value_B % 10**digits
    written = digit_tokens(body, digits, False)[:, ::-1]
    return written if k.answer_format == "complement_bare" else np.concatenate([written, sign], 1)


def draw(
    k: Knobs, rng: np.random.Generator, count: int, most: int, digits: int
) -> tuple[Problems, np.ndarray]:
    """`count` problems of at most `most` operands, and their hashes; nothing is held out."""
    t = table(k, most)
    which = np.searchsorted(t.share_S.cumsum(), rng.random(count), "right").clip(
        max=len(t.texts) - 1
    )
    num, n = draw_operands(k, rng, (count, k.operands_max)), t.n_S[which]
    op = np.array([IDS[c] for c in k.operators])[
        rng.integers(0, len(k.operators), (count, k.operands_max))
    ]
    kind, nth = t.kind_SL[which], t.nth_SL[which]
    num_BL, op_BL = (np.take_along_axis(x, nth, 1) for x in (num, op))
    slots = np.full((count, kind.shape[1], k.operand_width), -1)
    slots[..., -1] = np.select(
        [kind == ord("o"), kind == ord("("), kind == ord(")")], [op_BL, IDS["("], IDS[")"]], -1
    )
    slots = np.where(
        (kind == ord("N"))[..., None], digit_tokens(num_BL, k.operand_width, True), slots
    )
    value = values_of(kind, num_BL, op_BL, k.depth_max)
    ends = lambda ids: np.tile(ids, (count, 1))
    head = [ends([BOS]), slots.reshape(count, -1), ends([IDS[c] for c in k.separator])]
    tokens, used = compress(
        np.concatenate([*head, answer_tokens(value, k, digits), ends([EOS])], 1)
    )
    starts = used[:, sum(part.shape[1] for part in head) - 1]
    return Problems(tokens, used[:, -1], starts, value), hash_of(num, op, n)


def draw_split(
    k: Knobs,
    rng: np.random.Generator,
    count: int,
    split: str,
    most: int,
    digits: int,
    excluded: np.ndarray,
) -> Problems:
    """`count` problems of a split, train, val or test, each in its own buckets; training ones also avoid the sorted
    hashes `excluded`, validation and test ones each other. Raises UserError when the split has too few."""
    found, seen, tries = [], np.empty(0, np.uint64), 0
    while sum(map(len, found)) < count:
        missing, tries = count - sum(map(len, found)), tries + 1
        if tries > 200:
            raise UserError(
                f"only {count - missing} of {count} different {split} expressions were found; widen the ranges"
            )
        wanted = missing * (1.1 if split == "train" else BUCKETS) + 16
        problems, h = draw(k, rng, min(int(wanted), 65536), most, digits)
        bucket = h % np.uint64(BUCKETS)
        if split == "train":
            near = (
                excluded[np.searchsorted(excluded, h).clip(max=len(excluded) - 1)]
                if len(excluded)
                else h + np.uint64(1)
            )
            good = np.flatnonzero((bucket != TEST) & (bucket != VAL) & (near != h))
        else:
            first = np.sort(np.unique(h, return_index=True)[1])
            good = first[
                (bucket[first] == dict(test=TEST, val=VAL)[split]) & ~np.isin(h[first], seen)
            ]
        good = good[:missing]
        seen = np.concatenate([seen, h[good]]) if split != "train" else seen
        found.append(problems.rows(good))
    return joined(found)


def joined(parts: Sequence[Problems]) -> Problems:
    width = max(part.tokens_NT.shape[1] for part in parts)
    pad = lambda x: np.pad(x, ((0, 0), (0, width - x.shape[1])))
    columns = zip(
        *((pad(p.tokens_NT), p.lengths_N, p.starts_N, p.values_N) for p in parts), strict=True
    )
    return Problems(*map(np.concatenate, columns))


# ----------------------------------------------------------------------------
# Model


class Hook:
    """What a hook function gets beside the tensor: the name of the place, and its layer (None outside the blocks)."""

    def __init__(self, name: str):
        self.name = name
        self.layer = int(name.split(".")[1]) if name.startswith("blocks.") else None


class Taps:
    """The hook functions of a model, by place. Without any, a place costs one test of an empty dict."""

    def __init__(self):
        self.fns: dict[str, list[Callable]] = {}

    def __call__(self, prefix: str, leaf: str, x: Tensor) -> Tensor:
        for fn in self.fns.get(prefix + leaf, ()) if self.fns else ():
            x = x.clone()  # a function may write in place: what it was made from, a cache or a view, stays as it was
            out = fn(x, Hook(prefix + leaf))
            x = x if out is None else out
        return x


class Cache(dict):
    """Activations by hook name; cache["z", 2] is short for cache["blocks.2.attn.hook_z"], cache["embed"] likewise."""

    def __missing__(self, key):
        name, layer = key if isinstance(key, tuple) else (key, None)
        prefix = "" if layer is None else f"blocks.{layer}."
        found = [n for n in self if n.startswith(prefix) and n.rsplit(".", 1)[-1] == f"hook_{name}"]
        if len(found) != 1:
            raise KeyError(
                f"{key}: {len(found)} of the cached activations fit; they are {', '.join(self)}"
            )
        return self[found[0]]


def drop(x: Tensor, p: float, part: tuple[int, int]) -> Tensor:
    """Dropout with the mask of the whole batch, of which this rank takes its part (first row, rows in all): the masks
    are the same for every number of ranks."""
    if p == 0.0:
        return x
    first, rows = part
    keep = torch.empty(rows, *x.shape[1:], dtype=x.dtype, device=x.device).bernoulli_(1 - p)
    return x * keep[first : first + len(x)] / (1 - p)


def rotary_tables(T: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, D), the half-split layout's two halves alike."""
    angle = torch.outer(torch.arange(T).float(), 1.0 / 10000 ** (torch.arange(0, D, 2).float() / D))
    angle = torch.cat([angle, angle], 1)[:, None]
    return angle.cos(), angle.sin()


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BTHD.chunk(2, dim=-1)
    return (x_BTHD * cos + torch.cat([-b, a], -1) * sin).type_as(x_BTHD)


class Attention(nn.Module):
    """Causal attention from one fused matrix, q|k|v, each head by head; no biases. Padding stands to the right of all
    that is scored, so the causal mask hides it."""

    def __init__(self, k: Knobs, taps: Taps, prefix: str):
        super().__init__()
        self.k, self.taps, self.prefix = k, taps, prefix
        self.qkv = nn.Linear(k.d_model, 3 * k.d_model, bias=False)
        self.out = nn.Linear(k.d_model, k.d_model, bias=False)

    def forward(
        self, x_BTC: Tensor, tables: tuple, p: float, part: tuple, cache: list | None
    ) -> Tensor:
        tap, B, T = partial(self.taps, self.prefix), *x_BTC.shape[:2]
        q, k, v = (x.view(B, T, self.k.num_heads, -1) for x in self.qkv(x_BTC).chunk(3, dim=-1))
        q, k, v = tap("hook_q", q), tap("hook_k", k), tap("hook_v", v)
        if self.k.use_rope:
            q, k = rotate(q, *tables), rotate(k, *tables)
        if cache is not None:  # generation: keys and values of the tokens before
            k, v = (
                (torch.cat([past, new], 1) for past, new in zip(cache, (k, v), strict=True))
                if cache
                else (k, v)
            )
            cache[:] = k, v
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        inside = p > 0 or bool(self.taps.fns) or self.k.attention == "manual"
        if (inside and self.k.attention != "sdpa") or self.taps.fns:
            scores = (q * q.size(-1) ** -0.5) @ k.mT
            future = torch.ones(T, k.size(2), dtype=torch.bool, device=q.device).triu(
                1 + k.size(2) - T
            )
            scores = tap("hook_attn_scores", scores.masked_fill(future, -torch.inf))
            pattern = tap("hook_pattern", scores.softmax(-1).type_as(v))
            z = drop(pattern, p, part) @ v
        else:
            assert T == 1 or T == k.size(2), "several tokens behind a cache would need a mask"
            z = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=p)
        z = tap("hook_z", z.transpose(1, 2))
        return self.out(z.reshape(B, T, -1))


class MLP(nn.Module):
    """With biases; exact GELU, or an activated projection times a second one (Shazeer, arXiv 2002.05202)."""

    def __init__(self, k: Knobs, taps: Taps, prefix: str):
        super().__init__()
        self.k, self.taps, self.prefix = k, taps, prefix
        self.fc1 = nn.Linear(k.d_model, k.d_ff)
        self.value = nn.Linear(k.d_model, k.d_ff) if k.ffn_type != "gelu" else None
        self.fc2 = nn.Linear(k.d_ff, k.d_model)

    def forward(self, x_BTC: Tensor, p: float, part: tuple) -> Tensor:
        pre = self.taps(self.prefix, "hook_pre", self.fc1(x_BTC))
        post = F.silu(pre) if self.k.ffn_type == "swiglu" else F.gelu(pre)
        if self.value is not None:
            post = post * self.value(x_BTC)
        return self.fc2(drop(self.taps(self.prefix, "hook_post", post), p, part))


class Block(nn.Module):
    def __init__(self, k: Knobs, taps: Taps, layer: int):
        super().__init__()
        self.taps, self.prefix = taps, f"blocks.{layer}."
        self.ln1, self.ln2 = nn.LayerNorm(k.d_model), nn.LayerNorm(k.d_model)
        self.attn = Attention(k, taps, self.prefix + "attn.")
        self.mlp = MLP(k, taps, self.prefix + "mlp.")

    def forward(
        self, x: Tensor, tables: tuple, p: float, part: tuple, cache: list | None
    ) -> Tensor:
        tap = partial(self.taps, self.prefix)
        x = tap("hook_resid_pre", x)
        x = x + drop(tap("hook_attn_out", self.attn(self.ln1(x), tables, p, part, cache)), p, part)
        x = tap("hook_resid_mid", x)
        x = x + drop(tap("hook_mlp_out", self.mlp(self.ln2(x), p, part)), p, part)
        return tap("hook_resid_post", x)


class CompactTransformer(nn.Module):
    """Pre-norm decoder with LayerNorm, rotary attention and a tied embedding. Hooks go by TransformerLens' names:

    logits, cache = model.run_with_cache(ids_BT)          cache["z", 2] is (B, T, H, D), cloned
    with model.hooks([("blocks.2.attn.hook_z", fn)]):     fn(x, hook) returns a replacement, or None
        model(ids_BT)
    """

    def __init__(self, k: Knobs):
        super().__init__()
        self.k, self.taps = k, Taps()
        self.embed = nn.Embedding(len(VOCABULARY), k.d_model)
        self.position = None if k.use_rope else nn.Embedding(k.sequence_length, k.d_model)
        self.blocks = nn.ModuleList(Block(k, self.taps, layer) for layer in range(k.num_layers))
        self.ln_final = nn.LayerNorm(k.d_model)
        self.head = None if k.tie_weights else nn.Linear(k.d_model, len(VOCABULARY), bias=False)
        cos, sin = rotary_tables(max(128, 4 * k.sequence_length), k.d_model // k.num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """N(0, 0.02) for every matrix, biases 0, norms 1 and 0. Each matrix has its own generator, made of seed and
        name: another MLP or depth moves no other tensor."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                p.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator))
            else:
                p.fill_(float(".ln" in f".{name}" and name.endswith("weight")))

    def forward(
        self, ids_BT: Tensor, cache: list[list] | None = None, part: tuple[int, int] | None = None
    ) -> Tensor:
        """Logits (B, T, V). With a cache (one list per block, empty at first), ids continue what it holds. `part` is
        (first row, rows in all) of a batch that several ranks share, for dropout."""
        t0 = cache[0][0].size(1) if cache and cache[0] else 0
        end, p = t0 + ids_BT.size(1), self.k.dropout if self.training else 0.0
        part = part or (0, len(ids_BT))
        x = self.embed(ids_BT)
        if self.position is not None:
            x = x + self.position.weight[t0:end]
        x = drop(self.taps("", "hook_embed", x), p, part)
        for i, block in enumerate(self.blocks):
            x = block(
                x,
                (self.cos[t0:end], self.sin[t0:end]),
                p,
                part,
                None if cache is None else cache[i],
            )
        x = self.taps("ln_final.", "hook_normalized", self.ln_final(x))
        return F.linear(x, self.embed.weight if self.head is None else self.head.weight)

    def hook_names(self) -> list[str]:
        block = [
            f"hook_{leaf}" for leaf in "resid_pre attn_out resid_mid mlp_out resid_post".split()
        ]
        block += [f"attn.hook_{leaf}" for leaf in "q k v attn_scores pattern z".split()] + [
            "mlp.hook_pre",
            "mlp.hook_post",
        ]
        names = [f"blocks.{i}.{leaf}" for i in range(self.k.num_layers) for leaf in block]
        return ["hook_embed", *names, "ln_final.hook_normalized"]

    @contextmanager
    def hooks(
        self, fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Callable]]
    ) -> Iterator["CompactTransformer"]:
        """Within, each fn(x, hook) of (name or predicate over names, fn) runs at its place, in order, after those of an
        outer `with`. All is as before on leaving, whatever happened. Raises ValueError for a name that is no hook."""
        before, names = {name: list(fns) for name, fns in self.taps.fns.items()}, self.hook_names()
        try:
            for wanted, fn in fwd_hooks:
                chosen = [
                    name for name in names if (wanted(name) if callable(wanted) else wanted == name)
                ]
                if not chosen:
                    near = difflib.get_close_matches(str(wanted), names, n=1)
                    raise ValueError(
                        f"{wanted} is not a hook" + (f"; did you mean {near[0]}?" if near else "")
                    )
                for name in chosen:
                    self.taps.fns.setdefault(name, []).append(fn)
            yield self
        finally:
            self.taps.fns.clear()
            self.taps.fns.update(before)

    def run_with_hooks(self, ids_BT: Tensor, fwd_hooks: Sequence[tuple]) -> Tensor:
        with self.hooks(fwd_hooks):
            return self(ids_BT)

    def run_with_cache(
        self, ids_BT: Tensor, names: Callable[[str], bool] = lambda name: True
    ) -> tuple[Tensor, Cache]:
        """Logits, and clones of the activations whose names pass."""
        cache = Cache()
        with self.hooks([(names, lambda x, hook: cache.update({hook.name: x.clone()}))]):
            return self(ids_BT), cache


@torch.no_grad()
def generate(
    model: CompactTransformer, prompts: Sequence[Sequence[int]], new: int, batch: int = 512
) -> list[list[int]]:
    """Greedy continuations of at most `new` tokens, up to and with EOS. Prompts of equal length go together, so that no
    padding comes between a prompt and its answer; keys and values are kept, one token is computed at a time."""
    device, out = next(model.parameters()).device, [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, group in itertools.groupby(order, key=lambda i: len(prompts[i])):
        group = list(group)
        for at in range(0, len(group), batch):
            rows = group[at : at + batch]
            ids, cache = (
                torch.tensor([list(prompts[i]) for i in rows], device=device),
                [[] for _ in model.blocks],
            )
            taken, live = [], torch.ones(len(rows), dtype=torch.bool, device=device)
            for _ in range(new):
                ids = model(ids, cache)[:, -1:].float().argmax(-1)
                taken.append(ids[:, 0])
                live &= ids[:, 0] != EOS
                if not live.any():
                    break
            for i, row in zip(rows, torch.stack(taken, 1).tolist(), strict=True):
                out[i] = row[: row.index(EOS) + 1] if EOS in row else row
    return out


# ----------------------------------------------------------------------------
# Optimizers


def orthogonalize(g_SMN: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, by Jordan's quintic Newton-Schulz iteration."""
    x = g_SMN.to(dtype)
    if tall := x.size(1) > x.size(2):
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, scaled to the size of an AdamW update (0.2 sqrt(max(M, N)), arXiv 2502.16982). Nothing
    moves where the attribute found_inf is 1, as with torch's fused AdamW."""

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        group = self.param_groups[0]
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in group["params"]:
            by_shape.setdefault(p.shape, []).append(p)
        for ps in by_shape.values():
            fine = 1 - getattr(self, "found_inf", torch.zeros((), device=ps[0].device))
            g = torch.stack([p.grad for p in ps])
            g = torch.where(fine.bool(), g, 0.0)
            m = torch.stack([self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in ps])
            m = torch.where(fine.bool(), m.lerp(g, 1 - group["momentum"]), m)
            d = g.lerp(m, group["momentum"])  # Nesterov
            d = orthogonalize(d, torch.bfloat16 if d.is_cuda else torch.float32).float()
            for p, new, u in zip(ps, m, d, strict=True):
                self.state[p]["momentum"].copy_(new)
                p.mul_(1 - fine * group["lr"] * group["weight_decay"])
                p.sub_(u * (fine * group["lr"] * 0.2 * max(p.shape) ** 0.5))


def make_optimizers(model: CompactTransformer, k: Knobs) -> list[torch.optim.Optimizer]:
    """AdamW, with decay on everything as the original has it; with OPTIMIZER=muon only for what is no matrix of a
    block, and Muon for those."""
    named = dict(model.named_parameters())
    matrix = lambda n: k.optimizer == "muon" and n.startswith("blocks.") and named[n].dim() == 2
    betas = tuple(map(float, k.betas.split(",")))
    rest = [p for n, p in named.items() if not matrix(n)]
    found: list = [
        torch.optim.AdamW(rest, lr=k.lr, betas=betas, weight_decay=k.weight_decay, fused=True)
    ]
    if k.optimizer == "muon":
        found.append(Muon([p for n, p in named.items() if matrix(n)], k.muon_lr, k.weight_decay))
    return found


def clip(grads: Sequence[Tensor], limit: float) -> Tensor:
    """Scale the gradients in place to a joint norm of at most `limit` (0: leave them); returns the norms before."""
    norms = torch.stack(torch._foreach_norm(list(grads)))
    if limit:
        torch._foreach_mul_(list(grads), (limit / (norms.norm() + 1e-6)).clamp(max=1.0))
    return norms


def apply_update(
    optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler, ok: Tensor
) -> bool:
    """Step the optimizers where `ok`; with a loss scaler where it found no inf. Returns False when the scaler skipped
    the update: the schedule must then not move on."""
    if not scaler.is_enabled():
        for optimizer in optimizers:
            optimizer.found_inf = (~ok).float()
            optimizer.step()
        return True
    before = scaler.get_scale()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before


# ----------------------------------------------------------------------------
# Schedules


def lr_scale(update: int, k: Knobs, total: int) -> float:
    """Factor of both rates for update number `update`, from 0. Warm-up from 0, so the first update of a warm-up moves
    nothing. linear: then straight to 0 at `total`; trapezoid: 1, and to 0 over the last WARMDOWN_FRAC."""
    if update < k.warmup_steps:
        return update / k.warmup_steps
    span = total - k.warmup_steps if k.schedule == "linear" else k.warmdown_frac * total
    return min(1.0, max(0.0, (total - update) / max(1, span)))


def most_operands(step: int, k: Knobs, total: int, switches: Sequence[int] = ()) -> int:
    """Curriculum: the largest operand count drawn at this step, from the step's place in training or, with
    CURRICULUM_EXACT, from the steps at which one more was earned."""
    lo, hi = k.operands_min, k.operands_max
    if k.curriculum_exact:
        return lo + sum(step >= switch for switch in switches)
    done = step / (k.curriculum * total) if k.curriculum and total else 1.0
    return min(hi, lo + int(done * (hi - lo))) if done < 1 else hi


# ----------------------------------------------------------------------------
# Batches


def read_records(path: str) -> tuple[list[str], list[int]]:
    """Expressions and results of a .jsonl file, looked for here and then in the repository. Raises UserError, with the
    line, for what is no record."""
    found = Path(path) if Path(path).exists() else HERE / path
    exprs, values = [], []
    try:
        lines = found.read_text().splitlines()
    except OSError as error:
        make = "python scripts/generate_pilot_dataset.py and scripts/generate_depth3_dataset.py make the records"
        raise UserError(f"{path}: cannot be read ({error.strerror}); {make}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            exprs.append(record["expr"])
            values.append(int(record["result"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'{path}:{number}: expected {{"expr": "1+2", "result": 3, ...}}, found {line[:60]!r}'
            ) from None
    if not exprs:
        raise UserError(f"{path}: no records; make it again with scripts/generate_pilot_dataset.py")
    return exprs, values


class Data:
    """The training set (None where every batch is fresh), the validation set and the test sets, encoded, and which
    examples each step trains on: a pure function of seed and step, whatever the number of ranks."""

    CHUNK = 65536  # generated examples that share one random generator

    def __init__(self, k: Knobs):
        self.k, files = k, {path: read_records(path) for path in self.paths(k)}
        top = max(
            [abs(v) for _, values in files.values() for v in values]
            + [k.largest * (GENERATE in self.sources(k))]
        )
        least = len(str(2 * top if k.answer_format == "complement_bare" else top))
        self.digits = k.answer_digits or least
        if self.digits < least:
            raise UserError(
                f"ANSWER_DIGITS={self.digits}: answers go up to {top:,}; use {least}, or auto"
            )
        self.sets = {path: problems_of(*records, k, self.digits) for path, records in files.items()}
        self.excluded = np.empty(0, np.uint64)
        if k.train_path == GENERATE:  # no test or validation record can be drawn either
            self.excluded = np.array(
                sorted({hash_expr(e) for exprs, _ in files.values() for e in exprs}), np.uint64
            )
        if k.val_path == GENERATE:  # the same for every seed
            self.sets[k.val_path] = self.split("val", [VAL], k.val_examples)
        self.val, self.tests = (
            self.sets[k.val_path],
            {path: self.sets[path] for path in k.test_path.split()},
        )
        self.train = None if k.train_path == GENERATE else self.sets[k.train_path]
        if k.train_path == GENERATE and k.train_examples:
            spans = (
                (at, min(self.CHUNK, k.train_examples - at))
                for at in range(0, k.train_examples, self.CHUNK)
            )
            self.train = joined(
                [self.split("train", [k.seed, 3, at], count) for at, count in spans]
            )
        self.sample = self.train or self.split("train", [k.seed, 4], 4096)
        for name, problems in (*self.sets.items(), (k.train_path, self.sample)):
            if (longest := int(problems.lengths_N.max())) > k.sequence_length:
                over = int((problems.lengths_N > k.sequence_length).sum())
                raise UserError(
                    f"{name}: {over} of {len(problems)} examples exceed SEQUENCE_LENGTH={k.sequence_length} tokens, "
                    f"up to {longest}; none is cut: raise it"
                )
        self.epoch_steps = -(-len(self.train) // k.batch_size) if self.train and not k.staged else 0
        self.total = (
            k.num_epochs * self.epoch_steps if k.num_iterations is None else k.num_iterations
        )
        self.step_tokens = round(float((self.sample.lengths_N - 1).mean()) * k.batch_size)
        self.order, self.pool = lru_cache(maxsize=2)(self._order), lru_cache(maxsize=2)(self._pool)
        if self.train and k.staged:
            self.pool(k.operands_min)  # raises now rather than in the middle of training
        self.switches: list[int] = []  # steps from which one more operand is drawn, see Run.promote
        # What check_resume compares.
        self.pattern, self.content = (
            k.train_path,
            [[k.train_path, len(self.train or "")], [self.fingerprint(), 0]],
        )

    @staticmethod
    def sources(k: Knobs) -> list[str]:
        return [k.train_path, k.val_path, *k.test_path.split()]

    @classmethod
    def paths(cls, k: Knobs) -> list[str]:
        return [path for path in dict.fromkeys(cls.sources(k)) if path != GENERATE]

    def fingerprint(self) -> str:
        return hashlib.sha256(self.train.tokens_NT.tobytes() if self.train else b"").hexdigest()

    def split(self, name: str, seeds: list[int], count: int, most: int | None = None) -> Problems:
        rng, most = np.random.default_rng(seeds), most or self.k.operands_max
        return draw_split(self.k, rng, count, name, most, self.digits, self.excluded)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.k.seed, 1, epoch]).permutation(len(self.train))

    def _pool(self, most: int) -> np.ndarray:
        """Rows of the finite training set with at most so many operands. Raises UserError when there is none."""
        t = self.train
        written = np.arange(t.tokens_NT.shape[1]) < t.starts_N[:, None]
        operators = (np.isin(t.tokens_NT, [IDS[c] for c in "+-*"]) & written).sum(1)
        rows = np.flatnonzero(operators < most)
        if not len(rows):
            raise UserError(
                f"TRAIN_EXAMPLES={len(t)}: none has {most} operands, where the curriculum is; raise it"
            )
        return rows

    def batch(self, step: int) -> Problems:
        """All examples of the step; the last batch of an epoch may be smaller. Under a curriculum there are no epochs:
        each batch is drawn from the examples that are short enough, with replacement."""
        k, most = self.k, most_operands(step, self.k, self.total, self.switches)
        if self.train is None:
            return self.split("train", [k.seed, 2, step], k.batch_size, most)
        if k.staged:
            return self.train.rows(
                np.random.default_rng([k.seed, 2, step]).choice(self.pool(most), k.batch_size)
            )
        epoch, i = divmod(step, self.epoch_steps)
        return self.train.rows(self.order(epoch)[i * k.batch_size : (i + 1) * k.batch_size])


def inputs_and_labels(
    problems: Problems, answer_only: bool, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, T) ids and labels, T the longest; what is not scored, and rows beyond the problems, has label IGNORE."""
    T = int(problems.lengths_N.max())
    ids = np.zeros((rows, T), np.int64)
    ids[:, 0] = BOS
    ids[: len(problems)] = problems.tokens_NT[:, :T]
    where = np.arange(1, T)
    scored = where < problems.lengths_N[:, None]
    if answer_only:
        scored &= where >= problems.starts_N[:, None]
    labels = np.full((rows, T - 1), IGNORE)
    labels[: len(problems)] = np.where(scored, ids[: len(problems), 1:], IGNORE)
    return ids[:, :-1], labels


def make_batch(step: int, data: Data, k: Knobs, w: World) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's inputs and labels of the step, and the number of labels over all ranks. The whole batch is made on
    every rank and padded to its own longest example, so that all ranks see one shape."""
    problems = data.batch(step)
    local = -(-len(problems) // w.size)
    x, y = inputs_and_labels(problems, k.answer_only_loss, local * w.size)
    mine = slice(w.rank * local, (w.rank + 1) * local)
    x, y, n = (
        torch.from_numpy(x[mine]),
        torch.from_numpy(y[mine]),
        torch.tensor(float((y != IGNORE).sum())),
    )
    return x.contiguous(), y.contiguous(), n


# ----------------------------------------------------------------------------
# Evaluation

SCORES = (
    "loss tokens answer_loss answer_tokens end_loss end_ok first_ok digits_ok exact ended".split()
)


def autocast(k: Knobs, w: World) -> torch.autocast:
    return torch.autocast(
        w.device.type, dtype=k.amp_dtype or torch.bfloat16, enabled=k.amp_dtype is not None
    )


@torch.no_grad()
def teacher_forced(model: CompactTransformer, part: Problems, k: Knobs, w: World) -> np.ndarray:
    """The columns of SCORES up to digits_ok: what the model says of the gold text, one token at a time."""
    x, y = (torch.from_numpy(a).to(w.device) for a in inputs_and_labels(part, False, len(part)))
    with autocast(k, w):
        logits = model(x).float()
    nll = (
        F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction="none")
        .view_as(y)
        .double()
    )
    right = (logits.argmax(-1) == y).double()
    at = torch.arange(1, x.size(1) + 1, device=w.device)  # position of each label in the text
    start, length = (
        torch.from_numpy(a).to(w.device)[:, None] for a in (part.starts_N, part.lengths_N)
    )
    end, real = (at == length - 1).double(), (at < length).double()
    answer = ((at >= start) & (at < length - 1)).double()
    scored = answer + end if k.answer_only_loss else real
    sums = [
        nll * scored,
        scored,
        nll * answer,
        answer,
        nll * end,
        right * end,
        right * (at == start),
        right * answer,
    ]
    return torch.stack([s.sum(1) for s in sums], 1).cpu().numpy()


@torch.no_grad()
def score(
    model: CompactTransformer, problems: Problems, k: Knobs, w: World, batch: int = 512
) -> np.ndarray:
    """(N, columns of SCORES) float64 on every rank: losses in nats, counts, and per example whether the greedy answer
    is the gold one, token by token and with its end. Ranks share the examples; no dropout."""
    training, table = model.training, torch.zeros(len(problems), len(SCORES), dtype=torch.float64)
    model.eval()
    mine = np.arange(w.rank, len(problems), w.size)
    for at in range(0, len(mine), batch):
        rows = mine[at : at + batch]
        table[rows, :8] = torch.from_numpy(teacher_forced(model, problems.rows(rows), k, w))
    texts = [
        row[:n].tolist()
        for row, n in zip(problems.tokens_NT[mine], problems.lengths_N[mine], strict=True)
    ]
    starts = problems.starts_N[mine]
    longest = int((problems.lengths_N - problems.starts_N).max())
    with autocast(k, w):
        out = generate(
            model, [text[:s] for text, s in zip(texts, starts, strict=True)], longest + 2, batch
        )
    for row, answer, text, s in zip(mine, out, texts, starts, strict=True):
        table[row, 8] = answer == text[s:]
        table[row, 9] = answer[-1:] == [EOS]
    model.train(training)
    return w.sum(table.to(w.device)).cpu().numpy()


def summary(table: np.ndarray) -> dict[str, float]:
    """Means over a score table. eos_after_gold is the original's "accuracy": whether the end is predicted after the
    whole gold answer was read. A model that always says "end" has 1."""
    s = dict(zip(SCORES, table.sum(0).tolist(), strict=True))
    n, loss = len(table), s["loss"] / s["tokens"]
    return dict(
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        exact_match=s["exact"] / n,
        eos_after_gold=s["end_ok"] / n,
        ended=s["ended"] / n,
        digit_accuracy=s["digits_ok"] / s["answer_tokens"],
        first_token_accuracy=s["first_ok"] / n,
        answer_loss=s["answer_loss"] / s["answer_tokens"],
        end_loss=s["end_loss"] / n,
    )


def entropy_floor(problems: Problems, k: Knobs) -> float:
    """The lowest mean loss, in nats per scored token, of anything that does not know the strings: the generator's own
    -log probability of the operands and operators, with separator, answer and end free. nan where a string is none of
    GRAMMAR's, or for the answer alone, whose floor is 0."""
    if k.answer_only_loss:
        return 0.0
    t, total = table(k, k.operands_max), 0.0
    shares, spans = dict(zip(t.texts, t.share_S, strict=True)), digit_spans(k)
    chance = dict.fromkeys(range(len(spans)), 0.0) | {
        len(str(high)): 1 / ((high - low + 1) * len(spans)) for low, high in spans
    }
    even = 1 / (k.operand_max - k.operand_min + 1)
    for expr in problems.exprs(k):
        share = shares.get(re.sub(r"[+*-]", "o", re.sub(r"\d+", "N", expr)))
        numbers = re.findall(r"\d+", expr)
        if share is None or any(not k.operand_min <= int(x) <= k.operand_max for x in numbers):
            return math.nan
        total -= math.log(share) - (len(numbers) - 1) * math.log(len(k.operators))
        total -= sum(
            math.log(even if k.operand_sampling == "uniform" else chance[len(x)]) for x in numbers
        )
    return total / float((problems.lengths_N - 1).sum())


def breakdown(problems: Problems, exact_N: np.ndarray, k: Knobs, common: int) -> dict[str, dict]:
    """Exact match by depth, operators, operands and answer digits, [exact, n] each; and the baselines: a calculator
    that reads no brackets, and `common`, the training set's most frequent value, as the answer to everything."""
    exprs, groups = problems.exprs(k), {}
    for expr, value, exact in zip(exprs, problems.values_N.tolist(), exact_N, strict=True):
        keys = dict(
            depth=max(depth_labels(expr)),
            operators="".join(sorted(set(re.sub(r"[\d()]", "", expr)))),
        )
        keys |= dict(
            operands=len(re.findall(r"\d+", expr)),
            answer_digits=len(str(abs(value))),
            chars=len(expr),
        )
        for name, key in keys.items():
            groups.setdefault(name, {}).setdefault(str(key), []).append(float(exact))
    found = {
        name: {key: [round(sum(x) / len(x), 4), len(x)] for key, x in sorted(g.items())}
        for name, g in groups.items()
    }
    blind = [
        evaluate_expr(re.sub(r"[()]", "", expr)) == v
        for expr, v in zip(exprs, problems.values_N, strict=True)
    ]
    found["baselines"] = dict(
        paren_blind=float(np.mean(blind)), most_frequent=float(np.mean(problems.values_N == common))
    )
    return found


# ----------------------------------------------------------------------------
# Build

RESULTS = (
    "run_id date git_commit seed d_model num_layers num_heads d_ff answer_format train_path train_examples grammar "
    "operators operands_max depth_max optimizer learning_rate muon_lr batch_size sequence_length num_iterations "
    "final_val_loss best_val_loss exact_match eos_after_gold entropy_floor train_time_ms ms_per_step gpu_name n_gpus "
    "notes stage status steps_done n_params tokens_seen epochs peak_memory_mib torch world_size code_sha256 dirty"
).split()
IN_COLUMNS = "seed d_model num_layers num_heads d_ff answer_format train_path train_examples grammar operators operands_max "
IN_COLUMNS += "depth_max optimizer lr muon_lr batch_size sequence_length num_iterations"


def count_parameters(k: Knobs) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in CompactTransformer(k).parameters())


def flops_per_token(n_params: int, k: Knobs) -> int:
    """Forward and backward: 6 per weight (the tied matrix once, as the head), and causal attention, 6 * L * T * C."""
    return 6 * n_params + 6 * k.num_layers * k.sequence_length * k.d_model


def memory_mib(n_params: int, sequences: int, k: Knobs) -> int:
    """Rough peak of a rank: weights, gradients and moments, and the activations of its sequences with dropout masks."""
    per_token = k.num_layers * (
        20 * k.d_model + 4 * k.d_ff + 4 * k.num_heads * k.sequence_length
    ) + 4 * len(VOCABULARY)
    return (16 * n_params + 4 * sequences * k.sequence_length * per_token) // 2**20


def show_plan(k: Knobs) -> int:
    """--dry_run: what would be trained, on what."""
    ranks, n_params = int(os.environ.get("WORLD_SIZE", 1)), count_parameters(k)
    print(knobs_json(k))
    print(f"parameters:      {n_params:,}")
    try:
        data, problem = Data(k), None
    except UserError as error:
        data, problem = None, error
    tokens = data.step_tokens if data else k.batch_size * k.sequence_length
    total = data.total if data else k.num_iterations or 0
    print(
        f"tokens per step: {tokens:,} ({ranks} rank(s), {k.batch_size} examples{'' if data else ' of full length'})"
    )
    print(f"training tokens: {tokens * total:,} in {total} steps")
    print(f"compute:         {flops_per_token(n_params, k) * tokens * total:.3g} FLOPs")
    print(
        f"memory:          about {memory_mib(n_params, -(-k.batch_size // ranks), k):,} MiB per rank"
    )
    if data:
        size = f"{len(data.train):,} examples" if data.train else "fresh examples at every step"
        print(
            f"data:            {k.train_path}: {size}; {len(data.val):,} validation, {len(data.tests)} test set(s)"
        )
        print(
            f"entropy floor:   {entropy_floor(data.val, k):.4f} nats per scored token of the validation set"
        )
    else:
        print(f"problem:         {problem}")
    return 0


def load_model(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[CompactTransformer, Knobs, dict]:
    """A checkpoint_*.pt as a model in eval mode, its knobs and the rest of the file (epoch, step, answer_digits, ...).
    Raises UserError when the file is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = {f.name for f in dataclasses.fields(Knobs)}
        k = Knobs(**{name: value for name, value in state["train_config"].items() if name in known})
        model = CompactTransformer(k)
        model.load_state_dict(state.pop("model_state_dict"))
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds more than tensors and plain values; pass a checkpoint_best.pt"
        ) from None
    except (OSError, EOFError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path}: not a model of train_arith.py ({error}); pass a checkpoint_best.pt"
        ) from None
    return model.to(device).eval(), k, state


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """write(part), then one rename: the file is old or new, never torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.replace(part, path)


def write_json(path: Path, content: dict) -> None:
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n") and None)


class Run:
    """One run: everything checked and built, restored from its newest checkpoint if there is one, and its records."""

    def __init__(self, k: Knobs, w: World):
        self.k, self.w = k, w
        plumbing.check_compiler(k.compile, k.device)
        if k.batch_size % w.size:
            raise UserError(
                f"BATCH_SIZE={k.batch_size} does not divide among {w.size} ranks; change one of the two"
            )
        self.data = Data(k)
        self.total, self.epoch_steps = self.data.total, self.data.epoch_steps
        tenth = max(1, self.total // 10)
        every = lambda steps, epochs: (
            (epochs * self.epoch_steps or tenth) if steps is None else steps
        )
        self.val_every, self.save_every = (
            every(k.val_every, k.eval_interval),
            every(k.save_every, k.save_interval),
        )
        plumbing.check_results(Path(k.results_file), RESULTS, w)
        out = Path(k.output_dir)
        place = (
            (out.resolve().parent, out.resolve().name)
            if k.output_dir
            else (Path(k.logs_folder), k.run_id)
        )
        named_by = "OUTPUT_DIR" if k.output_dir else "RUN_ID"
        extra = ("exact_match", "eos_after_gold", "digit_accuracy", "train_exact")
        self.log = RunLog(
            place[0], place[1] or plumbing.new_run_id(w), w, self.total, extra, named_by=named_by
        )

        self.model = CompactTransformer(k)
        self.model.init_weights(k.seed)
        self.model.to(w.device).train()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.n_params = sum(p.numel() for p in self.model.parameters())
        self.grads = torch.zeros(
            self.n_params, device=w.device
        )  # one buffer, so that one all-reduce does
        sizes = [p.numel() for p in self.model.parameters()]
        for p, part in zip(self.model.parameters(), self.grads.split(sizes), strict=True):
            p.grad = part.view_as(p)
        self.forward = torch.compile(self.model, dynamic=True) if k.compile else self.model
        self.optimizers = make_optimizers(self.model, k)
        self.scaler = torch.amp.GradScaler(w.device.type, enabled=k.fp16)

        self.step, self.updates, self.clock, self.rates = 0, 0, Clock(w), []
        self.val_loss = self.best_loss = self.train_loss = self.exact = self.eos = math.nan
        self.epoch_loss, self.epoch_tokens, self.best_at, self.history = 0.0, 0.0, 0, []
        self.validated_at, self.signal, self.accuracy, self.epoch_t0 = (
            -1,
            0,
            0.0,
            time.perf_counter(),
        )
        self.floor = entropy_floor(self.data.val, k)
        self.log.header(k, (__file__, plumbing.__file__), self.facts())
        self.log.rates(self.data.step_tokens, flops_per_token(self.n_params, k))
        self.restore()
        self.log.track(k.track, k.track_project, f"{k.model_name}_seed{k.seed}", k)
        self.saved_at = self.step

    def facts(self) -> dict[str, object]:
        k, d = self.k, self.data
        if k.config:
            self.log.say(
                f"Configuration: {k.config}\n{yaml.safe_dump(read_yaml(k.config), sort_keys=False).rstrip()}"
            )
        if self.w.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.w.device).total_memory / 1e9
            block = [f"GPU Name: {self.w.name()}", f"GPU Memory: {memory:.2f} GB"]
            block += [f"FP16 Mixed Precision: {'ENABLED' if k.fp16 else 'DISABLED'}"]
            self.log.say("\n".join(["=" * 60, "GPU INFORMATION", "=" * 60, *block, "=" * 60]))
        size = len(d.train) if d.train else "fresh at every step"
        kinds = {"train data": k.train_path, "validation data": k.val_path}
        return {
            "run_id": self.log.id,
            "Vocabulary size": len(VOCABULARY),
            "Model parameters": f"{self.n_params / 1e6:.2f}M",
            "parameters": f"{self.n_params:,}",
            "Train dataset size": size,
            "Validation dataset size": len(d.val),
            **kinds,
            "answer": f"{k.answer_format}, up to {d.digits} digits",
            "tokens_per_step": f"{d.step_tokens:,}, mean of {k.batch_size} examples on {self.w.size} rank(s)",
            "entropy_floor": f"{self.floor:.4f} nats per scored token: what no model can beat on the validation set",
        }

    # Restored and saved as they are; with model, optimizers, scaler and clock all that the next step depends on.
    KEPT = "step updates val_loss best_loss train_loss exact eos epoch_loss epoch_tokens best_at history".split()
    KEPT += ["validated_at", "accuracy"]

    def restore(self) -> None:
        state = plumbing.load_checkpoint(self.log.folder, self.w, self.log.say)
        if state is None:
            return
        plumbing.check_resume(state, self.k, FREE.split(), self.data, self.log)
        self.model.load_state_dict(state["model"])
        for optimizer, part in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(part)
        self.scaler.load_state_dict(state["scaler"])
        self.clock = Clock(self.w, *state["clock"])
        self.data.switches[:] = state["switches"]
        for name in self.KEPT:
            setattr(self, name, state[name])

    def save(self) -> None:
        """The checkpoint for a resume, and the model under the original's names."""
        weights = {name: p.detach().cpu().clone() for name, p in self.model.state_dict().items()}
        state = dict(
            model=weights,
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            scaler=self.scaler.state_dict(),
            switches=list(self.data.switches),
            clock=[self.clock.timed_s, self.clock.timed_steps],
            tokens=self.step * self.data.step_tokens,
            **{name: getattr(self, name) for name in self.KEPT},
            **plumbing.resume_facts(self.k, self.data, self.log),
        )
        self.log.sync()  # a row is on disk before the checkpoint that follows it
        plumbing.save_checkpoint(self.log.folder, self.step, state, self.w, self.k.keep)
        epoch, rest = divmod(self.step, self.epoch_steps or self.step or 1)
        if self.epoch_steps and not rest and epoch % self.k.save_interval == 0:
            self.save_model(f"checkpoint_epoch_{epoch}.pt")
        self.save_model("checkpoint_latest.pt")
        self.saved_at = self.step

    def save_model(self, name: str) -> None:
        """A file with the original's keys, for load_model."""
        if not self.w.main:
            return
        config, path = dataclasses.asdict(self.k), self.log.folder / name
        state = dict(epoch=self.step // self.epoch_steps if self.epoch_steps else 0, step=self.step)
        state |= dict(model_state_dict=self.model.state_dict(), answer_digits=self.data.digits)
        state |= dict(
            optimizer_state_dict=[optimizer.state_dict() for optimizer in self.optimizers]
        )
        state |= dict(
            scheduler_state_dict=dict(updates=self.updates, total=self.total), train_config=config
        )
        model_keys = [value for key, value in YAML.items() if key.startswith("model.")]
        state |= dict(
            model_config={key: config[key] for key in model_keys} | dict(vocab_size=len(VOCABULARY))
        )
        state |= dict(
            git_commit=self.log.commit, code_sha256=self.log.code_sha256, val_loss=self.val_loss
        )
        write_whole(path, lambda part: torch.save(state, part))
        self.log.say(f"Saved checkpoint to {path}")

    def hear(self, beat: plumbing.Beat) -> str:
        """Record one finished step; returns the status with which to stop, or ''."""
        if not beat.finite:
            culprit = beat.culprit(["loss", "tokens", "exact", *self.names])
            self.log.say(f"step:{beat.step} not finite: {culprit}; its update was not applied")
            return "nan"
        self.train_loss, tokens = float(beat.values[:, 0].sum()), float(beat.values[0, 1])
        self.signal = beat.signal
        norm = math.sqrt(np.square(beat.values[0, 3:].astype(np.float64)).sum())
        line = None if beat.step % self.k.log_interval == 0 or beat.step == self.total else ""
        own = dict(train_exact=float(beat.values[:, 2].sum())) if self.k.answer_only_loss else {}
        self.log.step(beat.step, self.train_loss, self.rates.pop(0), norm, self.clock, line, **own)
        self.promote(beat.step, own.get("train_exact", 0.0))
        self.epoch_loss += self.train_loss * tokens
        self.epoch_tokens += tokens
        if self.epoch_steps and beat.step % self.epoch_steps == 0:
            loss, now = self.epoch_loss / self.epoch_tokens, time.perf_counter()
            self.log.say(
                f"Epoch {beat.step // self.epoch_steps}/{-(-self.total // self.epoch_steps)}"
            )
            spent, self.epoch_t0 = now - self.epoch_t0, now
            self.log.say(
                f"Train Loss: {loss:.4f} | Train Perplexity: {math.exp(loss):.2f} | Time: {spent:.2f}s"
            )
            self.epoch_loss = self.epoch_tokens = 0.0
        return "preempted" if beat.signal else ""

    AHEAD = 8  # batches that may have been made already when a step is heard of; a switch waits for longer than that

    def promote(self, step: int, exact: float) -> None:
        """With CURRICULUM_EXACT: one more operand, from a step that depends on what was learnt only."""
        k, switches = self.k, self.data.switches
        self.accuracy = 0.9 * self.accuracy + 0.1 * exact
        if (
            k.curriculum_exact
            and self.accuracy > k.curriculum_exact
            and len(switches) < k.operands_max - k.operands_min
        ):
            switches.append(step + self.AHEAD)
            self.accuracy = 0.0
            self.log.say(
                f"step:{step} curriculum: {k.operands_min + len(switches)} operands from step {switches[-1]} on"
            )

    def validate(self) -> None:
        """Score the validation set; save the model where its loss is the best so far."""
        s = summary(score(self.model, self.data.val, self.k, self.w))
        self.val_loss, self.exact, self.eos = s["loss"], s["exact_match"], s["eos_after_gold"]
        self.validated_at = self.step
        own = {name: s[name] for name in ("exact_match", "eos_after_gold", "digit_accuracy")}
        mark = (
            "".join(f" {name}:{value:.4f}" for name, value in own.items())
            + f" entropy_floor:{self.floor:.4f}"
        )
        self.log.validation(self.step, self.val_loss, self.clock, mark, **own)
        self.log.say(f"Val Loss: {s['loss']:.4f} | Val Perplexity: {s['perplexity']:.2f}")
        better = not self.val_loss >= self.best_loss  # also the first, when best is nan
        epoch = self.step // self.epoch_steps if self.epoch_steps else 0
        entry = dict(epoch=epoch, step=self.step, train_loss=self.train_loss, val_loss=s["loss"])
        self.history.append(
            entry | {f"val_{key}": value for key, value in s.items() if key != "loss"}
        )
        if better:
            self.best_loss, self.best_at = self.val_loss, epoch or self.step
            self.log.say("New best model!")
            self.save_model("checkpoint_best.pt")
        self.write_metrics()

    def write_metrics(self) -> None:
        if self.w.main:
            best = dict(best_val_loss=self.best_loss, best_val_epoch=self.best_at)
            best |= dict(
                best_val_perplexity=math.exp(min(self.best_loss, 700)), entropy_floor=self.floor
            )
            best = {key: None if value != value else value for key, value in best.items()}
            content = dict(
                config=dataclasses.asdict(self.k), seed=self.k.seed, metrics=self.history, **best
            )
            write_json(
                self.log.folder / f"metrics/training_metrics_seed{self.k.seed}.json", content
            )

    def finish(self) -> None:
        """The test sets, the breakdown and the original's closing words."""
        k, say, report = self.k, self.log.say, {}
        values, counts = np.unique(self.data.sample.values_N, return_counts=True)
        common = int(values[counts.argmax()])
        for name, problems in {k.val_path: self.data.val, **self.data.tests}.items():
            scores = score(self.model, problems, k, self.w)
            s = summary(scores)
            parts = breakdown(problems, scores[:, SCORES.index("exact")], k, common)
            report[name] = s | dict(n=len(problems), **parts)
            base = parts["baselines"]
            say(
                f"{name}: n:{len(problems)} exact_match:{s['exact_match']:.4f} digits:{s['digit_accuracy']:.4f} "
                f"eos_after_gold(legacy):{s['eos_after_gold']:.4f} | baselines: paren_blind:{base['paren_blind']:.4f} "
                f"most_frequent:{base['most_frequent']:.4f} always_end(legacy):1.0000"
            )
        if self.w.main:
            write_json(
                self.log.folder / "evaluation.json",
                dict(step=self.step, most_frequent=common, sets=report),
            )
        rule, unit = "=" * 50, "epoch" if self.epoch_steps else "step"
        say(f"{rule}\nTRAINING SUMMARY\n{rule}")
        if self.history:
            say(f"{'Best validation loss:':29}{self.best_loss:.4f}")
            say(f"{'Best validation perplexity:':29}{math.exp(min(self.best_loss, 700)):.2f}")
            say(f"{f'Achieved at {unit}:':29}{self.best_at}")
        else:
            say("No validation metrics available")
        if self.w.device.type == "cuda":
            say(f"{'Peak VRAM:':29}{torch.cuda.max_memory_allocated(self.w.device) / 1e9:.2f} GB")
        say("Training complete!")

    def close(self, status: str) -> None:
        """Write the status and the results row, whatever way the run ended."""
        k, w, log, clock = self.k, self.w, self.log, self.clock
        row = {name: getattr(k, name) for name in RESULTS if hasattr(k, name)}
        row |= dict(run_id=log.id, date=log.started, git_commit=log.commit, learning_rate=k.lr)
        row |= dict(
            num_iterations=self.total, final_val_loss=self.val_loss, best_val_loss=self.best_loss
        )
        row |= dict(exact_match=self.exact, eos_after_gold=self.eos, entropy_floor=self.floor)
        row |= dict(
            train_time_ms=1000 * clock.train_s(self.step), ms_per_step=1000 * clock.step_avg_s
        )
        row |= dict(gpu_name=w.name(), n_gpus=w.size * (k.device == "cuda"))
        row |= dict(
            notes=" ".join(plumbing.notes(k, PRESETS, [*FREE.split(), *IN_COLUMNS.split()]))
        )
        row |= dict(stage=k.stage, status=status, steps_done=self.step, n_params=self.n_params)
        row |= dict(
            tokens_seen=self.step * self.data.step_tokens, peak_memory_mib=w.peak_memory_mib()
        )
        row |= dict(epochs=round(self.step / self.epoch_steps, 4) if self.epoch_steps else 0)
        row |= dict(
            torch=torch.__version__,
            world_size=w.size,
            code_sha256=log.code_sha256,
            dirty=int(log.dirty),
        )
        plumbing.append_result(Path(k.results_file), RESULTS, row, w)
        log.close(status, self.step)


# ----------------------------------------------------------------------------
# Training


def learn(run: Run, batch: tuple[Tensor, Tensor, Tensor], pulse: Pulse) -> None:
    """One optimizer step. The gradient is that of the mean over all ranks' labels."""
    k, w, (x, y, n) = run.k, run.w, batch
    if (
        k.dropout
    ):  # masks are a function of seed and step, so that a resume needs no generator's state
        torch.manual_seed(
            int(np.random.SeedSequence([k.seed, run.step]).generate_state(1, np.uint32)[0])
        )
    rate = lr_scale(run.updates, k, run.total)
    run.rates.append(k.lr * rate)
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = rate * (
            k.muon_lr if isinstance(optimizer, Muon) else k.lr
        )
    with autocast(k, w):
        logits = run.forward(x, None, (w.rank * len(x), k.batch_size))
    exact = (
        ((logits.detach().argmax(-1) == y) | (y == IGNORE)).all(1) & (y != IGNORE).any(1)
    ).sum() / k.batch_size
    loss = (
        F.cross_entropy(
            logits.float().flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        / n
    )
    run.scaler.scale(loss).backward()
    w.sum(run.grads)
    for optimizer in run.optimizers:
        if k.fp16:
            run.scaler.unscale_(optimizer)
    norms = clip([p.grad for p in run.model.parameters()], k.grad_clip)
    if k.fp16:  # an overflow is the scaler's to skip and no reason to stop; a bad loss is
        norms = norms.nan_to_num(0.0, 0.0, 0.0)
    ok = pulse.send(
        run.step + 1,
        torch.cat([torch.stack([loss.detach(), n, exact]), norms]),
        run.clock.train_s(run.step),
    )
    run.updates += apply_update(run.optimizers, run.scaler, ok)
    run.grads.zero_()
    run.step += 1


def train(run: Run, k: Knobs, w: World) -> str:
    """The loop. Returns finished, nan or preempted."""
    batches = Prefetch(lambda step: make_batch(step, run.data, k, w), run.step, w.device)
    pulse, status = Pulse(w), ""
    run.clock.start()
    while True:
        # -------- clock stopped: hear of the last step, evaluate, save, leave --------
        status = status or ("finished" if run.step >= run.total else "")
        due = lambda every: run.step > 0 and every > 0 and run.step % every == 0
        validate = (due(run.val_every) or status == "finished") and status in ("", "finished")
        save = due(run.save_every) or due(k.save_interval * run.epoch_steps)
        if validate or save or status:
            run.clock.stop()
            for beat in pulse.read(keep=0):
                status = run.hear(beat) or status
            if validate and status in ("", "finished") and run.validated_at != run.step:
                run.validate()
            if (save or status) and status != "nan" and run.saved_at != run.step:
                run.save()
            if status:
                batches.close()
                return status
            run.clock.start()

        # -------- one optimizer step --------
        learn(run, batches.get(run.step), pulse)
        run.clock.tick()
        for (
            beat
        ) in pulse.read():  # of the step before: the host never waits for the one just queued
            status = run.hear(beat) or status


def main() -> int:
    k = settings(sys.argv[1:])
    if k.dry_run:
        return show_plan(k)
    with plumbing.world(k.device) as w:
        run, status = Run(k, w), "failed"
        try:
            status = train(run, k, w)
            if status == "finished":
                run.finish()
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of GPU memory at BATCH_SIZE={k.batch_size}; nothing is scaled down: lower it"
            ) from None
        finally:
            run.close(status)
    return {"finished": 0, "nan": 1}.get(status, 128 + run.signal if run.signal else 1)


if __name__ == "__main__":
    launch(main)
