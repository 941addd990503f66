"""forks.py -- a run that starts from a checkpoint of another run and goes on with other knobs.

    STOP_AFTER=200 RUN_ID=trunk python train_gpt.py             stops there, with a checkpoint
    FORK_FROM=logs/trunk/step_000200 LR=0.02 python train_gpt.py

Promises: a fork has the parameters, the step, the random numbers and, where they fit, the states of
the optimizers that the checkpoint has; rates and all other knobs are its own. What does not fit
starts anew, and the log says so. Knobs that change the parameters are refused. The results row
names the checkpoint. Times and tokens go on from those of the checkpoint.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from plumbing.checkpoints import load_into, read_checkpoint, state_of
from plumbing.knobs import UserError

if TYPE_CHECKING:
    from plumbing.session import Session


def fork_name(path: str) -> str:
    """RUN_ID/step_000200 of a checkpoint's path: the same wherever the folder of logs lies."""
    return "/".join(Path(path).parts[-2:])


def start_fork(session: "Session", objects: Mapping[str, object]) -> None:
    """Load the checkpoint FORK_FROM into `objects`, as far as it fits. Raises UserError, on every
    rank, where the run cannot start from it.
    """
    cfg = session.cfg
    saved = _read(session)
    problem = _mismatch(objects["model"], saved)
    if saved["trainer"] != Path(session.sources[0]).stem:
        problem = f"it is a checkpoint of {saved['trainer']}.py"
    elif saved["step"] >= session.total_steps:
        problem = f"the run would have only {session.total_steps} steps"
    if problem:
        raise UserError(f"FORK_FROM={cfg.fork_from}: cannot start from it: {problem}")
    anew = []
    for name, target in objects.items():
        anew += _load_what_fits(name, target, saved[name])
    torch.set_rng_state(saved["rng"])
    session.clock.load_state_dict(saved["clock"])
    session.clock.start_over(saved["step"])
    session.progress.spent_s = saved["progress"]["spent_s"]
    session.step_now = saved["step"]
    session.saved_at = saved["step"]
    session.fork = {"from": fork_name(cfg.fork_from), "key": _key(session, saved), "anew": anew}
    note_fork(session, saved)
    session.say(f"forked step:{saved['step']} from {session.fork['from']}")
    if anew:
        session.say(f"start anew, as the checkpoint has none that fit: {', '.join(anew)}")


def note_fork(session: "Session", saved: Mapping[str, object]) -> None:
    """Count the tokens of the checkpoint, and let the row and status.json say where the run was
    forked. In the notes FORK is part of the configuration, and fork_run tells the pairs apart.
    """
    session.log.tokens_before = saved["tokens"] - saved["step"] * session.tokens_per_step
    wanted = fork_name(session.cfg.fork_from) if session.cfg.fork_from else ""
    was = session.fork.get("from", "")
    if wanted != was:
        raise UserError(
            f"run {session.run_id} was started with FORK_FROM={was or 'nothing'}, not "
            f"{wanted or 'nothing'}; resume it with the same, or choose another {session.named_by}"
        )
    if was:
        session.log.known["forked_from"] = was
        session.notes += [f"FORK={session.fork['key']}", f"fork_run={was}"]


def _read(session: "Session") -> dict:
    """The checkpoint, read by rank 0, on every rank."""
    saved, problem = None, None
    if session.world.is_main:
        try:
            saved = read_checkpoint(Path(session.cfg.fork_from))
        except UserError as error:
            problem = f"FORK_FROM: {error}"
    session.world.agree(problem)
    return session.world.broadcast(saved)


def _shapes(state: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(v.shape) for name, v in state.items() if isinstance(v, Tensor)}


def _mismatch(model: nn.Module, saved: Mapping[str, object]) -> str:
    """Why the parameters of the checkpoint are not those of the model; '' where they are."""
    ours, theirs = _shapes(state_of(model)), _shapes(saved["model"])
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            was = theirs.get(name, "nothing")
            return (
                f"parameter {name} is {ours.get(name, 'nothing')} here and {was} there; a fork may "
                f"have other knobs, but not other parameters"
            )
    return ""


def _load_what_fits(name: str, target: object, saved: object) -> list[str]:
    """Load one object; the names of what starts anew, because the saved state does not fit it."""
    if isinstance(target, list):
        anew = []
        for i, (element, value) in enumerate(zip(target, saved, strict=False)):
            anew += _load_what_fits(f"{name}[{i}]", element, value)
        return anew
    if dataclasses.is_dataclass(target) or name == "model":
        load_into(target, saved)
        return []
    fresh = copy.deepcopy(state_of(target))
    try:
        _load_state(target, saved)
    except (IndexError, KeyError, RuntimeError, ValueError):
        _load_state(target, fresh)
        return [name]
    return []


def _load_state(target: object, saved: object) -> None:
    """load_state_dict, but for an optimizer's hyperparameters: those of the knobs stay."""
    groups = getattr(target, "param_groups", [])
    own = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    target.load_state_dict(saved)
    for group, hyperparameters in zip(getattr(target, "param_groups", []), own, strict=True):
        group.update(hyperparameters)


def _key(session: "Session", saved: Mapping[str, object]) -> str:
    """The same for forks of one configuration at one step, whatever the seed: step200-3f2a91."""
    ignored = {*session.resume_may_differ, "seed"}
    moving = {name: value for name, value in saved["knobs"].items() if name not in ignored}
    text = json.dumps(moving, sort_keys=True, default=str)
    return f"step{saved['step']}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
