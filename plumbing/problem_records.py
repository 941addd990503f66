"""problem_records.py -- what a run on problems records beside the session: scores and models.

Promises: model files have the keys of github.com/Nishal14/Step-free-arithmetic-transformers, for
programs that read a model, and evaluation.json has every set that was scored at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Protocol

import numpy as np
import torch
from torch import nn

from plumbing.checkpoints import save_json, save_weights
from plumbing.epochs import epoch_of
from plumbing.family import KNOB_OF
from plumbing.problem_batches import ProblemBatches
from plumbing.problem_scores import summary
from plumbing.session import Session
from plumbing.world import World

# Columns of metrics.csv. The first three are of a validation, the others of a training step.
PROBLEM_METRICS = "exact_match eos_after_gold digit_accuracy train_exact scored_tokens".split()
MODEL_KEYS = "d_model num_layers num_heads d_ff max_seq_len dropout use_rope tie_weights ffn_type"


class State(Protocol):
    """What of a trainer's state goes into a model's file."""

    step: int
    skipped: int  # updates that were left out


def record_validation(session: Session, figures: Mapping[str, float]) -> None:
    """A validation: "loss" in nats per scored token, and the shares that are right."""
    own = {name: figures[name] for name in PROBLEM_METRICS[:3]}
    note = "".join(f" {name}:{value:.4f}" for name, value in own.items())
    session.log_validation(session.step_now, figures["loss"], note, **own)
    session.row |= {name: figures[name] for name in PROBLEM_METRICS[:2]}


def save_models(
    names: Sequence[str],
    model: nn.Module,
    optimizers: Sequence,
    session: Session,
    state: State,
    data: ProblemBatches,
) -> None:
    """Model files, all with the same content."""
    config = asdict(session.cfg)
    model_config = {key: config[KNOB_OF.get(key, key)] for key in MODEL_KEYS.split()}
    updates = state.step - state.skipped
    content = {
        "epoch": epoch_of(state.step, session),
        "step": state.step,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": [optimizer.state_dict() for optimizer in optimizers],
        "scheduler_state_dict": {"updates": updates, "total": session.total_steps},
        "model_config": model_config | {"vocab_size": model.embed.num_embeddings},
        "train_config": config,
        "answer_digits": data.sets.language.digits,
        "val_loss": session.progress.val_loss,
        "git_commit": session.log.git_commit,
        "code_sha256": session.log.code_sha256,
    }
    for name in names:
        save_weights(session.folder / name, content, session.world)
        session.say(f"Saved checkpoint to {session.folder / name}")


def record_evaluation(session: Session, tables: Mapping[str, np.ndarray]) -> None:
    """Write evaluation.json: what the score table of each set, by its name, comes to, and the
    number "n" of its problems."""
    figures = {name: {**summary(table), "n": len(table)} for name, table in tables.items()}
    for name, found in figures.items():
        session.say(
            f"{name}: n:{found['n']} exact_match:{found['exact_match']:.4f} "
            f"digits:{found['digit_accuracy']:.4f} "
            f"eos_after_gold(legacy):{found['eos_after_gold']:.4f}"
        )
    content = {"step": session.step_now, "sets": figures}
    save_json(session.folder / "evaluation.json", content, session.world)


def gpu_facts(world: World, fp16: bool) -> dict[str, object]:
    """What the head of the log says of a GPU, in the original's words; nothing on a CPU."""
    if world.device.type != "cuda":
        return {}
    memory = torch.cuda.get_device_properties(world.device).total_memory
    return {
        "GPU INFORMATION": "=" * 40,
        "GPU Name": world.device_name(),
        "GPU Memory": f"{memory / 1e9:.2f} GB",
        "FP16 Mixed Precision": "ENABLED" if fp16 else "DISABLED",
    }
