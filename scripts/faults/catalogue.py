"""catalogue.py -- the faults of the matrix, each with how the run ends then and where it goes on.

A run of 8 steps saves at 2, 4, 6 and 8. `resumes` holds the steps from which a new start may go on:
the newest whole checkpoint, so that nothing is lost; 0 where there is none yet, and nothing where
the run has finished in spite of the fault.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.small_runs import STEPS

LAST_RANK = -1


@dataclass(frozen=True)
class Fault:
    name: str
    what: str  # see inject.py
    step: int
    resumes: tuple[int, ...]
    where: str = "step"
    status: str = "running"  # after the first start; a killed process cannot say more
    rank: int = 0
    damage: Callable[[Path], None] | None = None  # done to the run's files before the second start
    only: tuple[str, ...] = ()  # trainers that it concerns; all of them where it is empty

    def text(self, ranks: int) -> str:
        """The fault as inject.py reads it."""
        rank = ranks - 1 if self.rank == LAST_RANK else self.rank
        return f"{self.what}:{self.step}:{rank}:{self.where}"

    @property
    def tears(self) -> bool:
        """Whether it leaves a torn line that nobody can take back."""
        places = {("kill", "row"), ("full", "log")}
        return (self.what, self.where) in places or self.damage is torn_results

    @property
    def is_kill(self) -> bool:
        return self.what == "kill"


# ----------------------------------------------------------------------------
# Damage to files, done to the folder that holds logs/ and results.csv


def _newest(folder: Path) -> Path:
    return sorted((folder / "logs/run").glob("step_??????"))[-1]


def flip_a_byte(folder: Path) -> None:
    path = _newest(folder) / "state.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_state(folder: Path) -> None:
    path = _newest(folder) / "state.pt"
    path.write_bytes(path.read_bytes()[:-7])


def forged_manifest(folder: Path) -> None:
    (_newest(folder) / "manifest.json").write_text('{"files": {}}')


def torn_status(folder: Path) -> None:
    path = folder / "logs/run/status.json"
    path.write_text(path.read_text()[:20])


def torn_lines(folder: Path) -> None:
    """The last line of the log and of metrics.csv is half there."""
    for path in (folder / "logs/run.txt", folder / "logs/run/metrics.csv"):
        data = path.read_bytes()
        path.write_bytes(data + data.rstrip().rsplit(b"\n", 1)[-1][:9])


def torn_results(folder: Path) -> None:
    """Another run's row was torn by a crash."""
    with open(folder / "results.csv", "a") as file:
        file.write("other,2026-01-01")


def leftovers(folder: Path) -> None:
    """What a crash of an earlier version may have left."""
    run = folder / "logs/run"
    (run / "step_000008.part").mkdir()
    (run / "step_000008.part/state.pt").write_bytes(b"half")
    (run / ".status.json.0123.part").write_text(json.dumps({"status": "finished"})[:9])


def moved(folder: Path) -> None:
    """The run's folder gets another name and comes back as a copy with other times."""
    run, aside = folder / "logs/run", folder / "logs/aside"
    run.rename(aside)
    for path in sorted(aside.rglob("*")):
        copy = run / path.relative_to(aside)
        if path.is_dir():
            copy.mkdir(parents=True)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


# ----------------------------------------------------------------------------
# The faults

WRITES_WEIGHTS = ("train_scaled", "train_arith")
FAULTS = [
    Fault("killed before any checkpoint", "kill", 1, (0,)),
    Fault("killed in a step", "kill", 4, (2,)),
    Fault("last rank killed in a step", "kill", 5, (4,), rank=LAST_RANK),
    Fault("killed in the last step", "kill", STEPS, (6,)),
    Fault("killed within a log line", "kill", 5, (4,), "log"),
    Fault("killed within a row of metrics", "kill", 5, (4,), "metrics"),
    Fault("killed before a validation is recorded", "kill", 4, (2,), "validation"),
    Fault("killed while status.json is written", "kill", 4, (2, 4), "status"),
    Fault("killed within a checkpoint", "kill", 6, (4,), "state"),
    Fault("killed before its manifest", "kill", 6, (4,), "manifest"),
    Fault("killed before it has its name", "kill", 6, (4,), "before_rename"),
    Fault("killed when it has its name", "kill", 6, (6,), "after_rename"),
    Fault("killed while old ones are removed", "kill", 6, (6,), "pruning"),
    Fault("killed while the last old ones are removed", "kill", STEPS, (8,), "pruning"),
    Fault(
        "killed within a weights file", "kill", 0, (0, 2, 4, 6, 8), "weights", only=WRITES_WEIGHTS
    ),
    Fault("killed behind the loop", "kill", STEPS, (8,), "behind_loop"),
    Fault("killed within the results row", "kill", STEPS, (8,), "row"),
    Fault("killed behind the results row", "kill", STEPS, (8,), "after_row"),
    Fault("SIGTERM", "term", 3, (4,), status="preempted"),
    Fault("SIGINT", "int", 3, (4,), status="preempted", rank=LAST_RANK),
    Fault("SIGHUP", "hup", 3, (4,), status="preempted"),
    Fault("SIGUSR1", "usr1", 3, (4,), status="preempted"),
    Fault("an error in a step", "raise", 5, (4,), status="failed"),
    Fault("an error behind the loop", "raise", STEPS, (8,), "behind_loop", status="failed"),
    Fault("a loss that is not finite", "nan", 5, (4,), status="nan", rank=LAST_RANK),
    Fault("disk full within a checkpoint", "full", 6, (4,), "state", status="failed"),
    Fault("disk full while logging", "full", 3, (), "log", status="finished"),
    Fault("disk full within the results row", "full", STEPS, (8,), "row", status="failed"),
    Fault("killed, a byte of the newest state flips", "kill", 7, (4,), damage=flip_a_byte),
    Fault("killed, the newest state is cut", "kill", 7, (4,), damage=cut_state),
    Fault("killed, the newest manifest is forged", "kill", 7, (4,), damage=forged_manifest),
    Fault("killed, status.json is torn", "kill", 7, (6,), damage=torn_status),
    Fault("killed, log and metrics are torn", "kill", 7, (6,), damage=torn_lines),
    Fault(
        "SIGTERM, another run's row is torn",
        "term",
        3,
        (4,),
        status="preempted",
        damage=torn_results,
    ),
    Fault("killed, files of a crash are left", "kill", 7, (6,), damage=leftovers),
    Fault("killed, the folder was copied", "kill", 7, (6,), damage=moved),
]
