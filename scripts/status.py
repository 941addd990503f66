"""status.py -- what is running, what ran and what failed, from any terminal.

    python scripts/status.py                    the 20 newest runs
    python scripts/status.py --watch            again every 5 seconds, until Ctrl-C
    python scripts/status.py --all --logs_folder DIR

A run is one line: its state, step, losses in nats per token, speed and the time that is left.
`running` is said of a run whose process is alive, or lives on another machine and has reported
within the last ten minutes; `died` of one that said it was running and is gone (start the same
command with its RUN_ID, and it goes on). `preempted` runs were stopped and have saved.
Reads    LOGS_FOLDER/<run_id>/status.json, which a run replaces every two seconds
Exit     0, or 1 when a run of those that are shown died or failed
"""

import argparse
import json
import math
import os
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.program import UserError, add_logs_option, count, launch
from lib.words import duration, fit, rate

SILENT_S = 600  # a run on another machine that is silent for so long is taken for dead
BAD = ("died", "failed", "nan")


@dataclass
class Seen:
    """One run as its status file has it."""

    run_id: str
    state: str
    step: int
    steps: int
    train_loss: float
    val_loss: float
    tokens_per_s: float
    eta_s: float
    updated: float  # seconds since 1970

    def cells(self, now: float) -> dict[str, str]:
        is_running = self.state == "running"
        share = f" {self.step / self.steps:4.0%}" if self.steps else ""
        return {
            "run": self.run_id,
            "state": self.state,
            "step": f"{self.step}/{self.steps}{share}",
            "train": number(self.train_loss),
            "val": number(self.val_loss),
            "tokens/s": rate(self.tokens_per_s) if is_running else "",
            "left": duration(self.eta_s) if is_running else "",
            "seen": f"{duration(now - self.updated)} ago",
        }


def number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""


def is_alive(facts: dict, now: float) -> bool:
    """Whether the process that wrote this status can still be there."""
    if facts.get("host") != socket.gethostname():
        return now - float(facts.get("updated", 0)) < SILENT_S
    try:
        os.kill(int(facts["pid"]), 0)
    except (KeyError, ValueError, ProcessLookupError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def look(path: Path, now: float) -> Seen | None:
    """What a status file says; None where it cannot be read."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        state = str(facts["status"])
        if state == "running" and not is_alive(facts, now):
            state = "died"

        def known(name: str) -> float:
            value = facts.get(name)
            return math.nan if value is None else float(value)

        return Seen(
            run_id=path.parent.name,
            state=state,
            step=int(facts.get("step", 0)),
            steps=int(facts.get("num_iterations", 0)),
            train_loss=known("train_loss"),
            val_loss=known("val_loss"),
            tokens_per_s=known("tokens_per_s"),
            eta_s=known("eta_s"),
            updated=float(facts.get("updated", path.stat().st_mtime)),
        )
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return None


def find_runs(logs: Path, now: float) -> tuple[list[Seen], int]:
    """All runs of a folder, running ones first and then the newest; and how many status files
    could not be read.
    """
    paths = list(logs.glob("*/status.json"))
    runs = [seen for seen in (look(path, now) for path in paths) if seen is not None]
    runs.sort(key=lambda seen: (seen.state != "running", -seen.updated))
    return runs, len(paths) - len(runs)


def table(runs: Sequence[Seen], now: float, width: int) -> list[str]:
    rows = [seen.cells(now) for seen in runs]
    names = list(rows[0])
    rows.insert(0, {name: name for name in names})
    widths = {name: max(len(row[name]) for row in rows) for name in names}
    others = sum(widths.values()) - widths["run"] + 2 * (len(names) - 1)
    widths["run"] = max(8, min(widths["run"], width - others))
    lines = []
    for row in rows:
        words = [fit(row["run"], widths["run"]).ljust(widths["run"])]
        words.append(row["state"].ljust(widths["state"]))
        words += [row[name].rjust(widths[name]) for name in names[2:]]
        lines.append("  ".join(words).rstrip())
    return lines


def report(logs: Path, most: int | None, width: int) -> tuple[list[str], bool]:
    """The lines to show, and whether one of the runs is in a bad way."""
    now = time.time()
    runs, unreadable = find_runs(logs, now)
    if not runs:
        return [f"no run in {logs} yet; --logs_folder names another folder"], False
    shown = runs[:most]
    states = [seen.state for seen in runs]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    lines = [f"{count(len(runs), 'run')} in {logs}: {', '.join(counts)}"]
    lines += table(shown, now, width)
    if len(shown) < len(runs):
        lines.append(f"... and {len(runs) - len(shown)} older; --all shows them")
    if unreadable:
        lines.append(f"{count(unreadable, 'status file')} could not be read")
    return lines, any(seen.state in BAD for seen in shown)


def watch(logs: Path, most: int | None, every_s: float) -> None:
    """Show the report again and again, in place, until Ctrl-C."""
    while True:
        size = shutil.get_terminal_size((100, 24))
        lines, _ = report(logs, most, size.columns)
        room = max(1, size.lines - 2)
        print("\033[H\033[2J" + "\n".join(lines[:room]), flush=True)
        print(f"{time.strftime('%H:%M:%S')}, every {every_s:g} s; Ctrl-C ends", flush=True)
        time.sleep(every_s)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_logs_option(parser)
    add("--all", action="store_true", help="all runs, not only the 20 newest")
    add("--watch", nargs="?", type=float, const=5.0, metavar="SECONDS", help="again and again")
    args = parser.parse_args(argv)
    if not args.logs_folder.is_dir():
        raise UserError(f"--logs_folder {args.logs_folder}: no such folder")
    most = None if args.all else 20
    if args.watch is not None:
        if not args.watch > 0:
            raise UserError(f"--watch {args.watch:g}: expected seconds above 0")
        try:
            watch(args.logs_folder, most, args.watch)
        except KeyboardInterrupt:
            print()
        return 0
    width = shutil.get_terminal_size((100, 24)).columns
    lines, is_bad = report(args.logs_folder, most, width)
    print("\n".join(lines))
    return 1 if is_bad else 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head` ends this program as it ends others, silently
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    launch(main)
