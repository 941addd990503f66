"""Runs as programs read them: find a checkpoint that verifies, build its model, whoever wrote it.

Needs torch.
Raises   UserError: no such run (with those there are), no checkpoint yet, none that verifies,
         another program's
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import plumbing
from lib.program import ROOT
from plumbing import UserError

# By trainer: its model's class, and the knobs that shape the model ('' for all; what generates,
# compares or converts
# needs no others). A trainer is imported when a run of it is read.
MODELS = {
    "train_gpt": (
        "GPT",
        "n_layer n_head n_embd vocab_size attngate gatepos gateact gateopt mlp_match "
        "sequence_length",
    ),
    "train_gpu": ("Model", ""),
    "train_scaled": ("ByteLM", ""),
}


def add_run_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--run", required=True, metavar="ID", help="the run's id")
    p.add_argument(
        "--logs_folder", "--logs-folder", type=Path, default=ROOT / "logs", metavar="DIR"
    )
    p.add_argument("--checkpoint", metavar="step_NNNNNN", help="default: the newest that verifies")


def find_run(logs: Path, run_id: str) -> Path:
    """The run's folder."""
    folder = logs / run_id
    if run_id and folder.is_dir():
        return folder
    there = sorted(
        (p for p in logs.glob("*/") if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True
    )
    names = ", ".join(p.name for p in there[:10]) + ", ..." * (len(there) > 10)
    raise UserError(
        f"no run {run_id!r} in {logs}; it has {names or 'none; --logs_folder names another folder'}"
    )


def find_checkpoint(folder: Path, name: str | None = None) -> Path:
    """The checkpoint `name` of a run, or its newest that verifies; a bad one is named on stderr
    and skipped."""
    paths = sorted(folder.glob("step_??????"), reverse=True)
    if not paths:
        raise UserError(
            f"{folder}: no checkpoint yet; the trainer writes one every SAVE_EVERY steps and at "
            "the end"
        )
    if name is not None:
        if folder / name not in paths:
            raise UserError(
                f"{folder}: no checkpoint {name!r}; it has {', '.join(p.name for p in paths[::-1])}"
            )
        if problem := plumbing.checkpoint_problem(folder / name):
            raise UserError(
                f"checkpoint {folder / name} is bad: {problem}; leave out --checkpoint to use "
                "another"
            )
        return folder / name
    for path in paths:
        problem = plumbing.checkpoint_problem(path)
        if problem is None:
            return path
        print(f"checkpoint {path} is skipped: {problem}", file=sys.stderr, flush=True)
    raise UserError(
        f"{folder}: no good checkpoint, {len(paths)} bad; train again under a new RUN_ID"
    )


def shape_of(trainer: str, knobs: Mapping[str, object]) -> dict[str, object]:
    """Of a run's knobs, those that shape its model. Raises ValueError when they are not this
    trainer's."""
    known = [f.name for f in dataclasses.fields(importlib.import_module(trainer).Knobs)]
    wanted = MODELS[trainer][1].split() or known
    if other := sorted(knobs.keys() - set(known)) or [name for name in wanted if name not in knobs]:
        raise ValueError(f"its knobs differ: {', '.join(other[:5])}")
    return {name: knobs[name] for name in wanted}


def build(trainer: str, shape: Mapping[str, object]) -> nn.Module:
    """A model of this shape, its weights not yet set."""
    module, own = importlib.import_module(trainer), {}
    if trainer == "train_gpt":
        own = dict(val_tokens=shape["sequence_length"])  # must divide by it, and shapes nothing
    return getattr(module, MODELS[trainer][0])(module.Knobs(**(own | dict(shape)))).eval()


def trainer_of(model: nn.Module) -> str:
    return type(model).__module__


def load(path: Path) -> tuple[nn.Module, dict]:
    """The model of a checkpoint that verifies, fp32 on the CPU, and the checkpoint's whole
    state."""
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    trainer = state.get("trainer", "train_gpt")  # the first ones did not say, and were that
    if trainer not in MODELS:
        raise UserError(
            f"checkpoint {path} is one of {trainer}.py; this program reads those of "
            f"{', '.join(MODELS)}"
        )
    try:
        model = build(trainer, shape_of(trainer, state["knobs"]))
        model.load_state_dict(state["model"])
    except (ValueError, TypeError, RuntimeError) as error:
        what = " ".join(str(error).split())[:300]
        raise UserError(
            f"checkpoint {path} was written by another program than this {trainer}.py ({what}); "
            "scripts/replay.py "
            f"takes the one that wrote it out of the run's log"
        ) from None
    return model, state


def vocabulary(model: nn.Module) -> int:
    """Ids that the model scores."""
    k = model.k
    return k.vocabulary if trainer_of(model) == "train_gpu" else getattr(k, "vocab_size", 256)


def fixed_logits(model: nn.Module, num_tokens: int = 64) -> Tensor:
    """Logits of a batch (2, T) that is always the same."""
    T = min(
        num_tokens, getattr(model.k, "sequence_length", num_tokens)
    )  # of other models any T will do
    ids = torch.randint(vocabulary(model), (2, T), generator=torch.Generator().manual_seed(0))
    if trainer_of(model) == "train_scaled":  # bytes in, and the four bytes behind each patch
        return model.logits(ids[:, : T // 4 * 4], ids.roll(-4, 1)[:, : T // 4 * 4])[0]
    return model.logits(ids)


def pick(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token: the likeliest at temperature 0, else drawn from the top_k likeliest (0: all),
    of those from the fewest that hold top_p of the probability."""
    if temperature == 0:
        return int(logits_V.argmax())
    logits_K, ids_K = logits_V.sort(descending=True, stable=True)
    p_K = (logits_K[: top_k or None] / temperature).softmax(-1)
    p_K[p_K.cumsum(-1) - p_K >= top_p] = 0
    return int(ids_K[torch.multinomial(p_K, 1, generator=generator)])


# ----------------------------------------------------------------------------
# Tokenizers


class Bytes:
    """A token is a byte; documents are separated by byte 0."""

    name, size, separator = "bytes", 256, 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def piece(self, token: int) -> bytes:
        return bytes([token])


class GPT2:
    """GPT-2's byte-pair encoding; special tokens in a text are plain text. Raises UserError if
    it is not there."""

    name, size, separator = "gpt2", 50257, 50256

    def __init__(self):
        try:
            import tiktoken

            encoding = tiktoken.get_encoding("gpt2")
        except (
            ImportError,
            OSError,
            ValueError,
        ) as error:  # OSError: no network; ValueError: a broken file
            raise UserError(
                f"the gpt2 tokenizer is not here ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); "
                "tiktoken downloads its two files once: run this where there is a network, copy "
                "the folder that "
                "TIKTOKEN_CACHE_DIR names, and set TIKTOKEN_CACHE_DIR to the copy; or choose "
                "--tokenizer bytes"
            ) from None
        self.encode, self.piece = encoding.encode_ordinary, encoding.decode_single_token_bytes


TOKENIZERS = {"gpt2": GPT2, "bytes": Bytes}


def tokenizer_name(asked: str, vocab_size: int) -> str:
    """`asked`, or for auto the one whose ids a vocabulary of this size is made for."""
    if asked != "auto":
        return asked
    if vocab_size <= Bytes.size + 1:
        return "bytes"
    if vocab_size >= GPT2.size:
        return "gpt2"
    raise UserError(
        f"VOCAB_SIZE={vocab_size} is that of no tokenizer known here; name one with --tokenizer"
    )
