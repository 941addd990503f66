"""How a study's progress is shown: a live table on a terminal, events and summaries elsewhere."""

import itertools
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence

from lib.planning import Pace, left_s
from lib.progress import Progress
from lib.study import Study
from lib.words import duration, fit, rate

COLOURS = {"done": "32", "running": "36", "failed": "31", "elsewhere": "35"}


class Board:
    """A live table on a terminal, redrawn in place; elsewhere a line per event and one every 30
    seconds."""

    def __init__(self, study: Study, runs: Sequence[Progress], pace: Pace):
        self.study, self.runs, self.pace = study, runs, pace
        self.left_s, self.left_at = math.nan, -math.inf  # seconds, and when that was known
        self.live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.drawn: list[str] = []  # the table as it stands on the screen
        self.told = time.monotonic()
        self.doing = ""

    def summary(self) -> str:
        counts = {
            s: sum(p.state == s for p in self.runs)
            for s in ("running", "elsewhere", "failed", "spared")
        }
        words = [f"{sum(p.state == 'done' for p in self.runs)} of {len(self.runs)} done"]
        words += [f"{n} {state}" for state, n in counts.items() if n]
        if waiting := sum(p.state in ("waiting", "half-done") for p in self.runs):
            words.append(f"{waiting} waiting")
        eta = duration(self.eta_s())
        return ", ".join(words) + (f", ETA {eta}" if eta and waiting + counts["running"] else "")

    def eta_s(self) -> float:
        """Seconds until nothing is left for this launcher; nan before any run has ended."""
        if time.monotonic() - self.left_at > 2:
            self.left_at = time.monotonic()
            self.left_s = left_s(self.study, self.runs, self.pace)
        return self.left_s

    def line(self, p: Progress, width: int, colour: bool) -> str:
        step = f"{p.step}/{p.run.steps}" if p.step or p.state == "running" else f"{p.run.steps}"
        loss = f"{p.loss:.4f}" if math.isfinite(p.loss) else ""
        speed, eta = (rate(p.tokens_per_s), duration(p.eta_s)) if p.state == "running" else ("", "")
        tail = f"{p.run.seed:>6}  {p.state:<9} {step:>11} {loss:>8} {speed:>6} {eta or p.note:>7}"
        room = width - len(tail) - 3
        label = fit(p.run.label, room)
        if colour and p.state in COLOURS:
            tail = tail.replace(p.state, f"\x1b[{COLOURS[p.state]}m{p.state}\x1b[0m", 1)
        return f"  {label:<{room}} {tail}"

    def table(self, width: int, height: int, colour: bool) -> list[str]:
        """The whole table, or, where it is higher than the screen, what is going on and what
        comes next."""
        head = f"{'seed':>6}  {'state':<9} {'step':>11} {'loss':>8} {'tok/s':>6} {'ETA':>7}"
        lines: list[str] = []
        heads: list[int] = []  # of each line: where its stage's heading is
        busy = None  # the first line with something left to do
        for stage, group in itertools.groupby(self.runs, key=lambda p: p.run.stage):
            title = fit(f"{stage}  {self.study.stages[stage]}".rstrip(), width - len(head) - 2)
            at = len(lines)
            lines.append(f"{title:<{width - len(head) - 1}} {head}")
            for p in group:
                if busy is None and p.state not in ("done", "failed", "spared"):
                    busy = len(lines)
                lines.append(self.line(p, width, colour))
            heads += [at] * (len(lines) - at)
        room = (
            height - 5
        )  # but for the summary, the count of what is hidden, what goes on, and the cursor
        if len(lines) > room:
            start = max(0, min((busy or 0) - 2, len(lines) - room))
            end = start + room
            below, heading = len(lines) - end, lines[heads[start]]
            lines = [heading, *lines[start + 1 : end], f"  .. {start} lines above, {below} below"]
        summary = self.summary()
        top = fit(f"{fit(self.study.title, max(8, width - len(summary) - 2))}: {summary}", width)
        return [top, *lines, *([fit(self.doing, width)] if self.doing else [])]

    def draw(self) -> None:
        size = shutil.get_terminal_size()
        width = max(
            40, min(size.columns, 140) - 1
        )  # never the last column: some terminals wrap there
        lines = self.table(width, size.lines, colour=True)
        sys.stdout.write(
            self._erase(size.columns) + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J"
        )
        sys.stdout.flush()
        self.drawn = lines

    def _erase(self, columns: int) -> str:
        """To the start of the table; a window made narrower has wrapped its lines."""
        plain = [re.sub(r"\x1b\[\d+m", "", line) for line in self.drawn]
        rows = sum(max(1, math.ceil(len(line) / columns)) for line in plain)
        return f"\x1b[{rows}A\r" if rows else ""

    def event(self, text: str, quiet: bool = False) -> None:
        """One lasting line; `quiet` ones are left to the table where there is one."""
        if not self.live:
            print(text, flush=True)
        elif not quiet:
            columns = shutil.get_terminal_size().columns
            sys.stdout.write(self._erase(columns) + "\x1b[J" + text + "\n")
            self.drawn = []
            self.draw()

    def tick(self) -> None:
        if self.live:
            if time.monotonic() - self.told >= 0.5:
                self.told = time.monotonic()
                self.draw()
        elif time.monotonic() - self.told >= 30:
            self.told = time.monotonic()
            for p in self.runs:
                if p.state == "running":
                    words = [f"{p.run_id}: step {p.step}/{p.run.steps}"]
                    words += [f"loss {p.loss:.4f}"] if math.isfinite(p.loss) else []
                    words += (
                        [f"{rate(p.tokens_per_s)} tokens/s"]
                        if math.isfinite(p.tokens_per_s)
                        else []
                    )
                    words += [f"ETA {duration(p.eta_s)}"] if math.isfinite(p.eta_s) else []
                    print(f"{', '.join(words)}; {self.summary()}", flush=True)

    def close(self) -> None:
        """The whole table, whatever its height, as the last word on a terminal."""
        self.doing = ""
        if self.live:
            size = shutil.get_terminal_size()
            width = max(40, min(size.columns, 140) - 1)
            lines = self.table(width, 10**6, colour=True)
            sys.stdout.write(
                self._erase(size.columns) + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J"
            )
            sys.stdout.flush()
            self.drawn = []
