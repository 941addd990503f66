"""splits.py -- one text as training, validation and test data.

Promises that the same text gives the same parts on every machine, that no paragraph is in two of
them, and that files which say by their names what they are for (train, val or valid, test) are
taken at their word. The text is checked as texts.py says. What is downloaded or made lies under the
data folder, whole or not at all, and is used again.

    open_splits        train, val and test as token shards, with their counts of words and bytes
    open_byte_files    training and validation text as files that are mapped byte by byte
"""

import hashlib
import importlib.util
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.data import TokenShards, read_bytes, write_shard
from plumbing.hub import hub_fetch, hub_list
from plumbing.knobs import UserError
from plumbing.leaks import check_disjoint, check_texts_disjoint
from plumbing.plain_text import check_text, clean_copy, read_text
from plumbing.texts import build_once, embedded_corpus, encoder, text_files, writable_folder

WIKITEXT, WIKITEXT_REPO = ("wikitext-2", "wikitext-103"), "Salesforce/wikitext"
WIKIPEDIA_REPO, WIKIPEDIA_DUMP = "wikimedia/wikipedia", "20231101"
SHORTEST_ARTICLE = 1000  # characters, as in the program that train_scaled.py follows
NAMES = {"train": "train|training", "val": "val|valid|validation|dev", "test": "test"}
# Parts of a text, as shares of the hashes of its paragraphs. The figures in docs/ depend on them.
SHARES_OF_THREE = {"val": 13 / 256, "test": 13 / 256, "train": 230 / 256}
SHARES_OF_TWO = {"train": 0.95, "val": 0.05}
SHARES_OF_WIKIPEDIA = {"train": 0.99, "val": 0.005, "test": 0.005}


@dataclass(frozen=True)
class Split:
    """One part of a text: its tokens, and how many words (with line ends, as WikiText's tables
    count them) and bytes they stand for."""

    shards: TokenShards
    words: int
    bytes: int


class NotFetched(UserError):
    """A text that is not here, but that a run would fetch: no reason not to start one."""


# ----------------------------------------------------------------------------
# Parts by name, parts by hash


def is_named(path: str, part: str) -> bool:
    """Whether a file's name says that it is of this part, such as wiki.valid.raw of "val"."""
    name = Path(path).name.lower()
    return re.search(rf"(^|[._-])({NAMES[part]})([._-]|$)", name) is not None


def parts_by_name(paths: Iterable[str]) -> dict[str, list[str]]:
    """The files of each part. What is named neither validation nor test is training text."""
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for path in paths:
        if is_named(path, "val"):
            parts["val"].append(path)
        elif is_named(path, "test"):
            parts["test"].append(path)
        else:
            parts["train"].append(path)
    return parts


def part_of(piece: bytes, shares: dict[str, float]) -> str:
    """The part into which the hash of this piece falls, so that equal pieces are of one part."""
    place = int.from_bytes(hashlib.sha256(piece).digest()[:4], "big") / 2**32
    ends = np.cumsum(list(shares.values()))
    index = int(np.searchsorted(ends, place, "right"))
    return list(shares)[min(index, len(shares) - 1)]


def paragraphs(text: str) -> Iterator[str]:
    """What blank lines separate."""
    for paragraph in re.split(r"\n[ \t]*\n+", text):
        if paragraph.strip():
            yield paragraph


def byte_pieces(paths: Iterable[str]) -> Iterator[bytes]:
    """The files' paragraphs with the blank line behind each, so that nothing is lost; text without
    blank lines in pieces of whole lines, 4 KiB or a bit more."""
    for path in paths:
        lines: list[bytes] = []
        size = 0
        with open(path, "rb") as file:
            while line := file.readline(1 << 16):
                lines.append(line)
                size += len(line)
                if not line.strip() or size >= 4096:
                    yield b"".join(lines)
                    lines, size = [], 0
        if lines:
            yield b"".join(lines)


def write_parts(
    folder: Path, pieces: Iterable[bytes], shares: dict[str, float], separator: bytes
) -> None:
    """Write each piece to the file of its part: train.txt, val.txt, ..."""
    files = {part: open(folder / f"{part}.txt", "wb") for part in shares}
    try:
        for piece in pieces:
            files[part_of(piece, shares)].write(piece + separator)
    finally:
        for file in files.values():
            file.close()


# ----------------------------------------------------------------------------
# Folders under data/


def _key_of(*recipe: object, paths: Iterable[str]) -> str:
    """Twelve digits that change with the recipe and with the files."""
    facts = [[os.path.abspath(p), os.path.getsize(p), os.stat(p).st_mtime_ns] for p in paths]
    return hashlib.sha256(json.dumps([*recipe, facts]).encode()).hexdigest()[:12]


def _made(data_folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name`, from the data folder if it is there, else made where one can write."""
    if (data_folder / name).exists():
        return data_folder / name
    return build_once(writable_folder(data_folder) / name, make)


# ----------------------------------------------------------------------------
# Texts of the hub


def wikitext_files(name: str, data_folder: Path, download: bool = True) -> dict[str, list[str]]:
    """Files of wikitext-2 or wikitext-103 (raw) by part, downloaded unless they are there. Raises
    NotFetched where they would have to be downloaded and must not."""
    folder_name = f"{name}-raw-v1"
    if not download and not (data_folder / folder_name).exists():
        raise NotFetched(
            f"{data_folder / folder_name} is not there yet; a run downloads it from the hub "
            f"({WIKITEXT_REPO})"
        )

    def fetch(aside: Path) -> None:
        for file in hub_list(WIKITEXT_REPO, f"{folder_name}/"):
            hub_fetch(WIKITEXT_REPO, file, aside / Path(file).name)

    folder = _made(data_folder, folder_name, fetch)
    found = _complete_set(folder)
    if not found:
        raise UserError(
            f"{folder}: no files of train, valid and test among {sorted(os.listdir(folder))}; "
            f"delete it"
        )
    return found


def _complete_set(folder: Path) -> dict[str, list[str]]:
    """Files of train, val and test in a folder, of one kind; {} where a part is missing. WikiText
    comes as .raw, as .tokens, or from the hub as .parquet."""
    for suffix in (".raw", ".tokens", ".parquet", ".txt"):
        paths = sorted(str(p) for p in folder.glob(f"*{suffix}") if p.is_file())
        parts = parts_by_name(paths)
        if all(parts.values()):
            return parts
    return {}


def clean_article(text: str) -> str:
    """One article of Wikipedia in NFC: bracketed references and tags deleted, spaces joined within
    paragraphs, which are kept."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"\[[^\[\]]*\]", "", text)
    text = re.sub(r"<[^<>]*>", "", text)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def _articles(paths: Iterable[Path]) -> Iterator[bytes]:
    """The articles in parquet files of a dump that are long enough."""
    import pyarrow.parquet  # optional: only this needs it

    for path in paths:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000, columns=["text"])
        for batch in batches:
            for text in map(clean_article, batch.column("text").to_pylist()):
                if len(text) >= SHORTEST_ARTICLE:
                    yield text.encode("utf-8", "replace")


def wikipedia_folder(language: str, data_folder: Path, download: bool = True) -> Path:
    """Folder with train.txt, val.txt and test.txt of a language's Wikipedia, parted by the hash of
    the article, made once. The dump's parquet files are downloaded (resumably), read and kept."""
    if not re.fullmatch(r"[a-z][a-z_-]{1,15}", language):
        raise UserError(
            f"DATA=wikipedia:{language}: expected a language code, such as wikipedia:tr"
        )
    name = f"wikipedia-{WIKIPEDIA_DUMP}.{language}"
    if (data_folder / name).exists():
        return data_folder / name
    if not download:
        raise NotFetched(
            f"{data_folder / name} is not there yet; a run downloads it from the hub "
            f"({WIKIPEDIA_REPO})"
        )
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "DATA=wikipedia needs pyarrow to read the dump; pip install pyarrow, or set DATA to a "
            "text file"
        )
    place = writable_folder(data_folder)

    def make(folder: Path) -> None:
        files = hub_list(WIKIPEDIA_REPO, f"{WIKIPEDIA_DUMP}.{language}/")
        files = [file for file in files if file.endswith(".parquet")]
        paths = [place / "parquet" / file for file in files]
        for file, path in zip(files, paths, strict=True):
            if not path.exists():
                print(f"downloading {file}", flush=True)
                hub_fetch(WIKIPEDIA_REPO, file, path)
        write_parts(folder, _articles(paths), SHARES_OF_WIKIPEDIA, b"\n\n")

    return build_once(place / name, make)


# ----------------------------------------------------------------------------
# Three parts, tokenized


def open_splits(
    data: str, tokenizer: str, data_folder: Path, download: bool = True
) -> dict[str, Split]:
    """Parts "train", "val" and "test" of a text as token shards, made once per text and tokenizer.

    `data` is wikitext-2, wikitext-103, embedded (or bytes), or a text file, folder or pattern. A
    folder with files of all three parts is parted by their names; of other text about 5% of the
    paragraphs, by their hash, are validation, and as many are test. Raises UserError for a text
    that is not there, is no text, or is too short.
    """
    if data in ("embedded", "bytes"):
        train, val, _ = embedded_corpus(data_folder)
        files = {"train": TokenShards(train).paths, "val": TokenShards(val).paths}
        read = _embedded_parts
    elif data in WIKITEXT:
        files, read = wikitext_files(data, data_folder, download), _named_parts
    elif re.fullmatch(r"[^/*.]+", data) and not Path(data).exists():
        raise UserError(
            f"DATA={data}: neither {', '.join(WIKITEXT)}, embedded nor bytes, nor a file or folder"
        )
    elif named := _complete_set(Path(data)):
        files, read = named, _named_parts
    else:
        files, read = {"all": text_files(data)}, _hashed_parts
    paths = [path for part in files.values() for path in part]

    def make(aside: Path) -> None:
        encode = encoder(tokenizer)
        texts = read(files)
        if short := [part for part, text in texts.items() if len(text) < 2]:
            raise UserError(
                f"DATA={data}: nothing is left for {', '.join(short)}; use a longer text"
            )
        counts = {}
        for part, text in texts.items():
            write_shard(aside / f"{part}_000000.bin", encode(text))
            words = len(text.split()) + text.count("\n")
            counts[part] = {"words": words, "bytes": len(text.encode())}
        (aside / "counts.json").write_text(json.dumps(counts))

    key = _key_of("recipe 3", tokenizer, paths=paths)
    folder = _made(data_folder, f"text-{tokenizer}-{key}", make)
    counts = json.loads((folder / "counts.json").read_text())
    splits = {}
    for part, facts in counts.items():
        shards = TokenShards([str(folder / f"{part}_000000.bin")])
        splits[part] = Split(shards, facts["words"], facts["bytes"])
    return splits


def _embedded_parts(files: dict[str, list[str]]) -> dict[str, str]:
    """The embedded corpus has two parts: the second half of its validation text is the test."""
    texts = {}
    for part, paths in files.items():
        shards = TokenShards(paths)
        stream = shards.read(0, shards.total).astype(np.uint8)
        texts[part] = bytes(stream).decode("utf-8", "replace")
    middle = texts["val"].index("\0", len(texts["val"]) // 2)
    return {"train": texts["train"], "val": texts["val"][:middle], "test": texts["val"][middle:]}


def _named_parts(files: dict[str, list[str]]) -> dict[str, str]:
    texts = {part: "".join(read_text(path) for path in paths) for part, paths in files.items()}
    check_texts_disjoint(files, texts)
    return texts


def _hashed_parts(files: dict[str, list[str]]) -> dict[str, str]:
    """Paragraphs by their hash, in the order of the text."""
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for path in files["all"]:
        for paragraph in paragraphs(read_text(path)):
            parts[part_of(paragraph.encode(), SHARES_OF_THREE)].append(paragraph)
    return {part: "\n\n".join(found) + "\n" for part, found in parts.items()}


# ----------------------------------------------------------------------------
# Two parts, as bytes


def split_files(data: str, data_folder: Path) -> tuple[list[str], list[str]]:
    """Training and validation files of a text file, folder or pattern.

    A file named val, valid, validation or dev, among them or beside a single train file, is the
    validation text, and test files are left alone; else 5% of the paragraphs, by hash, in a copy.
    """
    files = text_files(data)
    for path in files:
        if os.path.getsize(path) == 0:
            raise UserError(f"{path}: an empty file; expected text")
    parts = parts_by_name(files)
    if len(files) == 1 and is_named(files[0], "train"):
        parts["val"] = parts_by_name(text_files(Path(files[0]).parent))["val"]
    if parts["train"] and parts["val"]:
        train = [_mappable(path, data_folder) for path in parts["train"]]
        return train, [_mappable(path, data_folder) for path in parts["val"]]

    def make(folder: Path) -> None:
        pieces = byte_pieces(_mappable(path, data_folder) for path in files)
        write_parts(folder, pieces, SHARES_OF_TWO, b"")

    home = _made(data_folder, f"split-{_key_of('recipe 2', paths=files)}", make)
    return [str(home / "train.txt")], [str(home / "val.txt")]


def _mappable(path: str, data_folder: Path) -> str:
    """The file, or a copy of it without byte order mark and with LF line ends, to be mapped."""
    if check_text(path):
        return path
    name = Path(path).name
    key = _key_of("clean", paths=[path])
    return str(
        _made(data_folder, f"clean-{key}", lambda aside: clean_copy(path, aside / name)) / name
    )


def open_byte_files(
    data: str, data_folder: Path, least: int = 1, download: bool = True
) -> tuple[TokenShards, TokenShards, str]:
    """Training text, validation text, and the SHA-256 of the embedded corpus ('' for other data).

    `data` is embedded, wikipedia:tr (any language code), or a text file, folder or pattern. The
    validation text has more than `least` bytes.
    """
    if data == "embedded":
        train, val, sha = embedded_corpus(data_folder)
        return TokenShards(train), TokenShards(val), sha
    source = data
    if data.startswith("wikipedia:"):
        language = data.removeprefix("wikipedia:")
        source = str(wikipedia_folder(language, data_folder, download))
    train, val = split_files(source, data_folder)
    if os.path.getsize(val[0]) <= least:
        raise UserError(
            f"{data}: its validation part has {os.path.getsize(val[0])} bytes; use more text, or "
            f"put a file val.txt beside it"
        )
    hint = "set DATA to a text file, a folder, a pattern, wikipedia:tr or embedded"
    train_shards = TokenShards(train, hint, open_file=read_bytes)
    val_shards = TokenShards(val, hint, open_file=read_bytes)
    check_disjoint(train_shards, val_shards)
    return train_shards, val_shards, ""
