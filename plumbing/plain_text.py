"""plain_text.py -- one reader of text files for all programs.

Promises that text is text: UTF-8 is taken, a byte order mark is dropped, and line ends become LF.
The rest is refused in one line with the file, the line, the offset of the byte and what the file
looks like. This module needs nothing but Python, and pyarrow where a file is parquet.
"""

import codecs
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from plumbing.knobs import ROOT, UserError


def _looks_like(data: bytes) -> tuple[str, str]:
    """What bytes that are not UTF-8 text look like, and the name of that encoding for iconv ('' for
    what is no text at all)."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16", "UTF-16"
    zeros = data.count(0)
    if zeros:
        even = data[0::2].count(0)
        if zeros > len(data) // 3 and min(even, zeros - even) < zeros // 20 + 1:
            return (
                "UTF-16 without a byte order mark",
                "UTF-16BE" if even > zeros // 2 else "UTF-16LE",
            )
        return "a binary file, not text", ""
    controls = sum(byte < 32 and byte not in b"\t\n\r\f" for byte in data)
    if controls > len(data) // 50:
        return "a binary file, not text", ""
    if any(0x80 <= byte < 0xA0 for byte in data):
        return "a Windows code page, such as 1252 (or 1254 if Turkish)", "CP1252"
    turkish = sum(data.count(byte) for byte in (0xD0, 0xDD, 0xDE, 0xF0, 0xFD, 0xFE))
    high = sum(byte >= 0x80 for byte in data)
    if turkish > high // 4:
        return "Latin-5 (ISO 8859-9, Turkish)", "ISO-8859-9"
    return "Latin-1 (ISO 8859-1) or another one-byte encoding", "ISO-8859-1"


def _not_text(path: str | Path, where: int, line: int, around: bytes, what: str) -> UserError:
    """The error for a file whose byte at offset `where` is not UTF-8 text."""
    kind, encoding = _looks_like(around)
    remedy = "leave it out"
    if encoding:
        name = Path(path).name
        remedy = f"convert it, for example: iconv -f {encoding} -t UTF-8 '{name}' > new.txt"
    if "unexpected end" in what:
        kind, remedy = "text that is cut in the middle of a character", "copy it again"
    return UserError(
        f"{path}: line {line} {what} (at offset {where:,}); it looks like {kind}: {remedy}"
    )


def check_text(path: str | Path) -> bool:
    """Whether a file is UTF-8 with no byte order mark and LF line ends, as it can be mapped.

    Raises UserError for a file that is not UTF-8, or that has zero bytes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, lines, is_clean = 0, 1, True
    with open(path, "rb") as file:
        while True:
            chunk = file.read(2**20)
            held = decoder.getstate()[0]  # of a character that the last chunk's end cut
            data = held + chunk
            bad, what = data.find(b"\0"), "has a zero byte"
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                if bad < 0 or error.start < bad:
                    bad = error.start
                    what = f"is not UTF-8 (byte 0x{data[bad]:02x}, {error.reason})"
            if bad >= 0:
                around = data[max(bad - 2**15, 0) // 2 * 2 : bad + 2**15]
                line = lines + data.count(b"\n", 0, bad)
                raise _not_text(path, done - len(held) + bad, line, around, what)
            if not chunk:
                return is_clean
            if b"\r" in chunk or (done == 0 and chunk.startswith(codecs.BOM_UTF8)):
                is_clean = False
            done += len(chunk)
            lines += chunk.count(b"\n")


def read_text(path: str | Path) -> str:
    """The text of a file: UTF-8, a byte order mark dropped, line ends LF. Of a parquet file, the
    rows of its column `text`. Raises UserError for anything else."""
    if str(path).endswith(".parquet"):
        return _read_parquet(path)
    check_text(path)
    text = Path(path).read_bytes().decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_lines(
    path: str, parse: Callable[[dict], object], wanted: str, how_to_make: str
) -> list:
    """What `parse` makes of each line of a .jsonl file, looked for here, then in the repository.

    Raises UserError for a file that cannot be read or is empty, with how to make it, and for a line
    that is not `wanted`, such as one for which `parse` has a ValueError.
    """
    place = Path(path) if Path(path).exists() else ROOT / path
    try:
        text = read_text(place).rstrip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {how_to_make}") from None
    if not text:
        raise UserError(f"{path}: no records; {how_to_make}")
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"expected {wanted} ({error!s:.160})"
            raise UserError(f"{path}:{number}: {what}") from None
    return found


def _read_parquet(path: str | Path) -> str:
    """The rows of a parquet file of WikiText, whose empty rows stand for the line ' '."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs the package pyarrow; pip install pyarrow"
        ) from None
    try:
        rows = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except (pyarrow.ArrowInvalid, KeyError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: expected parquet with a column `text` ({what})") from None
    return "".join(row or " \n" for row in rows)


def clean_copy(path: str | Path, target: Path) -> None:
    """Write the text of `path` as UTF-8 without a byte order mark and with LF line ends."""
    with (
        open(path, encoding="utf-8-sig", newline=None) as source,
        open(target, "w", encoding="utf-8", newline="\n") as copy,
    ):
        shutil.copyfileobj(source, copy, 2**20)
