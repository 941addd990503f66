"""exports.py -- the files of a run that other programs read: weights, and metrics as JSON.

Promises: a weights file is whole or absent, carries the knobs that shape its model, and is refused
in one line by a model of another shape. metrics_scaled.json is made from metrics.csv, so it agrees
with it also after a resume or a rollback.
"""

import csv
import dataclasses
import json
import math
from collections.abc import Collection
from pathlib import Path

from torch import nn

from plumbing.checkpoints import read_weights, save_weights, write_whole
from plumbing.knobs import UserError, describe
from plumbing.session import Session
from plumbing.world import World


def export_weights(
    session: Session, model: nn.Module, name: str, *links: str, keep: int | None = None
) -> None:
    """Write weights and knobs as NAME into the run's folder, which gets the names `links` too. Of
    the files that differ from NAME by their number only, the `keep` newest stay. Every rank must
    call it."""
    content = {
        "model": {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()},
        "knobs": dataclasses.asdict(session.cfg),
        "step": session.step_now,
        "val_loss": session.progress.val_loss,
    }
    save_weights(session.folder / name, content, session.world, links)
    if keep is not None and session.world.is_main:
        _remove_old(session.folder, name.rsplit("_", 1)[0], keep)


def _remove_old(folder: Path, prefix: str, keep: int) -> None:
    """Remove all but the `keep` newest of the files PREFIX_NUMBER.pth."""
    by_number = sorted(folder.glob(f"{prefix}_*.pth"), key=lambda p: int(p.stem.split("_")[-1]))
    for path in by_number[:-keep]:
        path.unlink()


def read_model_weights(
    path: str | Path, trainer: str, model_knobs: Collection[str], cfg: object = None
) -> dict:
    """A file of export_weights. Raises UserError where it is none, is older than one of the
    `model_knobs`, or where one of these is not as in `cfg`."""
    found = read_weights(path, ("model", "knobs"), f"expected weights of a run of {trainer}")
    missing = [name.upper() for name in model_knobs if name not in found["knobs"]]
    if missing:
        raise UserError(
            f"{path}: weights of another version of {trainer}, without {', '.join(missing)}; train "
            f"new ones, or use the commit that wrote them (its run's log has it)"
        )
    changes = []
    for field in dataclasses.fields(cfg) if cfg is not None else ():
        was, now = found["knobs"].get(field.name), getattr(cfg, field.name)
        if field.name in model_knobs and was != now:
            name = field.name.upper()
            changes.append(f"{name}={describe(field, was)}, not {name}={describe(field, now)}")
    if changes:
        preset = found["knobs"].get("preset", "")
        raise UserError(
            f"{path}: weights of another model (PRESET={preset}: {', '.join(changes)}); set these "
            f"knobs as they were"
        )
    return found


def write_metrics_json(folder: Path, log_every: int, world: World) -> None:
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
