"""byte_records.py -- what a byte model records beside the session: bits, half-lives, weights.

Promises: the weights files of a checkpoint and of the best validation are there when the session's
own record says so, and metrics_scaled.json is made from metrics.csv, so it agrees with it also
after a resume or a rollback.
"""

import csv
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from plumbing.byte_batches import ScoredBytes
from plumbing.checkpoints import write_whole
from plumbing.exports import export_weights
from plumbing.session import Session
from plumbing.world import World

# Columns of metrics.csv; half-lives are those of the blocks' memory, in patches.
BYTE_METRICS = "val_bpc val_bits_per_char half_life_min half_life_median half_life_max".split()


def half_lives(model: nn.Module) -> Tensor | None:
    """Of the blocks' memory, (L, H), in patches and fp64, for inputs that do not move them; None
    where there is no memory."""
    if model.cfg.memory == "off":
        return None
    logits_LH = torch.stack([block.memory.retention.detach() for block in model.blocks]).double()
    low = model.cfg.mem_range
    kept_LH = model.plasticity * (low + (1 - low) * torch.sigmoid(logits_LH))
    return math.log(0.5) / kept_LH.log()


def record_validation(session: Session, model: nn.Module, loss: float, val: ScoredBytes) -> None:
    """A validation: `loss` in nats per byte of `val`."""
    bits = loss / math.log(2)
    characters = val.characters_per_byte
    bits_per_char = bits / characters if characters else math.nan
    metrics = {"val_bpc": bits, "val_bits_per_char": bits_per_char}
    note = f" val_bpc:{bits:.4f} val_bits_per_char:{bits_per_char:.4f}"
    line = ""
    found_LH = half_lives(model)
    if found_LH is not None:
        low, high = found_LH.min().item(), found_LH.max().item()
        middle = found_LH.median().item()
        metrics |= {"half_life_min": low, "half_life_median": middle, "half_life_max": high}
        line = f"half_life_patches: min:{low:.4g} median:{middle:.4g} max:{high:.4g}"
    session.log_validation(session.step_now, loss, note, **metrics)
    if line:
        session.say(line)
    session.row |= {"final_val_bpc": bits, "val_bits_per_char": bits_per_char}
    if session.progress.best_loss == loss:
        export_weights(session, model, "best_model_scaled.pth")
    _write_metrics_json(session.folder, session.cfg.log_every, session.world)


def export_saved(session: Session, model: nn.Module) -> None:
    """The weights of a checkpoint by themselves, of which KEEP stay, and the newest."""
    name = f"checkpoint_step_{session.step_now:04d}.pth"
    export_weights(session, model, name, "last_model_scaled.pth", keep=session.cfg.keep)


def _write_metrics_json(folder: Path, log_every: int, world: World) -> None:
    """metrics_scaled.json as the original has it: bits per byte and rate every `log_every` steps,
    each a mean since the one before, and the validations."""
    if not world.is_main:
        return
    with open(folder / "metrics.csv") as file:
        by_step = {int(row["step"]): row for row in csv.DictReader(file)}  # a later row counts
    found = {name: [] for name in ("train_bpc", "val_bpc", "steps", "lr", "val_steps")}
    interval = []
    for step, row in sorted(by_step.items()):
        if row["train_loss"]:
            interval.append(float(row["train_loss"]) / math.log(2))
        if interval and (step % log_every == 0 or step == max(by_step)):
            found["train_bpc"].append(sum(interval) / len(interval))
            found["steps"].append(step)
            found["lr"].append(float(row["lr"]))
            interval = []
        if row["val_loss"]:
            found["val_bpc"].append(float(row["val_loss"]) / math.log(2))
            found["val_steps"].append(step)
    write_whole(folder / "metrics_scaled.json", (json.dumps(found, indent=2) + "\n").encode())
