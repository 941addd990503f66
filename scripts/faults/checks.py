"""checks.py -- what must hold when a run that met a fault has gone on to its end.

Nothing lost: it went on from the newest whole checkpoint, and every step has its row. Nothing
doubled: one results row says finished, and a step that was done again gave the same figures.
Nothing torn: every line has all of its fields. And the last checkpoint, the weights files and the
metrics are bitwise those of an undisturbed run.
"""

import csv
import json
import re
from pathlib import Path

import torch

from faults.small_runs import STEPS
from plumbing import list_checkpoints, read_checkpoint

# What two runs of the same training may differ in: times, where their files lie, and the generator
# of torch's own, which starts anywhere and from which no trainer draws.
OF_THE_START = ("clock", "knobs", "code_sha256", "data", "rng")
OF_THE_CLOCK = ("train_time_s", "tokens_per_s", "mfu", "peak_memory_mib")


def read_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of a CSV file, and the lines that have not the header's number of fields."""
    header, *lines = list(csv.reader(path.read_text().split("\n")[:-1]))
    torn = [",".join(line)[:60] for line in lines if len(line) != len(header)]
    whole = [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]
    return whole, torn


def differences(a: object, b: object, path: str = "") -> list[str]:
    """Where two nested states are not bitwise the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path} has other keys"]
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{path}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    else:
        same = a == b or (a != a and b != b)
    return [] if same else [path]


def state_of(folder: Path) -> dict:
    """The newest checkpoint, without what belongs to a start and not to the training."""
    _, path = list_checkpoints(folder / "logs/run")[-1]
    state = read_checkpoint(path)
    state = {name: value for name, value in state.items() if name not in OF_THE_START}
    state["progress"] = {n: v for n, v in state["progress"].items() if n != "spent_s"}
    return state


def weights_of(folder: Path) -> dict[str, object]:
    """The models in the weights files beside the checkpoints."""
    paths = sorted(p for p in (folder / "logs/run").iterdir() if p.suffix in (".pt", ".pth"))
    found = {}
    for path in paths:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found[path.name] = {n: v for n, v in content.items() if "model" in n}
    return found


def metrics_problems(folder: Path, reference: Path) -> list[str]:
    """What is wrong with metrics.csv: a step without a row, or with figures of its own."""
    rows, torn = read_rows(folder / "logs/run/metrics.csv")
    usual = {row["step"]: row for row in read_rows(reference / "logs/run/metrics.csv")[0]}
    problems = [f"metrics.csv has a torn line: {line}" for line in torn]
    steps = {row["step"] for row in rows}
    if missing := sorted(usual.keys() - steps):
        problems.append(f"metrics.csv lacks steps {', '.join(missing)}")
    for row in rows:
        for name, value in row.items():
            known = usual.get(row["step"], row)[name]
            # A row that a crash came behind may lack the validation that followed it.
            if name not in OF_THE_CLOCK and value != known and value != "":
                problems.append(f"step {row['step']}: {name} is {value}, not {known}")
    return problems


def results_problems(folder: Path, may_be_torn: bool) -> list[str]:
    rows, torn = read_rows(folder / "results.csv")
    own = [row for row in rows if row["run_id"] == "run"]
    finished = [row for row in own if row["status"] == "finished"]
    problems = []
    if len(finished) != 1 or own[-1:] != finished:
        problems.append(f"results rows say {[row['status'] for row in own]}")
    elif finished[0]["steps_done"] != str(STEPS):
        problems.append(f"the results row says {finished[0]['steps_done']} steps")
    if not may_be_torn:
        problems += [f"a torn results row: {line}" for line in torn]
    return problems


def litter(folder: Path) -> list[str]:
    found = sorted(p.name for p in (folder / "logs").rglob("*.part"))
    return [f"{name} was left" for name in found]


def end_problems(folder: Path, reference: Path, may_be_torn: bool = False) -> list[str]:
    """Everything that is wrong with a run that should have ended as the undisturbed one. The fault
    itself may have torn a line, which is closed and never continued.
    """
    problems = []
    status = json.loads((folder / "logs/run/status.json").read_text())["status"]
    if status != "finished":
        problems.append(f"status {status}")
    if not (folder / "logs/run.txt").read_text().endswith("\n") and not may_be_torn:
        problems.append("the log's last line is torn")
    problems += results_problems(folder, may_be_torn)
    problems += metrics_problems(folder, reference) + litter(folder)
    for what, read in (("checkpoint", state_of), ("weights", weights_of)):
        unequal = differences(read(folder), read(reference))
        problems += [f"{what}: {path} is not that of an undisturbed run" for path in unequal[:3]]
    return problems


def first_status(folder: Path) -> str:
    """What status.json says after the first start; `running` where there is none yet."""
    path = folder / "logs/run/status.json"
    return json.loads(path.read_text())["status"] if path.exists() else "running"


def resumed_from(output: str) -> int:
    """The step from which the newest start went on, by its own words; 0 for none."""
    found = re.findall(r"resumed step:(\d+)", output)
    return int(found[-1]) if found else 0
