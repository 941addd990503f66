"""Every command of README and docs/: its program is there, takes what is written, and a trainer's
is tried with --dry_run.
"""

import importlib
import importlib.util
import io
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import pytest
from support import ROOT

from plumbing.knobs import UserError

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINERS = ("train_gpt.py", "train_gpu.py", "train_scaled.py", "train_arith.py")
# Words in front of the program that say how it is started.
STARTERS = {"nohup", "sudo", "time", "exec", "scripts/launch.sh", "env"}
# What a dry run may miss here, since a test has no network, no data and no GPU.
ABSENT = re.compile(
    r"no token shards match|cannot be read|the hub|no answer|is not here|sees no CUDA|pyarrow|"
    r"neither wikitext|no text there|wikipedia|fla-core|package fla|needs a GPU|no such checkpoint"
)


def commands_of(path: Path) -> list[str]:
    """Lines of code blocks, joined where they go on, and code in running text that is a command."""
    text = path.read_text()
    text = re.sub(r"^```(?:python|diff|toml|json)\n.*?^```", "", text, flags=re.M | re.S)
    blocks = re.findall(r"^(?: {4}|> )(\S.*)$", text.replace("\\\n", " "), re.M)
    for fenced in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        blocks += fenced.replace("\\\n", " ").splitlines()
    inline = re.findall(r"`((?:[A-Z_]+=\S+ )*(?:python|torchrun|make|scripts/)[^`]*)`", text)
    return [line.strip() for line in [*blocks, *inline] if is_command(line)]


def is_command(line: str) -> bool:
    start = re.match(
        r"(?:[A-Z_]+=\S+ )*(?:nohup |scripts/launch\.sh )?"
        r"(python3?|\S*/python|torchrun|make|scripts/\S+\.sh|sbatch) ",
        line.strip() + " ",
    )
    return start is not None and "..." not in line.split("#")[0] and "<" not in line


COMMANDS = sorted({(path.name, line) for path in DOCUMENTS for line in commands_of(path)})


def parts_of(line: str) -> tuple[dict[str, str], list[str]]:
    """The environment that a command sets, and its words; what follows a pipe or & is left out."""
    words = shlex.split(line, comments=True)
    for mark in ("|", "&", "&&", ">", "2>&1", ";"):
        if mark in words:
            words = words[: words.index(mark)]
    env = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    while words and words[0] in STARTERS:
        words.pop(0)
    return env, words


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """The program's file and its arguments."""
    for i, word in enumerate(words):
        if word.endswith((".py", ".sh", ".sbatch")) and not word.startswith("-"):
            return word, words[i + 1 :]
    return "", words[1:]


def test_the_documents_hold_commands_of_every_trainer_and_of_the_tools():
    text = "\n".join(line for _, line in COMMANDS)
    assert len(COMMANDS) > 60
    for program in (*TRAINERS, "scripts/doctor.py", "scripts/status.py", "scripts/evaluate.py"):
        assert program in text, program


@cache
def help_of(program: str) -> str:
    """What `program --help` prints, in this process."""
    path = ROOT / program
    name = f"documented_{path.stem}"
    folders = [str(ROOT), str(ROOT / "scripts"), str(path.parent)]
    before, argv = list(sys.path), sys.argv
    sys.path[:0] = folders
    sys.argv = [str(path), "--help"]
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as left:
            module.main()
        assert left.value.code == 0
    finally:
        sys.path[:], sys.argv = before, argv
    return out.getvalue()


def dry_run(monkeypatch, folder: Path, program: str, env: dict, arguments: list[str]) -> str:
    """What a trainer's dry run says; '' when nothing but what is absent here keeps it back."""
    monkeypatch.setenv("LOGS_FOLDER", str(folder / "logs"))
    monkeypatch.setenv("RESULTS_FILE", str(folder / "results.csv"))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [program, *arguments, "--dry_run"])
    module = importlib.import_module(Path(program).stem)
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
            code = module.main()
        problem = out.getvalue() if code else ""
    except UserError as error:
        problem = str(error)
    lines = [line for line in problem.splitlines() if "problem" in line or len(problem) < 500]
    return "" if ABSENT.search(problem) else "\n".join(lines) or problem


@pytest.mark.parametrize(("document", "line"), COMMANDS, ids=lambda value: value[:70])
def test_a_documented_command_is_one(document, line, tmp_path, monkeypatch):
    env, words = parts_of(line)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word and word[0] != "-"} <= set(targets)
        return
    program, arguments = program_of(words)
    if not program:  # python -c, python -m pytest PATH
        paths = [word.split("::")[0] for word in arguments if "/" in word]
        assert all((ROOT / path).exists() for path in paths), paths
        return
    if program == "train_mix.py":  # tests/tools/test_new_trainer.py has it
        return
    assert (ROOT / program).is_file(), program
    if "--help" in arguments:
        assert help_of(program)
    elif document == "changing.md":  # of a changed trainer; tests/gpt/test_changing.py has them
        return
    elif program in TRAINERS:
        assert dry_run(monkeypatch, tmp_path, program, env, arguments) == ""
    elif program.endswith(".py") and "tests" not in program:
        known = help_of(program)
        flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
        unknown = [flag for flag in flags if not re.search(rf"{flag}\b", known)]
        assert not unknown, f"{program} takes no {unknown}"
