"""What every program of scripts/ needs around its work: errors, whole files, words for counts.

Without torch: tables are also made on machines that have none.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from plumbing.knobs import ROOT, UserError
from plumbing.plain_text import read_text


def launch(main: Callable[[], int | None]) -> NoReturn:
    """Run main(), whose result is the exit code; a UserError is one line on stderr and code 2."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


ANALYSIS = "pip install scipy matplotlib rich (or -r requirements-dev.txt)"


def need(module: str, what: str, install: str = ANALYSIS) -> ModuleType:
    """Import an optional library. Raises UserError saying what to install."""
    try:
        importlib.import_module(module.split(".")[0])
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what} needs {module.split('.')[0]}: {install}") from None


def default_logs() -> Path:
    return Path(os.environ.get("LOGS_FOLDER") or ROOT / "logs")


def add_logs_option(p: argparse.ArgumentParser) -> None:
    """--logs_folder, the same in every program; LOGS_FOLDER of the environment is its default."""
    p.add_argument(
        "--logs_folder", "--logs-folder", type=Path, metavar="DIR", default=default_logs(),
        help="folders of runs (default: LOGS_FOLDER, else logs)",
    )  # fmt: skip


def add_results_option(
    p: argparse.ArgumentParser, many: bool = False, file: str = "experiments/results.csv"
) -> None:
    """--results_file, the same in every program; RESULTS_FILE of the environment is its default,
    else `file`. `many`: several may be named."""
    results = Path(os.environ.get("RESULTS_FILE") or ROOT / file)
    p.add_argument(
        "--results_file", "--results-file", "--source", type=Path, metavar="CSV",
        nargs="+" if many else None, default=[results] if many else results,
        help=f"what trainers wrote (default: RESULTS_FILE, else {file})",
    )  # fmt: skip


def add_data_options(p: argparse.ArgumentParser, many: bool = False) -> None:
    """--results_file and --logs_folder."""
    add_results_option(p, many)
    add_logs_option(p)


def write_whole(path: Path, data: str | bytes) -> None:
    """Replace `path` in one rename, LF line ends. Raises UserError when it cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(part, path)
    except OSError as error:
        if path.parent.is_dir():
            part.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another folder"
        ) from None


def read_toml(path: Path, otherwise: str) -> dict:
    """The tables of a TOML file. Raises UserError for what is none, and on Python 3.10, which
    cannot read it; `otherwise` says what can be done without.
    """
    try:
        import tomllib
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        raise UserError(
            f"{path}: reading TOML needs Python 3.11 or later (tomllib), this is {version}; "
            f"{otherwise}"
        ) from None
    try:
        text = read_text(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {otherwise}") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not TOML: {error}") from None


def listing(names: Sequence[str], separator: str = ", ", most: int = 6) -> str:
    """The first few names, and how many more."""
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def count(n: int, noun: str) -> str:
    """'1 run', '2 runs'."""
    return f"{n} {noun}{'s' * (n != 1)}"
