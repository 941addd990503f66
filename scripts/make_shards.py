"""make_shards.py -- text files of your own to token shards the trainers read.

    python scripts/make_shards.py book.txt --tokenizer bytes --out data/book
    python scripts/make_shards.py corpus/ --tokenizer gpt2 --split file --out data/corpus

Writes NAME_train_000001.bin, ... and NAME_val_000000.bin into --out and prints the settings to train on them.
Documents are what empty lines separate (--split paragraph, the default: it finds many even in one file), or
whole files (--split file: keeps the chapters of a book together). Before every document stands a separator
token: 50256 for gpt2, byte 0 for bytes. A document's SHA-256 puts it into training or validation, so equal
documents are never on both sides and the same text always gives the same shards. Memory: one shard per side
and one document. Nothing appears under its final name until everything is tokenized.
Raises   UserError naming file and line: nothing to read, not UTF-8, no tokenizer, shards in the way
"""

import argparse
import hashlib
import os
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from lib.runs import GPT2  # and with it the repository's root is on the path

from plumbing import UserError, launch, write_shard

Encode = Callable[[str], "list[int] | bytes"]


# name -> (how to make the encoder, separator token, the VOCAB_SIZE to train with)
TOKENIZERS = {
    "gpt2": (lambda: GPT2().encode, GPT2.separator, 50304),
    "bytes": (lambda: str.encode, 0, 256),
}


def text_files(given: list[Path]) -> list[Path]:
    """The files named, and each .txt below the folders named, in name order. Raises UserError for none."""
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
    """The file's documents, without the empty lines between them. Raises UserError at the first bad line."""
    lines: list[str] = []
    with open(path, "rb") as f:
        for number, raw in enumerate(f, 1):
            if b"\0" in raw:
                raise UserError(
                    f"{path}: line {number} has a zero byte, this is no text file; leave it out"
                )
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: line {number} is not UTF-8 (byte 0x{raw[error.start]:02x}, {error.reason}); "
                    f"convert it, for example: iconv -f latin1 -t utf-8 {path.name} > new.txt"
                ) from None
            if split == "paragraph" and not line.strip():
                if lines:
                    yield "".join(lines).rstrip("\r\n")
                lines = []
            else:
                lines.append(line)
    if "".join(lines).strip():
        yield "".join(lines) if split == "file" else "".join(lines).rstrip("\r\n")


class Side:
    """Shards of one side, train or val: fills one, writes it, goes on to the next."""

    def __init__(self, folder: Path, stem: str, first: int, shard_tokens: int):
        self.folder, self.stem, self.number, self.shard_tokens = folder, stem, first, shard_tokens
        self.buffer = array("H")
        self.num_documents = self.num_tokens = 0
        self.names: list[str] = []

    def add(self, separator: int, tokens: list[int] | bytes) -> None:
        self.buffer.append(separator)
        self.buffer.extend(tokens)
        self.num_documents += 1
        self.num_tokens += 1 + len(tokens)
        while (
            len(self.buffer) >= self.shard_tokens
        ):  # documents run on over the edge, as in FineWeb
            self._write(self.shard_tokens)

    def close(self) -> None:
        if self.buffer:
            self._write(len(self.buffer))

    def _write(self, num_tokens: int) -> None:
        self.names.append(f"{self.stem}_{self.number:06d}.bin")
        write_shard(self.folder / self.names[-1], np.frombuffer(self.buffer, np.uint16, num_tokens))
        self.buffer = self.buffer[num_tokens:]
        self.number += 1


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "text", nargs="+", type=Path, metavar="TEXT", help="UTF-8 files, or folders of .txt files"
    )
    p.add_argument("--tokenizer", choices=sorted(TOKENIZERS), required=True)
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument(
        "--split", choices=("paragraph", "file"), default="paragraph", help="what one document is"
    )
    p.add_argument(
        "--val-fraction", type=float, default=0.1, help="of the documents, about (default 0.1)"
    )
    p.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens per full shard")
    p.add_argument("--name", help="first part of the file names (default: the name of DIR)")
    a = p.parse_args(argv)
    if not 0 < a.val_fraction < 1:
        raise UserError(
            f"--val-fraction {a.val_fraction}: expected a number between 0 and 1, such as 0.1"
        )
    if a.shard_tokens < 1:
        raise UserError(f"--shard-tokens {a.shard_tokens}: expected 1 or more, such as 100000000")
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
    files = text_files(a.text)
    make, separator, vocab_size = TOKENIZERS[a.tokenizer]
    encode = make()

    try:
        a.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {a.out}: {error}; choose another folder") from None
    with tempfile.TemporaryDirectory(dir=a.out, prefix=".make_shards-") as aside:
        train, val = (
            Side(Path(aside), stem, 1 - k, a.shard_tokens) for k, stem in enumerate(stems)
        )
        for path in files:
            for text in documents(path, a.split):
                place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
                (val if place < a.val_fraction else train).add(separator, encode(text))
        for side, what in ((train, "training"), (val, "validation")):
            side.close()
            if not side.num_documents:
                found = f"{train.num_documents + val.num_documents} documents in {len(files)} files"
                raise UserError(
                    f"{found}, none for {what}; give more text, change --val-fraction, or split by paragraph"
                )
        for shard in train.names + val.names:
            os.replace(Path(aside) / shard, a.out / shard)

    for side, what in ((train, "training"), (val, "validation")):
        shards = ", ".join(side.names)
        print(f"{what}: {side.num_documents:,} documents, {side.num_tokens:,} tokens: {shards}")
    patterns = [f"{a.out}/{stem}_*.bin" for stem in stems]
    print(f"INPUT_BIN='{patterns[0]}' INPUT_VAL_BIN='{patterns[1]}' VOCAB_SIZE={vocab_size}")


if __name__ == "__main__":
    launch(main)
