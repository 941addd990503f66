"""A trainer that only pretends, and what the tests of launchers share.

The pretender is a program without torch that starts in no time and does as its knobs say.
"""

import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import run_study
from lib.program import UserError
from lib.study import read_study
from study_support import ROOT, environment

PRETENDER = """
import json, os, signal, sys, time
from pathlib import Path
from filelock import FileLock

if __name__ != "__main__":
    from dataclasses import dataclass
    from plumbing import knob

    PRESETS = {"usual": {}}
    RESUME_MAY_DIFFER = "preset seconds fault runpod_instance_type run_id stage".split()
    RESUME_MAY_DIFFER += ["logs_folder", "results_file", "fork_from", "stop_after"]

    def plan(cfg, world):
        return {"parameters": "9" if cfg.gate == "more" else "7"}

    class Knobs:
        preset: str = knob("usual", "", choices=tuple(PRESETS))
        gate: str = knob("none", "", choices=("none", "some", "more"))
        lr: float = knob(0.1, "", low=0, alias=("learning_rate",))
        num_iterations: int = knob(10, "", low=1)
        warmup_iters: int = knob(0, "", low=0)
        fast: bool = knob(False, "")
        wobble: float = knob(0.0, "")  # how much a final loss depends on gate and seed
        seed: int = knob(1, "", low=0)
        seconds: float = knob(0.0, "")
        fault: str = knob("none", "")
        runpod_instance_type: str = knob("unknown", "")
        fork_from: str = knob("", "")
        stop_after: int = knob(0, "")
        run_id: str = knob("", "")
        stage: str = knob("", "")
        logs_folder: str = knob("@/logs", "")
        results_file: str = knob("@/results.csv", "")

        def __post_init__(self):
            if self.warmup_iters > self.num_iterations:
                steps = self.num_iterations
                raise ValueError(f"WARMUP_ITERS={self.warmup_iters} does not fit into {steps}")

    Knobs = dataclass(frozen=True)(Knobs)

else:
    e = os.environ
    folder, run, gate = Path(e["LOGS_FOLDER"], e["RUN_ID"]), e["RUN_ID"], e.get("GATE", "none")
    folder.mkdir(parents=True, exist_ok=True)

    def say(name, line):
        with open(folder.parent / name, "a") as f:
            f.write(line + "\\n")

    def status(word, step):
        told = dict(run_id=run, status=word, step=step, num_iterations=10)
        told |= dict(train_loss=2.0, val_loss=2.5)
        (folder / "status.tmp").write_text(json.dumps(told))
        os.replace(folder / "status.tmp", folder / "status.json")

    def hear(number, frame):
        say("heard.txt", f"{run} {number}")
        if e.get("FAULT") != "deaf":
            status("preempted", 5)
            sys.exit(128 + number)

    signal.signal(signal.SIGTERM, hear)
    signal.signal(signal.SIGINT, hear)
    say("started.txt", f"{run} {e.get('LR')} {e.get('RUNPOD_INSTANCE_TYPE')}")
    status("running", 1)
    time.sleep(float(e.get("SECONDS", 0)))
    while e.get("FAULT") == "alone" and (folder.parent / "started.txt").read_text().count("\\n") < 2:
        time.sleep(0.02)
    first = (folder / "second").exists() is False
    (folder / "second").touch()
    if e.get("FAULT") == gate or e.get("FAULT") == "once" and first:
        raise RuntimeError(f"{gate} breaks")
    if e.get("FAULT") == "nan":
        status("nan", 3)
        sys.exit(1)
    if e.get("FAULT") == "refused":
        print("pretender.py: error: LR=1: no such thing", file=sys.stderr)
        sys.exit(2)
    if "FORK_FROM" in e:
        say("forked.txt", f"{run} {Path(e['FORK_FROM']).is_dir()} {e['FORK_FROM']}")
    if "STOP_AFTER" in e:
        (folder / f"step_{int(e['STOP_AFTER']):06d}").mkdir(exist_ok=True)
        status("stopped", int(e["STOP_AFTER"]))
        sys.exit(0)
    path, loss = Path(e["RESULTS_FILE"]), 2.5
    if float(e.get("WOBBLE", 0)):
        seed = int(e["SEED"])
        noise = seed * 7 % 5 - 2 + (seed * 3 % 4) * (gate != "none")
        loss += float(e["WOBBLE"]) * noise - 0.1 * (gate == "some")
    with FileLock(f"{path}.lock"):
        text = "" if path.exists() else "run_id,seed,stage,final_val_loss,status,steps_done\\n"
        with open(path, "a") as f:
            f.write(f"{text}{run},{e['SEED']},{e['STAGE']},{loss},finished,10\\n")
    status("finished", 10)
"""


TWO_BY_TWO = (
    '[stage.a]\nseeds = [1, 2]\nbaseline = { gate = "none" }\ngrid = { gate = ["some", "none"] }\n'
)


def go(path: Path, *options: str) -> int:
    return run_study.main([str(path), *options])


def launcher(path: Path, *options: str) -> forked.Program:
    """run_study.py in a process group of its own."""
    words = [str(ROOT / "scripts/run_study.py"), str(path), *options]
    return forked.Program(words, Path.cwd(), environment())


def end_of(program: forked.Program) -> tuple[int, str]:
    """Its exit code and all that it wrote, once it has ended."""
    return program.wait(), program.stdout + program.stderr


def wait_for(what: Callable[[], object], seconds: float = 200) -> object:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def started(tmp_path: Path) -> list[str]:
    """The runs' labels in the order of their starts: 'a-none-s1'."""
    return [line.split()[0].rsplit("-", 2)[0] for line in lines(tmp_path / "logs/started.txt")]


def problems(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_study(path, {})
    return str(error.value)
