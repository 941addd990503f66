"""Runs as programs read them: find a checkpoint that verifies, and build its model, whichever
trainer wrote it.

Needs torch. A trainer is imported when a run of it is read.
Raises   UserError: no such run (with those there are), no checkpoint yet, none that verifies, one
         that another program wrote
Shapes   B rows, T tokens, V vocabulary, K most likely tokens
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.program import add_logs_option
from plumbing.checkpoints import checkpoint_problem, list_checkpoints, read_checkpoint
from plumbing.knobs import UserError
from plumbing.texts import tokenizer

TOKENIZERS = ("gpt2", "bytes")

# The class of a trainer's model, which is built from the trainer's knobs.
MODELS = {"train_gpt": "GPT", "train_gpu": "Model", "train_scaled": "ByteLM"}
# The knobs that shape the model; of a trainer that is not named here, all of them.
SHAPE_KNOBS = {
    "train_gpt": (
        "n_layer n_head n_embd vocab_size attngate gatepos gateact mlp_match sequence_length"
    ).split()
}


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="ID", help="the run's id")
    add_logs_option(parser)
    parser.add_argument(
        "--checkpoint", metavar="step_NNNNNN", help="default: the newest that verifies"
    )


# ----------------------------------------------------------------------------
# Finding a checkpoint


def find_run(logs: Path, run_id: str) -> Path:
    """The run's folder."""
    folder = logs / run_id
    if run_id and folder.is_dir():
        return folder
    folders = [path for path in logs.glob("*/") if path.is_dir()]
    folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    names = ", ".join(path.name for path in folders[:10])
    if len(folders) > 10:
        names += ", ..."
    if not names:
        names = "none; --logs_folder names another folder"
    raise UserError(f"no run {run_id!r} in {logs}; it has {names}")


def find_checkpoint(folder: Path, name: str | None = None) -> Path:
    """The checkpoint `name` of a run, or its newest that verifies. A bad one is named on stderr and
    skipped.
    """
    paths = [path for _, path in list_checkpoints(folder)]
    if not paths:
        raise UserError(
            f"{folder}: no checkpoint yet; the trainer writes one every SAVE_EVERY steps and at "
            f"the end"
        )
    if name is not None:
        return _checkpoint_named(name, folder, paths)
    for path in reversed(paths):
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        print(f"checkpoint {path} is skipped: {problem}", file=sys.stderr, flush=True)
    raise UserError(
        f"{folder}: no good checkpoint, {len(paths)} bad; train again under a new RUN_ID"
    )


def _checkpoint_named(name: str, folder: Path, paths: list[Path]) -> Path:
    path = folder / name
    if path not in paths:
        names = ", ".join(path.name for path in paths)
        raise UserError(f"{folder}: no checkpoint {name!r}; it has {names}")
    if problem := checkpoint_problem(path):
        raise UserError(
            f"checkpoint {path} is bad: {problem}; leave out --checkpoint to use another"
        )
    return path


# ----------------------------------------------------------------------------
# Models


def shape_of(trainer: str, knobs: Mapping[str, object]) -> dict[str, object]:
    """Of a run's knobs, those that shape its model. Raises ValueError when they are not this
    trainer's.
    """
    fields = dataclasses.fields(importlib.import_module(trainer).Knobs)
    known = [field.name for field in fields]
    wanted = SHAPE_KNOBS.get(trainer, known)
    foreign = sorted(set(knobs) - set(known))
    missing = [name for name in wanted if name not in knobs]
    if foreign or missing:
        raise ValueError(f"its knobs differ: {', '.join((foreign or missing)[:5])}")
    return {name: knobs[name] for name in wanted}


def build(trainer: str, shape: Mapping[str, object]) -> nn.Module:
    """A model of this shape, in evaluation mode, its weights not yet set."""
    module = importlib.import_module(trainer)
    model_class = getattr(module, MODELS[trainer])
    if trainer == "train_gpt":
        # A multiple of the sequence is asked for, and shapes nothing.
        cfg = module.Knobs(**{"val_tokens": shape["sequence_length"], **shape})
        return model_class(cfg, torch.float32).eval()
    return model_class(module.Knobs(**shape)).eval()


def trainer_of(model: nn.Module) -> str:
    return type(model).__module__


def load(path: Path) -> tuple[nn.Module, dict]:
    """The model of a checkpoint that verifies, fp32 on the CPU, and the checkpoint's state."""
    state = read_checkpoint(path)
    trainer = state.get("trainer", "an unknown program")
    if trainer not in MODELS:
        raise UserError(
            f"checkpoint {path} was written by {trainer}; this program reads those of "
            f"{', '.join(MODELS)}"
        )
    try:
        model = build(trainer, shape_of(trainer, state["knobs"]))
        model.load_state_dict(state["model"])
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        what = " ".join(str(error).split())[:300]
        raise UserError(
            f"checkpoint {path} was written by another program than this {trainer}.py ({what}); "
            f"scripts/replay.py takes the one that wrote it out of the run's log"
        ) from None
    return model, state


def vocabulary(model: nn.Module) -> int:
    """Number of token ids that the model scores."""
    trainer = trainer_of(model)
    if trainer == "train_scaled":
        return 256
    return model.cfg.vocabulary if trainer == "train_gpu" else model.cfg.vocab_size


@torch.no_grad()
def fixed_logits(model: nn.Module, num_tokens: int = 64, inner: nn.Module | None = None) -> Tensor:
    """Logits of a batch (2, T) that is always the same; of `inner` instead, which is the same model
    made of a copy of its code.
    """
    asked = model if inner is None else inner
    T = num_tokens
    if trainer_of(model) == "train_gpt":  # the others take any length
        T = min(T, model.cfg.sequence_length)
    generator = torch.Generator().manual_seed(0)
    x_BT = torch.randint(vocabulary(model), (2, T), generator=generator)
    if trainer_of(model) == "train_scaled":  # its targets are the bytes four further on
        return asked.logits(x_BT, x_BT.roll(-4, dims=1))[0]
    return asked.logits(x_BT)


# ----------------------------------------------------------------------------
# Tokens


def pick(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token: the likeliest at temperature 0, else drawn from the top_k likeliest (0: all), of
    those from the fewest that hold top_p of the probability.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    logits_K, ids_K = logits_V.double().sort(descending=True, stable=True)
    if top_k > 0:
        logits_K = logits_K[:top_k]
    # Relative to the likeliest and in fp64, so that no temperature is too small to divide by.
    probs_K = ((logits_K - logits_K[0]) / temperature).softmax(dim=-1)
    probs_K[probs_K.cumsum(dim=-1) - probs_K >= top_p] = 0
    return int(ids_K[torch.multinomial(probs_K, 1, generator=generator)])


def tokenizer_name(wanted: str, vocab_size: int) -> str:
    """`wanted`, or for auto the one whose ids a vocabulary of this size is made for."""
    if wanted != "auto":
        return wanted
    if vocab_size <= tokenizer("bytes").size + 1:
        return "bytes"
    if vocab_size >= 50257:  # GPT-2's; its own files are not needed to know that
        return "gpt2"
    raise UserError(
        f"VOCAB_SIZE={vocab_size} is that of no tokenizer known here; name one with --tokenizer"
    )
