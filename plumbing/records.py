"""records.py -- what a run leaves behind, for eyes and for programs.

    logs/ID.txt              the log: sources, knobs, machine, then one line per event
    logs/ID/metrics.csv      one row per step, for programs
    logs/ID/status.json      where the run stands, for whoever watches it
    experiments/results.csv  one row per run, shared by all runs

Promises: files only grow, and a line that a crash tore is cut off before the next one is written.
status.json is replaced as a whole. A run whose lines are lost, because the disk is full, trains on
and says so once. A tracker can never stop a run.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.checkpoints import remove_parts, write_whole
from plumbing.clock import Clock
from plumbing.exchange import StepStats
from plumbing.knobs import ROOT, UserError, knobs_json
from plumbing.run_ids import check_run_id, lock_run
from plumbing.trackers import Tracker
from plumbing.world import World

RULE = "=" * 100
METRICS = (
    "step train_loss val_loss lr train_time_s tokens tokens_per_s mfu grad_norm peak_memory_mib"
).split()


# ----------------------------------------------------------------------------
# The run's own files


class RunLog:
    """One run's log, metrics.csv, status.json and progress bar. Rank 0 writes; lines reach the file
    at once and are forced to disk by sync().

    Raises UserError on every rank, before training, when the id is that of a complete run or of one
    that another process trains now. `named_by` is the knob that the user named this run with.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        world: World,
        total_steps: int,
        tokens_per_step: int,
        columns: Sequence[str] = (),
        unit: str = "tokens",
        named_by: str = "RUN_ID",
    ):
        self.world, self.id, self.unit, self.named_by = world, run_id, unit, named_by
        self.total_steps, self.tokens_per_step = total_steps, tokens_per_step
        self.columns = [*METRICS, *columns]
        self.folder = folder / run_id
        self.path = folder / f"{run_id}.txt"
        self.status_path = self.folder / "status.json"
        self.bar: tqdm | None = None
        self.tracker: Tracker | None = None
        self.lost_lines = False
        self.tokens_before = 0  # more than its own steps make, where a fork has another batch
        self.row: dict[str, object] = {}  # the newest of metrics.csv, not yet written
        self.known: dict[str, object] = {"run_id": run_id, "num_iterations": total_steps}
        self.status_written_at = 0.0
        problem = None
        if world.is_main:
            try:
                self._open()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = (
                    f"{self.folder}: cannot be used ({error}); set LOGS_FOLDER or {named_by} to "
                    f"another"
                )
        world.agree(problem)

    def _open(self) -> None:
        check_run_id(self.folder, self.id, self.named_by)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_run(self.folder, self.id, self.named_by)
        for litter in self.folder.glob(".*.part"):  # of a start that was killed
            litter.unlink()
        remove_parts(self.folder)
        check_run_id(self.folder, self.id, self.named_by)  # it may have ended since
        self.log = _open_for_appending(self.path)
        self.csv = _open_for_appending(self.folder / "metrics.csv")
        if self.csv.tell() == 0:
            self.csv.write(",".join(self.columns) + "\n")

    def header(
        self,
        cfg: object,
        sources: Mapping[str, str],
        flops_per_token: float,
        facts: Mapping[str, object],
    ) -> None:
        """The program, the knobs and the machine, at each start of the run. `sources` are file
        names with their texts; replay.py takes them out of the log again.
        """
        self.flops_per_token = flops_per_token
        self.peak_flops = self.world.peak_flops()
        self.code_sha256 = sources_sha256(sources)
        commit = _output_of("git", "rev-parse", "HEAD")
        self.git_commit = commit or "unknown"
        self.dirty = bool(_output_of("git", "status", "-s", "-uno"))
        self.started = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}"
        if not self.world.is_main:
            return
        lines = []
        for name, text in sources.items():
            lines += [RULE, f"source: {name}", RULE, text.rstrip("\n")]
        dirty = " (dirty)" if self.dirty else ""
        lines += [RULE, f"git_commit: {self.git_commit}{dirty}", f"code_sha256: {self.code_sha256}"]
        lines += [f"command: {shlex.join(sys.orig_argv)}", "hyperparameters:", knobs_json(cfg)]
        lines += [f"Running pytorch {torch.__version__} compiled for CUDA {torch.version.cuda}"]
        lines += ["nvidia-smi:", _output_of("nvidia-smi") or "not found", RULE]
        self._write(self.log, "\n".join(lines) + "\n")
        for name, value in facts.items():
            self.say(f"{name}: {value}")
        self.say(f"device: {self.world.size} x {self.world.device_name()}")
        self.say(f"log: {self.path}")
        peak = "n/a"
        if self.peak_flops:
            teraflops = self.peak_flops / 1e12
            peak = f"of {teraflops:.0f} TFLOP/s dense bf16, attention counted causal"
        self.say(f"mfu: {peak}")
        self.known["started"] = self.started
        self._track(cfg)
        self.sync()

    def _track(self, cfg: object) -> None:
        kind = getattr(cfg, "tracker", "off")
        if kind != "off":
            project = getattr(cfg, "tracker_project", "flatrun")
            config = dataclasses.asdict(cfg)
            self.tracker = Tracker(kind, project, self.id, config, self.folder, self.say)

    def say(self, line: str, quiet: bool = False) -> None:
        """One line in the log and on stdout. A `quiet` one stays off a terminal that shows the
        progress bar instead.
        """
        if not self.world.is_main:
            return
        self._write(self.log, line + "\n")
        if not (quiet and sys.stderr.isatty()):
            _print_above_the_bar(line)

    def step(self, stats: StepStats, clock: Clock, line: str) -> None:
        """Record one finished optimizer step: a row, the bar, and now and then the status. `line`
        is its log line; empty for none.
        """
        if not self.world.is_main:
            return
        self._flush_row()
        tokens_per_s = self.tokens_per_step / clock.step_s
        mfu = self.mfu(tokens_per_s)
        self.row = {
            "step": stats.step,
            "train_loss": f"{stats.loss:.6f}",
            "lr": f"{stats.lr:.6g}",
            "grad_norm": f"{stats.grad_norm:.6g}",
            "train_time_s": f"{clock.train_s(stats.step):.3f}",
            "tokens": self.tokens(stats.step),
            "tokens_per_s": number_text(tokens_per_s, ".0f"),
            "mfu": number_text(mfu, ".4f"),
            "peak_memory_mib": self.world.peak_memory_mib(),
        }
        self.row.update({name: number_text(v, ".6g") for name, v in stats.metrics.items()})
        if line:
            self.say(line, quiet=True)
        if self.tracker:
            values = {"train_loss": stats.loss, "lr": stats.lr, "grad_norm": stats.grad_norm}
            self.tracker.send(stats.step, {**values, "tokens_per_s": tokens_per_s, **stats.metrics})
        self.known["train_loss"] = stats.loss
        self.known["tokens_per_s"] = tokens_per_s
        self.known["eta_s"] = (self.total_steps - stats.step) * clock.step_s
        if time.monotonic() - self.status_written_at > 2:
            self.status("running", stats.step)
        speed = number_text(tokens_per_s, ",.0f") or "-"
        self._move_bar(stats.step, f"loss {stats.loss:.3f}, {speed} {self.unit}/s")

    def tokens(self, step: int) -> int:
        return self.tokens_before + step * self.tokens_per_step

    def mfu(self, tokens_per_s: float) -> float:
        """Model FLOPs utilisation; nan where the device's peak is not known."""
        if not self.peak_flops:
            return math.nan
        return tokens_per_s * self.flops_per_token / self.peak_flops / self.world.size

    def validation(
        self, step: int, loss: float, clock: Clock, note: str, metrics: Mapping[str, float]
    ) -> None:
        """Record one validation: a line, which `note` ends, and the val_loss of the step's row,
        which is then on disk.
        """
        if not self.world.is_main:
            return
        self.say(f"step:{step}/{self.total_steps} val_loss:{loss:.4f} {clock.times(step)}{note}")
        self.row = self.row or {"step": step, "tokens": self.tokens(step)}
        self.row["val_loss"] = f"{loss:.6f}"
        self.row.update({name: number_text(v, ".6g") for name, v in metrics.items()})
        if self.tracker:
            self.tracker.send(step, {"val_loss": loss, **metrics})
        self.known["val_loss"] = loss
        self.sync()
        self.status("running", step)

    def _flush_row(self) -> None:
        if self.row:
            text = io.StringIO()
            csv.DictWriter(text, self.columns, lineterminator="\n").writerow(self.row)
            self._write(self.csv, text.getvalue())
        self.row = {}

    def _write(self, file: io.TextIOWrapper, text: str) -> None:
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            self._say_lines_are_lost(file.name, error)

    def sync(self) -> None:
        """Force what was written so far to disk."""
        if self.world.is_main:
            self._flush_row()
            for file in (self.log, self.csv):
                with suppress(OSError):  # _write has said so
                    file.flush()
                    os.fsync(file.fileno())

    def status(self, status: str, step: int) -> None:
        """Replace status.json."""
        if not self.world.is_main:
            return
        self.status_written_at = time.monotonic()
        facts = {"status": status, "step": step, **self.known}
        facts.update(pid=os.getpid(), host=socket.gethostname(), updated=time.time())
        text = json.dumps({name: _json_value(value) for name, value in facts.items()}, indent=1)
        try:
            write_whole(self.status_path, (text + "\n").encode())
        except OSError as error:
            self._say_lines_are_lost(self.status_path, error)

    def _say_lines_are_lost(self, path: object, error: OSError) -> None:
        """A full disk costs lines, not the run."""
        if not self.lost_lines:
            line = f"{path}: cannot be written ({error}); training goes on without it; free space"
            _print_above_the_bar(line, sys.stderr)
        self.lost_lines = True

    def _move_bar(self, step: int, words: str) -> None:
        if not sys.stderr.isatty():
            return
        if self.bar is None:
            self.bar = tqdm(
                total=self.total_steps,
                initial=step - 1,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.05,
            )
        self.bar.set_postfix_str(words, refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        if self.tracker:
            self.tracker.close()
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.world.is_main:
            self.sync()
            for file in (self.log, self.csv):
                with suppress(OSError):
                    file.close()
            self.lock.release()


def read_sources(paths: Sequence[str | Path]) -> dict[str, str]:
    """The texts of the given files and of plumbing, by their names in the checkout."""
    plumbing = sorted(Path(__file__).parent.glob("*.py"))
    sources = {}
    for path in [*map(Path, paths), *plumbing]:
        path = path.resolve()
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        sources[str(name)] = path.read_text(encoding="utf-8")
    return sources


def sources_sha256(sources: Mapping[str, str]) -> str:
    """One SHA-256 of all source files of a run, their names included."""
    digest = hashlib.sha256()
    for name, text in sources.items():
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


def _open_for_appending(path: Path) -> io.TextIOWrapper:
    """A last line that a crash tore is cut off, so that the next one starts clean."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
    return open(path, "a", newline="", encoding="utf-8", errors="backslashreplace")


def _print_above_the_bar(line: str, file: object = None) -> None:
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    line = line.encode(encoding, "backslashreplace").decode(encoding)  # an ASCII locale
    with suppress(OSError):  # a closed terminal or pipe is no reason to stop
        tqdm.write(line, file=file)
        file.flush()


def _json_value(value: object) -> object:
    """Numbers as numbers; what is not known as null, because JSON has no nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number_text(value: float, form: str) -> str:
    """A number for a CSV file; empty where it is not known."""
    return "" if math.isnan(value) else format(value, form)


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
