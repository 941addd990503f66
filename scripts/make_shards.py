"""make_shards.py -- text files of your own as token shards that the trainers read.

    python scripts/make_shards.py book.txt --tokenizer bytes --out data/book
    python scripts/make_shards.py corpus/ --tokenizer gpt2 --split file --out data/corpus
    python scripts/make_shards.py dump.txt --tokenizer gpt2 --split '<|endoftext|>' --out data/dump

Writes NAME_train_000001.bin, ... and NAME_val_000000.bin into --out and prints the settings to
train on them. Documents are what empty lines separate (--split paragraph, the default: it finds
many even in one file), whole files (--split file: keeps the chapters of a book together), or what
lines that hold a marker separate (--split MARKER). Before every document stands a separator token:
50256 for gpt2, byte 0 for bytes. A document's SHA-256 puts it into training or validation, so equal
documents are never on both sides and the same text always gives the same shards. The text is UTF-8;
a byte order mark is dropped and line ends become LF. Memory: one shard per side and one document.
Nothing appears under its final name until everything is tokenized.
Raises   UserError naming file and line: nothing to read, not UTF-8, no tokenizer, shards in the way
"""

import argparse
import hashlib
import os
import re
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plumbing.data import write_shard
from plumbing.knobs import UserError
from plumbing.plain_text import check_text
from plumbing.texts import Tokenizer, tokenizer
from plumbing.world import launch

SPECIAL = re.compile(r"<\|\w+\|>")  # what tokenizers of this family write their special tokens as


def text_files(given: list[Path]) -> list[Path]:
    """The files named, and each .txt below the folders named, in name order. Raises UserError for
    none."""
    files = []
    for path in given:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        files += sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"no .txt file in {' or '.join(map(str, given))}; name the files themselves"
        )
    return files


def documents(path: Path, split: str) -> Iterator[str]:
    """The file's documents, without the lines that separate them. Raises UserError, before the
    first one, for a file that is no UTF-8 text."""
    check_text(path)
    if split == "file":
        text = "".join(open_lines(path))
        if text.strip():
            yield text
        return
    marker = "" if split == "paragraph" else split
    lines: list[str] = []
    for line in open_lines(path):
        if line.strip() != marker:
            lines.append(line)
            continue
        if "".join(lines).strip():
            yield "".join(lines).strip("\n")
        lines = []
    if "".join(lines).strip():
        yield "".join(lines).strip("\n")


def open_lines(path: Path) -> Iterator[str]:
    """The lines of a text, without a byte order mark and with LF at their ends."""
    with open(path, encoding="utf-8-sig", newline=None) as file:
        yield from file


class Side:
    """Shards of one side, train or val: fills one, writes it, goes on to the next."""

    def __init__(self, folder: Path, stem: str, first: int, shard_tokens: int):
        self.folder, self.stem, self.number, self.shard_tokens = folder, stem, first, shard_tokens
        self.buffer = array("H")
        self.num_documents = self.num_tokens = 0
        self.names: list[str] = []

    def add(self, separator: int, tokens_N: np.ndarray) -> None:
        self.buffer.append(separator)
        self.buffer.frombytes(tokens_N.tobytes())
        self.num_documents += 1
        self.num_tokens += 1 + len(tokens_N)
        # documents run on over the edge of a shard, as in FineWeb
        while len(self.buffer) >= self.shard_tokens:
            self._write(self.shard_tokens)

    def close(self) -> None:
        if self.buffer:
            self._write(len(self.buffer))

    def _write(self, num_tokens: int) -> None:
        self.names.append(f"{self.stem}_{self.number:06d}.bin")
        write_shard(self.folder / self.names[-1], np.frombuffer(self.buffer, np.uint16, num_tokens))
        self.buffer = self.buffer[num_tokens:]
        self.number += 1


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "text", nargs="+", type=Path, metavar="TEXT", help="UTF-8 files, or folders of .txt files"
    )
    p.add_argument("--tokenizer", choices=("bytes", "gpt2"), required=True)
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument(
        "--split",
        default="paragraph",
        metavar="{paragraph,file,MARKER}",
        help="what one document is: what empty lines separate, a file, or what lines that hold "
        "MARKER separate, such as '<|endoftext|>' (default paragraph)",
    )
    p.add_argument(
        "--val-fraction", type=float, default=0.1, help="of the documents, about (default 0.1)"
    )
    p.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens per full shard")
    p.add_argument("--name", help="first part of the file names (default: the name of DIR)")
    return p


def check_options(a: argparse.Namespace) -> None:
    """Raises UserError for a value out of range."""
    if not 0 < a.val_fraction < 1:
        raise UserError(
            f"--val-fraction {a.val_fraction}: expected a number between 0 and 1, such as 0.1"
        )
    if a.shard_tokens < 1:
        raise UserError(f"--shard-tokens {a.shard_tokens}: expected 1 or more, such as 100000000")
    if not a.split.strip():
        raise UserError("--split '': expected paragraph, file, or a marker such as '<|endoftext|>'")


def stems_of(a: argparse.Namespace) -> list[str]:
    """What the names of training and of validation shards begin with. Raises UserError for a name
    that no file can have, and where there are such shards already."""
    name = a.name or a.out.resolve().name
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(
            f"--name {name!r}: expected letters, digits, '_', '-', '.'; it becomes file names"
        )
    stems = [f"{name}_train", f"{name}_val"]
    if found := sorted(x.name for stem in stems for x in a.out.glob(f"{stem}_*.bin")):
        raise UserError(
            f"{a.out}: already has {', '.join(found[:3])}; delete them or choose another --name"
        )
    return stems


def fill(
    sides: Sequence[Side], files: Sequence[Path], a: argparse.Namespace, tokens: Tokenizer
) -> Counter[str]:
    """Tokenize every document into its side, training or validation; returns in how many
    documents each special token stands. Raises UserError when a side gets none."""
    train, val = sides
    specials: Counter[str] = Counter()
    for path in files:
        for text in documents(path, a.split.strip()):
            specials.update(set(SPECIAL.findall(text)))
            place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
            side = val if place < a.val_fraction else train
            side.add(tokens.separator, tokens.encode(text))
    for side, what in ((train, "training"), (val, "validation")):
        side.close()
        if not side.num_documents:
            found = f"{train.num_documents + val.num_documents} documents in {len(files)} files"
            raise UserError(
                f"{found}, none for {what}; give more text, change --val-fraction, or split by "
                f"paragraph"
            )
    return specials


def main(argv: list[str] | None = None) -> None:
    a = parser().parse_args(argv)
    check_options(a)
    stems = stems_of(a)
    files = text_files(a.text)
    tokens = tokenizer(a.tokenizer)
    try:
        a.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {a.out}: {error}; choose another folder") from None
    with tempfile.TemporaryDirectory(dir=a.out, prefix=".make_shards-") as aside:
        sides = [Side(Path(aside), stem, 1 - k, a.shard_tokens) for k, stem in enumerate(stems)]
        specials = fill(sides, files, a, tokens)
        for side in sides:
            for shard in side.names:
                os.replace(Path(aside) / shard, a.out / shard)

    for name, count in specials.most_common(5):
        print(
            f"{name} stands in {count:,} documents and was taken as plain text; if it separates "
            f"documents, run again with --split '{name}'"
        )
    for side, what in zip(sides, ("training", "validation"), strict=True):
        shards = ", ".join(side.names)
        print(f"{what}: {side.num_documents:,} documents, {side.num_tokens:,} tokens: {shards}")
    patterns = [f"{a.out}/{stem}_*.bin" for stem in stems]
    print(
        f"INPUT_BIN='{patterns[0]}' INPUT_VAL_BIN='{patterns[1]}' VOCAB_SIZE={tokens.padded_size}"
    )


if __name__ == "__main__":
    launch(main)
