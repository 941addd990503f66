"""texts.py -- text files, the embedded corpus, and the tokenizers.

Text is read by plain_text.py. Promises: a folder that is made from text exists whole or not at all,
however many processes and ranks make it at once. The embedded corpus is Python's own documentation,
so that everything can be tried without a download; splits.py parts text into training, validation
and test.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from filelock import FileLock

from plumbing.checkpoints import fsync_folder, write_whole
from plumbing.data import find_files, write_shard
from plumbing.knobs import UserError

TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .raw .tokens .text .csv .json .jsonl .xml .html .py".split()
)

# ----------------------------------------------------------------------------
# Text files


def text_files(path: str | Path) -> list[str]:
    """The files that `path` names, in name order: a file, a pattern, or the text files anywhere
    below a folder. Raises UserError when there are none."""
    path = str(path)
    if os.path.isdir(path):
        below = (p for p in Path(path).rglob("*") if p.suffix.lower() in TEXT_SUFFIXES)
        found = sorted(str(p) for p in below if p.is_file())
        hint = f"none of its files ends in one of {' '.join(sorted(TEXT_SUFFIXES))}"
    else:
        found = [path] if os.path.isfile(path) else find_files(path)
        found = [p for p in found if os.path.isfile(p)]
        hint = "there is no such file or folder, and as a pattern it matches nothing"
    if not found:
        raise UserError(
            f"{path}: no text there ({hint}); name a text file, a folder of them, or a pattern"
        )
    return found


# ----------------------------------------------------------------------------
# Folders made from text


def writable_folder(folder: Path) -> Path:
    """`folder`, or the user's cache folder with a line that says so where `folder` cannot be
    written, as in a checkout on a read-only disk. Raises UserError if neither can."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatrun"
    problems = []
    for place in (folder, cache_home):
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            problems.append(f"{place} cannot be written ({error.strerror or error})")
            continue
        if problems and os.environ.get("RANK", "0") == "0":
            print(f"{problems[0]}; {place} is used instead", file=sys.stderr, flush=True)
        return place
    raise UserError(f"{'; '.join(problems)}; set XDG_CACHE_HOME to a folder that can be written")


def build_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by make(aside) if it is not there yet.

    It gets its name by one rename when make has returned, so it exists whole or not at all. Several
    processes and ranks may call this at once; one builds, the others wait. Raises UserError when it
    cannot be written.
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.exists():
                aside = folder.parent / f".{folder.name}.part"
                shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
                aside.mkdir()
                make(aside)
                fsync_folder(aside)
                aside.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error}); make room, or choose another"
        ) from None
    return folder


# ----------------------------------------------------------------------------
# The embedded corpus


def _docstrings(stdlib: Path) -> Iterator[str]:
    """The docstrings of the standard library, in the order of its files."""
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = sorted(set(subfolders) - skip)
        for name in sorted(n for n in names if n.endswith(".py")):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in old modules
                    tree = ast.parse(Path(folder, name).read_bytes())
            except (SyntaxError, ValueError):  # templates, and files that are broken on purpose
                continue
            for node in ast.walk(tree):
                if isinstance(
                    node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                ):
                    yield ast.get_docstring(node) or ""  # runs inspect.cleandoc


def _python_text(stdlib: Path) -> Iterator[str]:
    """The English that every Python carries: docstrings, then the topics of pydoc."""
    yield from _docstrings(stdlib)
    try:
        from pydoc_data.topics import topics
    except ImportError:  # stripped; the size check decides whether enough is left
        return
    whole = [topics[key].strip() for key in sorted(topics)]
    for text in whole:
        # A topic that is a section of a longer one, under the same title, is left out.
        body = text.split("\n", 3)[-1]
        if not any(body in other for other in whole if len(other) > len(text)):
            yield text


def _known_corpus(folder: Path, made_from: str) -> tuple[str, str, str] | None:
    """The corpus in `folder` made from the same Python, so that nothing is parsed twice."""
    for note in sorted(folder.glob("embedded-*/made_from.json")):
        patterns = [str(note.parent / f"embedded_{part}_*.bin") for part in ("train", "val")]
        try:
            known = json.loads(note.read_text())
            is_ours = known["made_from"] == made_from
        except (OSError, ValueError, KeyError, TypeError):  # torn, or of something else
            continue
        if is_ours and all(find_files(pattern) for pattern in patterns):
            return patterns[0], patterns[1], known["sha256"]
    return None


def embedded_corpus(folder: Path) -> tuple[str, str, str]:
    """Byte shards of Python's own documentation, built under `folder` unless they are there.

    Returns the patterns of the training and the validation shard and the SHA-256 of the text, which
    differs from one Python version to the next. Byte 0 stands before every document; about 7% of
    the documents, chosen by their hash, are validation. Where `folder` cannot be written, the
    user's cache folder is used. Raises UserError when this Python comes without its sources.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    made_from = f"recipe 1, {sys.version}, {stdlib}"
    if known := _known_corpus(folder, made_from):
        return known
    folder = writable_folder(folder)
    if known := _known_corpus(folder, made_from):
        return known

    texts = (t.replace("\0", "").encode("utf-8", "replace") for t in _python_text(stdlib))
    # In the order of their hashes, so that one part of the stream is like another.
    docs = sorted((hashlib.sha256(t).digest(), t) for t in {t for t in texts if len(t) > 80})
    corpus = b"".join(b"\0" + text for _, text in docs)
    if len(corpus) < 500_000:
        raise UserError(
            f"{stdlib}: {len(corpus):,} bytes of documentation, about 1.9 million expected; this "
            f"Python is without its sources. Use another one, or make shards of any text with "
            f"scripts/make_shards.py"
        )
    sha = hashlib.sha256(corpus).hexdigest()
    home = folder / f"embedded-{sha[:12]}"
    for part, is_val in (("train", False), ("val", True)):
        stream = b"".join(b"\0" + text for digest, text in docs if (digest[-1] < 18) == is_val)
        tokens_N = np.frombuffer(stream, np.uint8).astype(np.uint16)
        write_shard(home / f"embedded_{part}_000000.bin", tokens_N)
    facts = json.dumps(dict(sha256=sha, made_from=made_from))
    write_whole(home / "made_from.json", facts.encode())
    return str(home / "embedded_train_*.bin"), str(home / "embedded_val_*.bin"), sha


# ----------------------------------------------------------------------------
# Tokenizers


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Special tokens in a text are plain text."""

    name: str
    size: int  # ids
    padded_size: int  # ids, to a multiple of 64: the VOCAB_SIZE to train with
    separator: int  # the id that stands before every document
    encode: Callable[[str], np.ndarray]  # (N,) uint16
    piece: Callable[[int], bytes]  # the bytes of one id


def _pieces(text: str) -> Iterator[str]:
    """Long text in pieces of about a million characters that begin with the space before a word,
    where a token of the whole text begins too, so that cutting changes no token."""
    boundary = re.compile(r"(?<=\S) (?=[A-Za-z])")
    start = 0
    while start < len(text):
        cut = boundary.search(text, start + 2**20)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


@cache
def tokenizer(name: str) -> Tokenizer:
    """The tokenizer "bytes" (a token is a byte) or "gpt2" (GPT-2's byte-pair encoding, by
    tiktoken). Raises UserError where tiktoken or its files are not there."""
    if name == "bytes":
        encode = lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
        return Tokenizer("bytes", 256, 256, 0, encode, lambda token: bytes([token]))
    assert name == "gpt2", name
    try:
        import tiktoken

        gpt2 = tiktoken.get_encoding("gpt2")
    except (ImportError, OSError, ValueError) as error:  # no package, no network, a broken file
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"the gpt2 tokenizer is not here ({type(error).__name__}: {what}); tiktoken downloads "
            f"its two files once: run this where there is a network, copy the folder that "
            f"TIKTOKEN_CACHE_DIR names, and set TIKTOKEN_CACHE_DIR to the copy; or choose "
            f"TOKENIZER=bytes (--tokenizer bytes)"
        ) from None

    def encode_gpt2(text: str) -> np.ndarray:
        parts = [np.array(gpt2.encode_ordinary(piece), np.uint16) for piece in _pieces(text)]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint16)

    piece = gpt2.decode_single_token_bytes
    return Tokenizer("gpt2", 50257, 50304, 50256, encode_gpt2, piece)


def encoder(name: str) -> Callable[[str], np.ndarray]:
    """Text to uint16 tokens, by the tokenizer "bytes" or "gpt2"."""
    return tokenizer(name).encode
