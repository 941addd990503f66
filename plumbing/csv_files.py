"""csv_files.py -- one way to read the CSV files that runs share, for trainers and for tables.

Promises that trainers and the programs of scripts/ take the same files: UTF-8 with or without a
byte order mark, lines that end in LF or CRLF, fields in quotes or not. A file that a spreadsheet
has saved in another way is named as what it is, with what to do, and is never half understood. This
module needs nothing but Python.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from plumbing.knobs import UserError

SAVE_AS = "save it as CSV in UTF-8 with commas and decimal points, or name another file"
# What a row of results is useless without.
NEEDED = ("run_id", "seed", "final_val_loss")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def csv_lines(path: Path, data: bytes) -> list[str]:
    """The lines of a CSV file without their ends. Bytes that are no text become U+FFFD, so that a
    row that a crash tore costs only itself. Raises UserError for a file that is no such text.
    """
    if data.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise UserError(f"{path}: is a spreadsheet's own file (.xlsx, .ods or .xls); {SAVE_AS}")
    if data.startswith(b"\x1f\x8b"):
        raise UserError(f"{path}: is compressed with gzip; decompress it with gunzip")
    head = data[:200]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or 0 < len(head) < 4 * head.count(0):
        raise UserError(f"{path}: is UTF-16, as spreadsheets save 'Unicode text'; {SAVE_AS}")
    text = data.decode("utf-8-sig", errors="replace")
    lines = text.split("\n")
    if "\r" in lines[0].rstrip("\r"):
        raise UserError(f"{path}: its lines end in CR alone, as old Macs ended them; {SAVE_AS}")
    return [line.rstrip("\r") for line in lines]


def header_line(lines: Sequence[str]) -> str:
    """The first line that is not blank; '' where there is none, as in an empty file."""
    return next((line for line in lines if line.strip()), "")


def csv_fields(line: str) -> list[str]:
    """The fields of one line; none where a quote is open or out of place."""
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True))
    except (csv.Error, StopIteration):
        return []


def header_fields(path: Path, line: str, needed: Sequence[str], number: int = 1) -> list[str]:
    """The names in a header, which has to have the `needed` ones. Raises UserError, which names
    what the line is instead.
    """
    names = csv_fields(line)
    where = f"{path}: line {number}"
    missing = [name for name in needed if name not in names]
    if missing:
        if problem := _other_writing(line, names, missing):
            raise UserError(f"{where} {problem}; {SAVE_AS}")
        raise UserError(f"{where} is not a header of results, it has no {', '.join(missing)}")
    if any(name != name.strip() for name in names):
        raise UserError(f"{where} has spaces around its names; {SAVE_AS}")
    if blank := sum(not name.strip() for name in names):
        raise UserError(f"{where} has {blank} column(s) without a name; {SAVE_AS}")
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise UserError(f"{where} names {', '.join(twice)} twice")
    return names


def _other_writing(line: str, names: Sequence[str], missing: Sequence[str]) -> str:
    """How a header says the missing names in another way; '' if it does not."""
    if line.lower().startswith("sep="):
        return "is a spreadsheet's word for the separator, not a header"
    for separator, word in SEPARATORS.items():
        if _squeezed(missing[0]) in map(_squeezed, line.split(separator)) and separator in line:
            return f"has its fields separated by {word}, not by commas"
    if missing[0] in [found.strip() for found in names]:
        return "has spaces around its names"
    by_squeezed = {_squeezed(found): found for found in names}
    if found := by_squeezed.get(_squeezed(missing[0])):
        return f"writes {found.strip()!r} for the column {missing[0]!r}"
    return ""


def _squeezed(name: str) -> str:
    """A name without what spreadsheets and people change."""
    return "".join(c for c in name.lower() if c.isalnum())
