"""documents.py -- the commands that README.md and docs/ show, taken apart."""

import re
import shlex
from pathlib import Path

from support import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Words in front of the program that say how it is started.
STARTERS = {"nohup", "sudo", "time", "exec", "scripts/launch.sh", "env"}


def commands_of(path: Path) -> list[str]:
    """Lines of code blocks, joined where they go on, and code in running text that is a command;
    one that goes on after && is several.
    """
    text = path.read_text()
    text = re.sub(r"^```(?:python|diff|toml|json)\n.*?^```", "", text, flags=re.M | re.S)
    blocks = re.findall(r"^(?: {4}|> )(\S.*)$", text.replace("\\\n", " "), re.M)
    for fenced in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        blocks += fenced.replace("\\\n", " ").splitlines()
    inline = re.findall(r"`((?:[A-Z_]+=\S+ )*(?:python|torchrun|make|scripts/)[^`]*)`", text)
    lines = [part.strip() for line in [*blocks, *inline] for part in line.split(" && ")]
    return [line for line in lines if is_command(line)]


def is_command(line: str) -> bool:
    start = re.match(
        r"(?:[A-Z_]+=\S+ )*(?:nohup |time |scripts/launch\.sh )?"
        r"(python3?|\S*/python|torchrun|make|scripts/\S+\.sh|sbatch) ",
        line + " ",
    )
    return start is not None and "<" not in line


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
