"""How far the runs of a study are, from the results file, status files and checkpoints."""

import dataclasses
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lib.cells import key_value, keys_of
from lib.fork_stage import checkpoint_path
from lib.program import UserError, write_whole
from lib.results import Row, read_results
from lib.sequential import Rule
from lib.study import Study
from lib.study_stage import Run
from plumbing.checkpoints import list_checkpoints
from plumbing.run_ids import COMPLETE, read_status


def status_number(status: Mapping[str, object], name: str) -> float:
    """A number of a status; nan where it is not known, or is none."""
    value = status.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else math.nan


@dataclass
class Progress:
    """How far a run is. States: waiting, half-done, running, elsewhere, done, failed."""

    run: Run
    run_id: str
    state: str = "waiting"
    step: int = 0
    loss: float = math.nan  # nats; validation when done, else the last known
    tokens_per_s: float = math.nan
    note: str = ""
    began: float = math.nan  # monotonic, first seen running here, and at which step
    began_step: int = 0
    wall_s: float = 0.0  # spent here
    log: Path | None = None
    trunk: "Progress | None" = None  # the run whose checkpoint it starts from

    @property
    def eta_s(self) -> float:
        done = self.step - self.began_step
        return (
            (self.run.steps - self.step) * (time.monotonic() - self.began) / done
            if done > 0
            else math.nan
        )


class Records:
    """What the results file and the status files say of runs, read again when the file has
    changed."""

    def __init__(self, logs: Path, results: Path):
        self.logs, self.results, self.stamp = logs, results, None
        self.rows: dict[str, Row] = {}  # of finished runs, by id; of several, the last

    def refresh(self) -> None:
        try:
            info = self.results.stat()
        except OSError:
            self.rows, self.stamp = {}, None
            return
        if self.stamp != (info.st_mtime_ns, info.st_size):
            try:
                rows, _ = read_results(self.results)
            except UserError as error:
                raise UserError(error) from None
            self.rows = {row["run_id"]: row for row in rows if row.status in COMPLETE}
            self.stamp = (info.st_mtime_ns, info.st_size)

    def status(self, run_id: str) -> dict:
        return read_status(self.logs / run_id / "status.json")

    def ids(self, content: str, code: str = "*") -> list[str]:
        """Runs of this content, with a row or a folder, newest row last."""
        pattern = re.compile(f"-{content}-{'[0-9a-f]{6}' if code == '*' else code}$")
        folders = (p.name for p in self.logs.glob(f"*-{content}-{code}") if p.is_dir())
        return list(dict.fromkeys([*folders, *(i for i in self.rows if pattern.search(i))]))

    def look(self, p: Progress, ignore_code: bool) -> bool:
        """Bring `p` up to date; whether it is done."""
        self.refresh()
        own = self.ids(p.run.content, p.run.code)
        p.run_id = next(iter(own), p.run_id)  # a run keeps the id under which it was started
        others = [i for i in self.ids(p.run.content) if i not in own] if ignore_code else []
        if p.run.stop_after:
            return self._look_at_trunk(p, [*own, *others])
        for run_id in [*own, *others[::-1]]:
            row, status = self.rows.get(run_id), self.status(run_id)
            if row is None and status.get("status") not in COMPLETE:
                continue
            p.state, p.run_id, p.note = "done", run_id, ""
            if row is None:
                p.loss = status_number(status, "val_loss")
                steps = status_number(status, "step")
            else:
                p.loss = row.number("final_val_loss")
                steps = row.number("steps_done")
            p.step = int(steps) if math.isfinite(steps) else p.run.steps
            if run_id in others:
                p.note = f"code {run_id[-6:]}"
            elif row is None:
                p.note = "no row"
            return True
        self._look_at_checkpoints(p)
        return False

    def _look_at_trunk(self, p: Progress, ids: Sequence[str]) -> bool:
        """A trunk is done when its checkpoint is there, whatever a row says of it."""
        for run_id in ids:
            if checkpoint_path(self.logs, run_id, p.run.stop_after).is_dir():
                p.state, p.run_id, p.step = "done", run_id, p.run.stop_after
                return True
        self._look_at_checkpoints(p)
        return False

    def _look_at_checkpoints(self, p: Progress) -> None:
        """How far a run is that is not done."""
        saved = list_checkpoints(self.logs / p.run_id)
        p.step = saved[-1][0] if saved else 0  # it would go on from its newest checkpoint
        if p.state in ("waiting", "half-done"):
            p.state = "half-done" if saved else "waiting"

    def follow(self, p: Progress, since: float = 0.0) -> None:
        """Take over what status.json says of a run that goes on, if it was written after `since`
        (unix time)."""
        status = self.status(p.run_id)
        if status and status.get("updated", since) >= since:
            p.step = int(status.get("step", 0))
            loss = status.get("train_loss", status.get("val_loss"))
            p.loss = float(loss) if loss is not None else math.nan
            p.tokens_per_s = float(status.get("tokens_per_s") or "nan")

    def is_trained_elsewhere(self, run_id: str) -> bool:
        """Whether a trainer holds the run's own lock: one that its launcher left behind, or one
        started by hand."""
        path = self.logs / run_id / ".lock"
        if not path.exists():
            return False
        try:
            with FileLock(path).acquire(timeout=0):
                return False
        except Timeout:
            return True


def baseline_columns(
    study: Study, stage: str, runs: Sequence[Progress], records: Records
) -> dict[str, str]:
    """The columns of the results that make a row of this stage its baseline. Of a stage with one
    baseline cell they are all that vary, so that every other cell is compared with it; else
    those of the knobs that the study names."""
    rows = {
        p.run_id: records.rows[p.run_id]
        for p in runs
        if p.run.stage == stage and p.run_id in records.rows
    }
    bases = [p for p in runs if p.run.stage == stage and p.run.is_baseline and p.run_id in rows]
    keys = keys_of(list(rows.values()))
    varied = [key for key in keys if len({key_value(row, key) for row in rows.values()}) > 1]
    if len({json.dumps(p.run.given) for p in bases}) > 1:
        plain = {key.replace("_", "").upper(): key for key in keys}
        spelled = {
            f.name: plain.get(s.replace("_", ""))
            for s, f in study.trainer.known.items()
            if s.replace("_", "") in plain
        }
        varied = [spelled.get(knob, "notes") for knob in study.baselines[stage]]
    found = {
        key: key_value(rows[p.run_id], key) for p in bases[:1] for key in dict.fromkeys(varied)
    }
    return {
        key: value for key, value in found.items() if value != "-"
    }  # a gate's knob, where there is no gate


def toml_of(rule: Rule) -> str:
    """The rule as words of a TOML table; what is not a number is left out."""
    words = dataclasses.asdict(rule).items()
    return ", ".join(f"{name} = {value!r}" for name, value in words if math.isfinite(value))


def write_stages(study: Study, runs: Sequence[Progress], records: Records) -> Path | None:
    """What split_results.py, plot.py and report.py need to know of this study's stages, beside
    its results; None while no baseline has finished."""
    records.refresh()
    lines = []
    for stage in study.stages:
        if base := baseline_columns(study, stage, runs, records):
            words = ", ".join(f"{key} = {json.dumps(value)}" for key, value in base.items())
            lines += [f"[stage.{json.dumps(stage)}]", f"baseline = {{ {words} }}"]
            if stage in study.targets:
                lines.append(f"target_loss = {study.targets[stage]}")
            if stage in study.rules:
                lines.append(f"sequential = {{ {toml_of(study.rules[stage])} }}")
    if not lines:
        return None
    path = records.results.parent / "tables" / f"{study.path.stem}.toml"
    write_whole(path, f"# made by run_study.py of {study.path.name}\n" + "\n".join(lines) + "\n")
    return path
