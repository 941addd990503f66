"""checkpoints.py -- files that are whole or absent, and checkpoints that can be trusted.

Promises: whatever kills a run, its newest checkpoint is complete, because a checkpoint gets its
name by one rename after all of it is on disk. What is read back is what was written: sizes and
SHA-256 are compared with the manifest, a bad checkpoint is named and skipped, and the one before it
is used. Files are read with `weights_only=True`, so no pickle ever runs. A checkpoint is rank 0's
and complete, so that a run can go on with any number of ranks. A run goes on with the knobs and the
data that it was started with, or not at all.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from plumbing.knobs import UserError, describe
from plumbing.world import World

# ----------------------------------------------------------------------------
# Files


def write_whole(path: Path, *pieces: bytes | np.ndarray) -> None:
    """Write the pieces one behind another as `path`, which appears by a rename when all of it is on
    disk. Raises OSError, and leaves nothing behind, when that fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Force the names in a folder to disk, so that a rename survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _torch_save(content: dict, path: Path) -> None:
    """torch.save, forced to disk. Raises OSError when the disk is full, where torch itself raises a
    RuntimeError that speaks of positions in its file.
    """
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{free:,} bytes are free; torch.save: {error}") from None


# ----------------------------------------------------------------------------
# Checkpoints of a run: FOLDER/step_000500/{state.pt, manifest.json}


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, oldest first. Ordered by number, so that step 1,000,000
    comes behind step 999,000.
    """
    found = []
    for path in folder.glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)", path.name):
            found.append((int(match[1]), path))
    return sorted(found)


def save_checkpoint(folder: Path, step: int, state: dict | None, world: World, keep: int) -> None:
    """Write rank 0's `state` (tensors and plain values) as FOLDER/step_NNNNNN, and remove all but
    the `keep` newest checkpoints.

    Killed at any point, the newest whole checkpoint is still the one that load_checkpoint finds.
    Raises UserError on every rank when it cannot be written.
    """
    problem = None
    if world.is_main:
        target = folder / f"step_{step:06d}"
        try:
            _write_checkpoint(target, step, state)
            for _, old in list_checkpoints(folder)[:-keep]:
                old.rename(old.with_name(f"{old.name}.old.part"))
            remove_parts(folder)
        except OSError as error:
            shutil.rmtree(target.with_name(f"{target.name}.part"), ignore_errors=True)
            problem = (
                f"checkpoint {target} could not be written ({error}); earlier ones are whole; free "
                f"space and start the run again to resume it"
            )
    world.agree(problem)


def _write_checkpoint(target: Path, step: int, state: dict) -> None:
    remove_parts(target.parent)
    part = target.with_name(f"{target.name}.part")
    part.mkdir(parents=True)
    _torch_save(state, part / "state.pt")
    facts = {"bytes": (part / "state.pt").stat().st_size, "sha256": sha256_of(part / "state.pt")}
    manifest = {"step": step, "files": {"state.pt": facts}}
    write_whole(part / "manifest.json", json.dumps(manifest, indent=1).encode())
    if target.exists():  # a damaged one of the same step, or one written again after a resume
        target.rename(target.with_name(f"{target.name}.old.part"))
    part.rename(target)
    fsync_folder(target.parent)


def remove_parts(folder: Path) -> None:
    """Remove what a start that was killed left of checkpoints, old ones included."""
    for stale in folder.glob("step_*.part"):
        shutil.rmtree(stale)


def checkpoint_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. torch.load itself would not notice a flipped
    byte.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        facts = manifest["files"]["state.pt"]
        promised_bytes = int(facts["bytes"])
        promised_sha256 = str(facts["sha256"])
        found_bytes = (path / "state.pt").stat().st_size
        if found_bytes != promised_bytes:
            return f"state.pt has {found_bytes:,} bytes, its manifest says {promised_bytes:,}"
        if sha256_of(path / "state.pt") != promised_sha256:
            return "state.pt does not have the SHA-256 of its manifest"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        return f"its manifest or a file of it cannot be read ({reason})"
    return None


def read_checkpoint(path: Path) -> dict:
    """The state in a checkpoint folder, tensors on the CPU. Raises UserError when its files do not
    verify or are not a checkpoint of ours.
    """
    if problem := checkpoint_problem(path):
        raise UserError(f"checkpoint {path} cannot be used: {problem}")
    return _torch_load(path / "state.pt")


def load_checkpoint(folder: Path, world: World, say: Callable[[str], None] = print) -> dict | None:
    """The state of the newest good checkpoint, on every rank, tensors on the CPU; None where there
    is none. Only rank 0 reads the disk. A bad checkpoint is named and skipped.
    """
    state = None
    if world.is_main:
        for _, path in reversed(list_checkpoints(folder)):
            try:
                state = read_checkpoint(path)
                break
            except UserError as error:
                say(f"{error}; it is skipped")
    return world.broadcast(state)


def _torch_load(path: Path) -> dict:
    """A dictionary that torch.save wrote. Raises UserError for anything else; no pickle runs."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as error:  # torch.load fails in many ways; each means a foreign file
        reason = str(error).split("\n")[0][:120]
        raise UserError(
            f"{path}: not a file of tensors and plain values ({type(error).__name__}: {reason}); "
            f"nothing in it was run"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary")
    return content


# ----------------------------------------------------------------------------
# Objects to plain values and back


def load_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Raises UserError where they are those of another model, such as one of another commit."""
    own = {name: t.shape for name, t in model.state_dict().items()}
    given = {name: t.shape for name, t in saved.items()}
    other = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if other:
        raise UserError(
            f"weights of another model: {len(other)} of its tensors are missing, too many or of "
            f"another shape, such as {other[0]}; use the commit that wrote them (the log of that "
            f"run has it), or start a new run"
        )
    model.load_state_dict(saved)


def load_into(target: object, saved: object) -> None:
    if isinstance(target, nn.Module):
        load_weights(target, saved)
    elif hasattr(target, "load_state_dict"):
        target.load_state_dict(saved)
    elif dataclasses.is_dataclass(target):
        for field in dataclasses.fields(target):
            setattr(target, field.name, saved[field.name])
    elif isinstance(target, list):
        for element, value in zip(target, saved, strict=True):
            load_into(element, value)


def state_of(value: object) -> object:
    """What a checkpoint keeps of an object, tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if hasattr(value, "state_dict"):
        return state_of(value.state_dict())
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: state_of(getattr(value, field.name)) for field in fields}
    if isinstance(value, dict):
        return {key: state_of(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [state_of(element) for element in value]
    return value


# ----------------------------------------------------------------------------
# Resuming


def check_resume(
    saved: dict,
    cfg: object,
    may_differ: Collection[str],
    data: Mapping[str, Sequence],
    run_id: str,
    named_by: str = "RUN_ID",
) -> None:
    """Raise UserError when a run would go on with other knobs than it was started with (those in
    `may_differ` move no loss) or on other data. Contents decide: a file may have moved, and further
    files may have come behind those that were there.
    """
    changes = []
    for field in dataclasses.fields(cfg):
        was = saved["knobs"].get(field.name)
        now = getattr(cfg, field.name)
        if field.name not in may_differ and was != now:
            name = field.name.upper()
            changes.append(f"{name}={describe(field, was)}, not {describe(field, now)}")
    if changes:
        raise UserError(
            f"run {run_id} was started with {', '.join(changes)}; resume it with the same, or "
            f"choose another {named_by}"
        )
    for part, files in data.items():
        was = saved["data"][part]
        now = [list(file) for file in files]
        if now[: len(was)] != was:
            raise UserError(
                f"run {run_id} was started on other {part} data than there is now "
                f"({_difference(was, now)}); put the data back, or choose another {named_by}"
            )


def _difference(was: list[list], now: list[list]) -> str:
    """The first file whose content is not what it was, in words."""
    for before, after in zip(was, now, strict=False):
        if before != after:
            return f"{before[0]} was {_facts(before)}, {after[0]} is {_facts(after)}"
    return f"{len(was)} file(s) then, {len(now)} now"


def _facts(file: list) -> str:
    """A file's length and the beginning of its hash."""
    return " ".join(str(fact)[:12] for fact in file[1:])


# ----------------------------------------------------------------------------
# Weights: one file that other programs read


def save_weights(path: Path, content: dict, world: World, links: Sequence[str] = ()) -> None:
    """Write `content` (tensors and plain values) as `path`, whole or not at all, and give it the
    further names `links` in the same folder. Raises UserError on every rank when that fails.
    """
    problem = None
    if world.is_main:
        part = path.with_name(f".{path.name}.part")
        try:
            _torch_save(content, part)
            os.replace(part, path)
            for link in links:
                _link_or_copy(path, path.with_name(link))
        except OSError as error:
            part.unlink(missing_ok=True)
            problem = f"{path} could not be written ({error}); free space and resume the run"
    world.agree(problem)


def save_json(path: Path, content: dict, world: World) -> None:
    """Write `content` as `path`, whole or not at all. Raises UserError on every rank when that
    fails.
    """
    problem = None
    if world.is_main:
        try:
            write_whole(path, f"{json.dumps(content, indent=1)}\n".encode())
        except OSError as error:
            problem = f"{path} could not be written ({error.strerror}); free space and run it again"
    world.agree(problem)


def _link_or_copy(path: Path, link: Path) -> None:
    part = link.with_name(f".{link.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, part)
    os.replace(part, link)


def read_weights(path: str | Path, keys: Sequence[str], hint: str) -> dict:
    """What save_weights wrote. Raises UserError, which ends with `hint`, when the file is not one,
    or lacks one of the `keys`.
    """
    try:
        content = _torch_load(Path(path))
    except UserError as error:
        raise UserError(f"{error}; {hint}") from None
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; {hint}")
    return content


def check_disk(folder: Path, need_bytes: int, world: World, remedy: str) -> None:
    """Raise UserError on every rank when a run's files will not fit: `need_bytes` at the most, of
    which what lies in `folder` already counts as there.
    """
    problem = None
    if world.is_main:
        free = shutil.disk_usage(folder).free
        present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if free + present < need_bytes:
            problem = (
                f"{folder}: {free / 2**20:,.0f} MiB free, the run's files need "
                f"{need_bytes / 2**20:,.0f} MiB; free space, {remedy}"
            )
    world.agree(problem)
