"""replay.py -- the program of a run, taken back out of its log, and the command that runs it again.

    python scripts/replay.py logs/ID.txt OUT
    python scripts/replay.py logs/ID.txt OUT --start 2        the program as it was when the run was resumed
    sh -c "$(python scripts/replay.py logs/ID.txt OUT)"       take out and train again

Writes the trainer, plumbing.py and knobs.json into OUT. stdout is the command, all else goes to stderr. The new run
is called replay-ID and keeps its logs and its results row under OUT. Same program, same data, same torch, same
device and number of ranks: the same losses. The exit code is 1 when the text is not what the log's code_sha256 says.
Raises   UserError: no such log, no program in it, no such start, OUT has a program, one that cannot be imported
"""

import argparse
import ast
import hashlib
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # plumbing.py
from plumbing import RULE, UserError, launch

CHANGED = (
    "run_id logs_folder results_file".split()
)  # knobs that say where a run is kept, and no more
# Run in OUT: each of the program's knobs, whether the environment sets it, and how a flag spells it where its
# value is not that of the preset.
FLAGS = """
import dataclasses, json, os
import plumbing, {module} as trainer
knobs = json.load(open("knobs.json"))
preset = getattr(trainer, "PRESETS", {{}}).get(knobs.get("preset"), {{}})
usual = trainer.Knobs(**preset)
for f in dataclasses.fields(usual):
    value = knobs.get(f.name, f.default)
    usually = f.default if f.name == "preset" else getattr(usual, f.name)
    if value != usually or any(name.upper() in os.environ for name in (f.name, *f.metadata["alias"])):
        print(json.dumps([f.name, plumbing.show(f, value)]))
"""


@dataclass(frozen=True)
class Start:
    """What the log holds of one start of the run."""

    sources: list[str]  # the trainer, then plumbing.py
    matches: bool  # whether they are the text that code_sha256 was made of
    command: str
    knobs: dict[str, object]
    torch: str
    ranks: int


def with_ends(texts: Sequence[str], sha: str) -> list[str] | None:
    """The texts with the line ends at their end, which the log leaves out, that give `sha`; None if none do."""
    for ends in itertools.product(("\n", "", "\n\n"), repeat=len(texts)):
        whole = [text + end for text, end in zip(texts, ends, strict=True)]
        if hashlib.sha256("".join(whole).encode()).hexdigest() == sha:
            return whole
    return None


def read_starts(path: Path) -> list[Start]:
    """Every start in the log whose header is whole. Raises UserError when there is none."""
    try:
        lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; name a run's log, such as logs/<run_id>.txt"
        ) from None
    rules = [i for i, line in enumerate(lines) if line == RULE]
    starts = []
    for a, b, c, d in zip(rules, rules[1:], rules[2:], rules[3:], strict=False):
        facts = lines[c + 1 : d]
        if not facts or not facts[0].startswith("git_commit: "):
            continue
        said = dict(
            line.split(": ", 1) for line in facts if ": " in line and not line.startswith(" ")
        )
        try:
            after = facts[facts.index("hyperparameters:") + 1 :]
            knobs = json.loads("\n".join(after[: after.index("}") + 1]))
            torch_version = next(
                m[1] for line in facts if (m := re.match(r"Running pytorch (\S+)", line))
            )
            device = next(
                m for line in lines[d + 1 :] if (m := re.match(r"device: (\d+) x ", line))
            )
            command, sha = said["command"], said["code_sha256"]
        except (KeyError, StopIteration, ValueError):  # cut short by a crash
            continue
        texts = ["\n".join(lines[start + 1 : end]) for start, end in ((a, b), (b, c))]
        whole = with_ends(texts, sha)
        texts = whole or [text + "\n" for text in texts]
        starts.append(
            Start(texts, whole is not None, command, knobs, torch_version, int(device[1]))
        )
    if not starts:
        raise UserError(
            f"{path}: holds no program between lines of {len(RULE)} '='; is it the log of a run of ours?"
        )
    return starts


def trainer_name(start: Start) -> str:
    """The trainer's file name, from the command; if that names no file, from the first word of its docstring."""
    words = [Path(word).name for word in shlex.split(start.command)[1:]]
    words += (ast.get_docstring(ast.parse(start.sources[0])) or "").split()[:1]
    name = next((word for word in words if word.endswith(".py")), "train.py")
    if not re.fullmatch(r"[A-Za-z_]\w*\.py", name) or name == "plumbing.py":
        raise UserError(
            f"{name!r} cannot be a trainer's file name; the log's command is: {start.command}"
        )
    return name


def rerun_command(out: Path, name: str, start: Start) -> list[str]:
    """The command, with a flag for each knob that is not as the program (in `out`) or this environment has it."""
    clean = os.environ | dict(PYTHONPATH="")
    run = [sys.executable, "-c", FLAGS.format(module=name[:-3])]
    done = subprocess.run(run, cwd=out, env=clean, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"the program is in {out}, but it cannot be imported here ({last[:300]}); knobs.json has its knobs"
        )
    flags = dict(json.loads(line) for line in done.stdout.splitlines())
    place = out.resolve()
    flags = {key: value for key, value in flags.items() if key not in CHANGED}
    flags |= dict(run_id=f"replay-{start.knobs['run_id'] or 'run'}", logs_folder=place / "logs")
    flags |= dict(results_file=place / "results.csv")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={start.ranks}"]
    command = [sys.executable, *(torchrun if start.ranks > 1 else []), str(place / name)]
    return command + [f"--{key}={value}" for key, value in flags.items()]


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("log", type=Path, help="logs/<run_id>.txt")
    p.add_argument("out", type=Path, help="folder for the program")
    p.add_argument(
        "--start", type=int, default=1, metavar="N", help="which start of a resumed run (1)"
    )
    a = p.parse_args(argv)
    say = lambda line: print(line, file=sys.stderr, flush=True)
    starts = read_starts(a.log)
    if not 1 <= a.start <= len(starts):
        raise UserError(
            f"--start {a.start}: {a.log} holds {len(starts)} start(s) of the run; choose 1 to {len(starts)}"
        )
    start = starts[a.start - 1]
    name = trainer_name(start)
    start.knobs["run_id"] = start.knobs.get("run_id") or a.log.stem
    texts = {name: start.sources[0], "plumbing.py": start.sources[1]}
    texts["knobs.json"] = json.dumps(start.knobs, indent=2) + "\n"
    if there := [file for file in texts if (a.out / file).exists()]:
        raise UserError(f"{a.out} already has {', '.join(there)}; choose another folder")
    try:
        a.out.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (a.out / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(
            f"{a.out}: cannot be written ({error.strerror}); choose another folder"
        ) from None

    say(f"{a.log}: start {a.start} of {len(starts)}, written to {a.out}: {', '.join(texts)}")
    say(
        "code_sha256: matches"
        if start.matches
        else "warning: the text is NOT what the log's code_sha256 was made of"
    )
    say(f"it ran as: {start.command}")
    try:
        installed = version("torch")
    except PackageNotFoundError:
        installed = "none"
    differs = start.torch.split("+")[0] != installed.split("+")[0]
    say(
        f"torch: {start.torch}"
        + f"; warning: {installed} is installed, losses may differ" * differs
    )
    for knob in ("input_bin", "input_val_bin"):
        pattern = str(start.knobs.get(knob, "embedded"))
        if pattern != "embedded" and not os.path.isabs(pattern):
            say(
                f"warning: {knob.upper()}={pattern} is relative to the folder the run was started in"
            )
    print(shlex.join(rerun_command(a.out, name, start)))
    return 0 if start.matches else 1


if __name__ == "__main__":
    launch(main)
