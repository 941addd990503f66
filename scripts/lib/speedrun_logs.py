"""Logs of other people's runs: a program's source between lines of '=', then lines of steps.

Formats read: modded-nanogpt's logs from 2024-10 on ("step:125/5100 val_loss:4.1 train_time:..ms
step_avg:..ms", with or without train_time and step_avg), the older "s:125 tel:4.1", and those of
the original gating study. A file may hold several runs, one behind another, may have Windows line
ends, and its last line may be cut.
Units    losses in nats per token, times in ms
"""

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from lib.program import UserError

RULER = re.compile(r"={20,}$")
NUMBER = r"(nan|inf|-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
COUNT = r"(\d{1,12})"  # Python reads no number of thousands of digits
STEP = re.compile(
    rf"(?:step:{COUNT}/{COUNT}|s:{COUNT})\s+(?:(val_loss|tel)|train_loss|trl):{NUMBER}"
    rf"(?:\s+train_time:{NUMBER}ms)?(?:\s+step_avg:{NUMBER}ms)?(?:\s|$)"
)


@dataclass
class LoggedRun:
    """One run as its log tells it."""

    source: str
    total_steps: int = 0  # planned; the last one seen where the log does not say
    val: dict[int, tuple[float, float]] = field(default_factory=dict)  # step: loss, ms (nan)
    train: dict[int, tuple[float, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """Of the source, without trailing blanks and line ends of one system or another."""
        lines = [line.rstrip() for line in self.source.strip().split("\n")]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def last_step(self) -> int:
        return max([0, *self.val, *self.train])

    @property
    def final_loss(self) -> float:
        return self.val[max(self.val)][0] if self.val else math.nan

    @property
    def is_complete(self) -> bool:
        """Whether it was validated at its last planned step, with a finite loss."""
        at_end = bool(self.val) and max(self.val) >= self.total_steps > 0
        return at_end and math.isfinite(self.final_loss)

    @property
    def train_ms(self) -> float:
        return self.val[max(self.val)][1] if self.val else math.nan


def read_log(path: Path) -> list[LoggedRun]:
    """The runs of a log. Raises UserError when there is none in it."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    is_cut = not text.endswith("\n")
    lines = text.replace("\r\n", "\n").split("\n")
    runs: list[LoggedRun] = []
    source: list[str] = []
    for number, line in enumerate(lines):
        match = STEP.match(line)
        if not match:
            source.append(line)
            continue
        is_last = is_cut and number == len(lines) - 1
        add_line(match, runs, source, is_last)
    runs = [run for run in runs if run.val or run.train]
    if not runs:
        raise UserError(f"{path}: no line such as 'step:125/5100 val_loss:4.1'; is it a run's log?")
    for run in runs:
        run.total_steps = run.total_steps or run.last_step
    return runs


def add_line(match: re.Match, runs: list[LoggedRun], source: list[str], is_last: bool) -> None:
    """One line of a step. Behind other text, or where steps start over, another run begins."""
    step = int(match[1] or match[3])
    is_val = match[4] is not None
    known = (runs[-1].val if is_val else runs[-1].train) if runs else {}
    has_program = any(RULER.match(line) for line in source)
    if not runs or has_program or (known and step < max(known)) or (step == 0 and 0 in known):
        same = runs[-1].source if runs and not has_program else program_in(source)
        runs.append(LoggedRun(same))
    source.clear()
    run = runs[-1]
    seen = run.val or run.train
    if is_last and seen and match[6] is None and math.isfinite(next(iter(seen.values()))[1]):
        run.problems.append(f"the last line, of step {step}, is cut; left out")
        return
    run.total_steps = int(match[2] or 0) or run.total_steps
    values = (float(match[5]), float(match[6] or "nan"))
    (run.val if is_val else run.train)[step] = values


def program_in(lines: list[str]) -> str:
    """The source: what stands before the first ruler that has text before it."""
    text: list[str] = []
    for line in lines:
        if RULER.match(line):
            if any(word.strip() for word in text):
                break
            continue
        text.append(line)
    return "\n".join(text)
