"""replay.py -- the program of a run, taken back out of its log, and the command that runs it again.

    python scripts/replay.py logs/ID.txt OUT
    python scripts/replay.py logs/ID.txt OUT --start 2     the program as it was when it resumed
    sh -c "$(python scripts/replay.py logs/ID.txt OUT)"    take out and train again

Writes all sources of the run (the trainer, its data module, plumbing) and knobs.json into OUT.
stdout is the command, all else goes to stderr. The new run is called replay-ID and keeps its logs
and its results row under OUT. Same program, same data, same torch, same device and number of ranks:
the same losses. The exit code is 1 when the text is not what the log's code_sha256 says.
Raises   UserError: no such log, no program in it, no such start, OUT has a program, one that cannot
         be imported
"""

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lib  # noqa: F401  puts the checkout on sys.path

from plumbing import UserError, launch
from plumbing.records import RULE, sources_sha256

# Run in OUT: the name of each knob whose value is not that of the preset, or that this environment
# sets, and the value as a flag spells it.
LIST_FLAGS = """
import dataclasses, json, os
import {module} as trainer
from plumbing.knobs import describe, spellings
cfg = json.load(open("knobs.json"))
usual = trainer.Knobs(**trainer.PRESETS.get(cfg.get("preset"), {{}}))
in_environment = {{f.name for name, f in spellings(trainer.Knobs).items() if name in os.environ}}
for field in dataclasses.fields(usual):
    value = cfg.get(field.name, field.default)
    usually = field.default if field.name == "preset" else getattr(usual, field.name)
    if value != usually or field.name in in_environment:
        print(json.dumps([field.name, describe(field, value)]))
"""


@dataclass(frozen=True)
class Start:
    """What the log holds of one start of the run."""

    sources: dict[str, str]  # texts by file name; the trainer is the first
    matches: bool  # whether they are the texts that code_sha256 was made of
    command: str
    knobs: dict[str, object]
    torch: str
    num_ranks: int

    @property
    def trainer(self) -> str:
        return next(iter(self.sources))


# ----------------------------------------------------------------------------
# Reading a log


def read_starts(path: Path) -> list[Start]:
    """Every start in the log whose header is whole. Raises UserError when there is none."""
    try:
        text = path.read_bytes().decode("utf-8", "replace")  # sources are UTF-8
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; name a run's log, such as logs/<run_id>.txt"
        ) from None
    starts = []
    sources: dict[str, str] = {}
    for title, body in sections(text.split("\n")):
        if title.startswith("source: "):
            name = title.removeprefix("source: ")
            if name in sources:  # the header before was cut short by a crash
                sources = {}
            sources[name] = body
        else:
            start = read_start(sources, f"{title}\n{body}")
            if start is not None:
                starts.append(start)
            sources = {}
    if not starts:
        raise UserError(
            f"{path}: holds no program in sections between lines of {len(RULE)} '='; is it the log "
            f"of a run of ours?"
        )
    return starts


def sections(lines: Sequence[str]) -> list[tuple[str, str]]:
    """The header's sections, title and text: `source: NAME` with the source, and `git_commit: ...`
    with all that follows up to the next header.
    """
    begins = []  # (line of the rule, first line of the text)
    for i in range(len(lines) - 2):
        if lines[i] != RULE:
            continue
        if lines[i + 1].startswith("source: ") and lines[i + 2] == RULE:
            begins.append((i, i + 3))
        elif lines[i + 1].startswith("git_commit: "):
            begins.append((i, i + 2))
    found = []
    for k, (i, first) in enumerate(begins):
        end = begins[k + 1][0] if k + 1 < len(begins) else len(lines)
        found.append((lines[i + 1], "\n".join(lines[first:end])))
    return found


def read_start(sources: dict[str, str], facts: str) -> Start | None:
    """A start from its sources and what stands behind them; None where a crash cut that short."""
    said = {}
    for key in ("code_sha256", "command", "Running pytorch", "device"):
        match = re.search(rf"^{key}:? (.*)$", facts, re.MULTILINE)
        if match is None:
            return None
        said[key] = match[1]
    hyperparameters = re.search(r"^hyperparameters:\n(\{.*?^\})$", facts, re.MULTILINE | re.DOTALL)
    num_ranks = re.match(r"(\d+) x ", said["device"])
    if hyperparameters is None or num_ranks is None or not sources:
        return None
    whole = with_line_ends(sources, said["code_sha256"])
    return Start(
        sources=whole or {name: text + "\n" for name, text in sources.items()},
        matches=whole is not None,
        command=said["command"],
        knobs=json.loads(hyperparameters[1]),
        torch=said["Running pytorch"].split()[0],
        num_ranks=int(num_ranks[1]),
    )


def with_line_ends(sources: dict[str, str], sha256: str) -> dict[str, str] | None:
    """The texts with the line ends at their end, which the log leaves out, that give `sha256`; None
    if none do. Files of plumbing end in one line end, others in up to two.
    """
    whole = {name: f"{text}\n" if text else "" for name, text in sources.items()}
    own = [name for name in sources if not name.startswith("plumbing/")]
    for ends in itertools.product(("\n", "", "\n\n"), repeat=len(own)):
        for name, end in zip(own, ends, strict=True):
            whole[name] = sources[name] + end
        if sources_sha256(whole) == sha256:
            return whole
    return None


# ----------------------------------------------------------------------------
# Writing the program


def check_names(sources: Sequence[str]) -> None:
    """Raise UserError unless the sources are Python files below one folder, the trainer first."""
    for name in sources:
        is_inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not (is_inside and re.fullmatch(r"[\w./-]+\.py", name, re.ASCII)):
            raise UserError(f"{name!r} cannot be the name of a run's source; the log was edited")
    trainer = next(iter(sources))
    if not Path(trainer).stem.isidentifier() or "/" in trainer:
        raise UserError(f"{trainer!r} cannot be the name of a trainer; the log was edited")


def write_files(out: Path, texts: dict[str, str]) -> None:
    """Raises UserError when one of them is there already, or cannot be written."""
    present = [name for name in texts if (out / name).exists()]
    if present:
        raise UserError(f"{out} already has {', '.join(present)}; choose another folder")
    try:
        for name, text in texts.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(text.encode())
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); choose another folder"
        ) from None


def rerun_command(out: Path, start: Start) -> list[str]:
    """The command, with a flag for each knob that is not as the program (in `out`) or this
    environment has it.
    """
    program = LIST_FLAGS.format(module=Path(start.trainer).stem)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=out,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(
            f"the program is in {out}, but it cannot be imported here ({lines[-1][:300]}); "
            f"knobs.json has its knobs"
        )
    flags = dict(json.loads(line) for line in done.stdout.splitlines())
    place = out.resolve()
    flags["run_id"] = f"replay-{start.knobs['run_id']}"
    flags["logs_folder"] = place / "logs"
    flags["results_file"] = place / "results.csv"
    command = [sys.executable]
    if start.num_ranks > 1:
        ranks = f"--nproc_per_node={start.num_ranks}"
        command += ["-m", "torch.distributed.run", "--standalone", ranks]
    command.append(str(place / start.trainer))
    return command + [f"--{name}={value}" for name, value in flags.items()]


# ----------------------------------------------------------------------------
# Program


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def say_what_differs(start: Start) -> None:
    """Lines on what a second run may not have as the first one had it."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        installed = "none"
    line = f"torch: {start.torch}"
    if start.torch.split("+")[0] != installed.split("+")[0]:
        line += f"; warning: {installed} is installed, losses may differ"
    say(line)
    for knob in ("input_bin", "input_val_bin", "data", "dataset"):
        pattern = str(start.knobs.get(knob, "embedded"))
        if "/" in pattern and not os.path.isabs(pattern):
            say(
                f"warning: {knob.upper()}={pattern} is relative to the folder that the run was "
                f"started in"
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("log", type=Path, help="logs/<run_id>.txt")
    add("out", type=Path, help="folder for the program")
    add("--start", type=int, default=1, metavar="N", help="which start of a resumed run (1)")
    args = parser.parse_args(argv)
    starts = read_starts(args.log)
    if not 1 <= args.start <= len(starts):
        raise UserError(
            f"--start {args.start}: {args.log} holds {len(starts)} start(s) of the run; choose 1 "
            f"to {len(starts)}"
        )
    start = starts[args.start - 1]
    check_names(list(start.sources))
    start.knobs["run_id"] = start.knobs.get("run_id") or args.log.stem
    knobs_text = json.dumps(start.knobs, indent=2) + "\n"
    write_files(args.out, {**start.sources, "knobs.json": knobs_text})

    names = ", ".join(start.sources)
    say(f"{args.log}: start {args.start} of {len(starts)}, written to {args.out}: {names}")
    if start.matches:
        say("code_sha256: matches")
    else:
        say("warning: the text is NOT what the log's code_sha256 was made of")
    say(f"it ran as: {start.command}")
    say_what_differs(start)
    print(shlex.join(rerun_command(args.out, start)))
    return 0 if start.matches else 1


if __name__ == "__main__":
    launch(main)
