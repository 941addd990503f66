"""Every command of README and docs/: its program is there, and a trainer's is tried with --dry_run.

test_documented_scripts.py executes those of scripts/.
"""

import importlib
import io
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from documents import COMMANDS, parts_of, program_of
from support import ROOT

from plumbing.knobs import UserError

TRAINERS = ("train_gpt.py", "train_gpu.py", "train_scaled.py", "train_arith.py")
# What a dry run may miss here, since a test has no network, no data and no GPU.
ABSENT = re.compile(
    r"no token shards match|cannot be read|the hub|no answer|is not here|sees no CUDA|pyarrow|"
    r"neither wikitext|no text there|wikipedia|fla-core|package fla|needs a GPU|no such checkpoint"
)


def test_the_documents_hold_commands_of_every_trainer_and_of_the_tools():
    text = "\n".join(line for _, line in COMMANDS)
    assert len(COMMANDS) > 60
    for program in (*TRAINERS, "scripts/doctor.py", "scripts/status.py", "scripts/evaluate.py"):
        assert program in text, program


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
    if document == "changing.md":  # of a changed trainer; tests/gpt/test_changing.py has them
        return
    if program in TRAINERS and "--help" not in arguments:
        assert dry_run(monkeypatch, tmp_path, program, env, arguments) == ""
