"""exports.py -- weights of a run in files that other programs read.

Promises: a weights file is whole or absent, carries the knobs that shape its model, and is refused
in one line by a model of another shape.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path

from torch import nn

from plumbing.checkpoints import check_disk, load_weights, read_weights, save_weights
from plumbing.knobs import UserError, describe
from plumbing.row_states import RowStates
from plumbing.session import Session


def run_bytes(model: nn.Module, carried: RowStates, keep: int) -> int:
    """Bytes of a run's files at the most: KEEP weights, the best ones and one file that is being
    written; KEEP checkpoints of weights, two moments and what rows carry, and one being written.
    """
    weights = sum(4 * p.numel() for p in model.parameters())
    checkpoint = 3 * weights + carried.num_bytes
    return weights * (keep + 2) + checkpoint * (keep + 1)


def check_run_fits(session: Session, model: nn.Module, carried: RowStates) -> None:
    """Raise UserError on every rank when the disk has no room for the run's files."""
    needed = run_bytes(model, carried, session.cfg.keep)
    remedy = "lower KEEP, or set LOGS_FOLDER elsewhere"
    check_disk(session.folder, needed, session.world, remedy)


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


def load_model_weights(
    model: nn.Module, path: str | Path, trainer: str, model_knobs: Collection[str]
) -> None:
    """Give the model the weights of a file of export_weights; raises UserError as above."""
    found = read_model_weights(path, trainer, model_knobs, model.cfg)
    load_weights(model, found["model"])
