"""run_ids.py -- the name of a run, and whether it may be used.

Promises: a name that cannot name files, that of a complete run, and that of a run which another
process trains are refused before training, in one line.
"""

import hashlib
import json
import os
import re
import socket
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from plumbing.knobs import UserError
from plumbing.world import World

COMPLETE = ("finished", "early_stop")  # a run in one of these states has nothing left to do


def new_run_id(world: World) -> str:
    """UTC start time and six hexadecimal digits, one for all ranks.

    Under torchrun it is derived from the launching agent, which outlives its workers, so that
    workers that are started again find their run.
    """
    stamp = time.time()
    seed = uuid.uuid4().hex
    if "TORCHELASTIC_RUN_ID" in os.environ:
        agent = os.getppid()
        started = ""
        try:
            started = Path(f"/proc/{agent}/stat").read_text().rsplit(")", 1)[1].split()[19]
            stamp = Path(f"/proc/{agent}").stat().st_ctime
        except OSError:  # no /proc: the agent's process number alone has to do
            stamp = 0.0
        seed = f"{socket.gethostname()} {agent} {started} {os.environ['TORCHELASTIC_RUN_ID']}"
    when = datetime.fromtimestamp(stamp, timezone.utc).strftime("%Y%m%d-%H%M%S")
    return world.gather(f"{when}-{hashlib.sha256(seed.encode()).hexdigest()[:6]}")[0]


def read_status(path: Path) -> dict:
    """The content of a status.json; {} where there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_run_id(folder: Path, run_id: str, named_by: str) -> None:
    """Raise UserError where `run_id` is no name, or that of a complete run in `folder`, its own."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,120}", run_id, re.ASCII):
        raise UserError(f"{named_by}={run_id!r}: use letters, digits, '.', '_', '+' and '-' only")
    status = read_status(folder / "status.json").get("status")
    if status in COMPLETE:
        log = folder.parent / f"{run_id}.txt"
        raise UserError(f"run {run_id} is complete ({status}, {log}); choose another {named_by}")


def lock_run(folder: Path, run_id: str, named_by: str) -> FileLock:
    """The lock of a run's folder, taken. Raises UserError where another process holds it."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"run {run_id} is being trained by another process; choose another {named_by}"
        ) from None
    return lock
