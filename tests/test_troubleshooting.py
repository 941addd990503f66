"""docs/troubleshooting.md: the messages that it explains are ones that a program prints."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
# Python, torch or torchrun says these.
NOT_OURS = ("ChildFailedError", "Setting OMP_NUM_THREADS", "run.py: error", "No such file")
# Values that stand in the page's messages, where a program puts in its own.
EXAMPLES = (
    r"'[^']*'|(?<==)\S+|\S*\d\S*|wandb|tabs|a figure|matplotlib|--format hf|transformers"
    r"|--harness|lm_eval|(?<=\()finished|n/a|VAL_TOKENS|(?<=has )train_gpt.py"
)


def explained_messages() -> list[str]:
    """The first column of the page's tables of messages, a piece of code each."""
    messages = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            messages += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return [message for message in messages if not message.startswith(NOT_OURS)]


def printed_strings() -> Iterator[str]:
    """The strings of all programs, with "..." where a value is put in."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("scripts/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else " ... " for v in node.values]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def runs_of_words(text: str, size: int) -> set[tuple[str, ...]]:
    """Words in a row, with no "..." between them."""
    runs = set()
    for piece in text.split("..."):
        words = re.findall(r"[A-Za-z_]+", piece)
        runs |= {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
    return runs


def test_every_explained_message_has_words_in_a_row_that_a_program_prints():
    """Three of them, or as many as stand together where there are fewer."""
    printed = {size: set() for size in (3, 2, 1)}
    for text in printed_strings():
        for size, runs in printed.items():
            runs |= runs_of_words(text, size)
    unknown = []
    for message in explained_messages():
        # An example's value stands where a program puts one in.
        plain = re.sub(EXAMPLES, " ... ", message)
        sizes = [size for size in printed if runs_of_words(plain, size)]
        if sizes and not runs_of_words(plain, sizes[0]) & printed[sizes[0]]:
            unknown.append(message)
    assert not unknown, "no program prints these; correct docs/troubleshooting.md"
