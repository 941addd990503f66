"""knobs.py -- one dataclass of settings, filled from flags, environment, a file and presets.

Promises that a setting is never taken wrongly or ignored in silence. A wrong type, a value out of
range, a misspelt name, two spellings that disagree, or a knob that only a sibling trainer has is
refused in one line, which names the knob, says what was expected and what to do. It needs nothing
but Python. Names that trainers share stand in family.py; config.py reads configuration files.

    @dataclass(frozen=True)
    class Knobs:
        n_layer: int = knob(12, "number of transformer blocks", group="Model", low=1)

    cfg = read_knobs(Knobs, presets=PRESETS, doc=__doc__)

A flag beats the environment, the environment beats the file, the file beats the preset, and the
preset beats the default. Every knob has the same name everywhere: `n_layer` in Python, `--n_layer`
or `--n-layer` on the command line, `N_LAYER` in the environment.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from plumbing import family
from plumbing.family import near_name, squeezed

ROOT = Path(__file__).resolve().parents[1]  # the checkout
Field = dataclasses.Field
Knobs = typing.TypeVar("Knobs")


class UserError(ValueError):
    """What a user can put right. The message says what was found, what was expected, what to do."""


def knob(
    default: object,
    text: str,
    *,
    group: str = "",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    none: str | None = None,
    alias: Sequence[str] = (),
    metavar: str = "",
) -> typing.Any:
    """One field of a knobs class: its default, and a help text with the unit.

    `low` and `high` are inclusive bounds, `above` is an exclusive one. `none` is the word for None,
    such as "off" or "auto". `alias` lists spellings besides those of family.ALIASES. `group` is the
    heading that --help shows from this knob on.
    """
    metadata = dict(
        text=text,
        group=group,
        low=low,
        above=above,
        high=high,
        choices=choices,
        none=none,
        alias=tuple(alias),
        metavar=metavar,
    )
    return dataclasses.field(default=default, metadata=metadata)


def _in_order(cls: type) -> dict[str, Field]:
    """The knobs of `cls` in the order of --help. Those of its last base, which every run has, stand
    at the end, and a knob keeps its heading where a class states another default."""
    bases = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    declared: dict[str, Field] = {}
    for base in reversed(bases):
        declared = base.__dataclass_fields__ | declared
    last = bases[-1].__dataclass_fields__ if len(bases) > 1 else {}
    found = {}
    for name in [*(name for name in cls.__dataclass_fields__ if name not in last), *last]:
        found[name] = copy.copy(cls.__dataclass_fields__[name])
        heading = found[name].metadata["group"] or declared[name].metadata["group"]
        found[name].metadata = {**found[name].metadata, "group": heading}
    return found


def spellings(cls: type) -> dict[str, Field]:
    """Every name in capitals that sets a knob of `cls`, and the knob's field."""
    fields = _in_order(cls)
    known = {}
    for field in fields.values():
        known[field.name.upper()] = field
        for alias in (*field.metadata["alias"], *family.ALIASES.get(field.name, ())):
            if alias not in fields:
                known[alias.upper()] = field
    return known


def kind_of(field: Field) -> type:
    """The type of a knob's values: bool, int, float or str."""
    for kind in typing.get_args(field.type) or (field.type,):
        if kind is not type(None):
            return kind
    raise TypeError(f"{field.name}: a knob's type must be bool, int, float or str")


def describe(field: Field, value: object) -> str:
    """A knob's value as one would type it."""
    if value is None:
        return str(field.metadata["none"])
    if isinstance(value, bool):
        return str(int(value))
    return str(value)


def _expects(field: Field) -> str:
    """What a knob's value may be, in words."""
    meta = field.metadata
    if meta["choices"]:
        words = "one of " + ", ".join(choice or "''" for choice in meta["choices"])
    else:
        kinds = {bool: "0 or 1", int: "a whole number", float: "a number", str: "text"}
        words = kinds[kind_of(field)]
    signs = {"low": ">=", "above": ">", "high": "<="}
    bounds = [f"{sign} {meta[key]}" for key, sign in signs.items() if meta[key] is not None]
    if bounds:
        words += " " + " and ".join(bounds)
    if meta["none"]:
        words += f", or '{meta['none']}'"
    return words


def _convert(field: Field, text: str) -> object:
    """The value that `text` stands for. Raises ValueError when this knob cannot take it."""
    meta, kind = field.metadata, kind_of(field)
    if meta["none"] and text == meta["none"]:
        return None
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError
        return text == "1"
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError
    if meta["low"] is not None and value < meta["low"]:
        raise ValueError
    if meta["above"] is not None and value <= meta["above"]:
        raise ValueError
    if meta["high"] is not None and value > meta["high"]:
        raise ValueError
    return value


def _suggestion(field: Field, text: str) -> str:
    """The accepted word that `text` was probably meant to be, or ''."""
    words = [str(choice) for choice in field.metadata["choices"] or ()]
    if kind_of(field) is bool:
        words = ["0", "1"]
    if field.metadata["none"]:
        words.append(field.metadata["none"])
    meant = family.MEANT.get(text.lower())
    if meant in words:
        return meant
    close = get_close_matches(text.lower(), words, n=1)
    return close[0] if close else ""


def _parse(spelling: str, field: Field, text: str) -> object:
    """The knob's value. Raises UserError, naming the spelling that was used."""
    word = text
    if spelling != field.name.upper():
        word = family.ALIAS_VALUES.get(spelling.lower(), {}).get(text, text)
    try:
        return _convert(field, word)
    except ValueError:
        near = _suggestion(field, text)
    hint = f"; did you mean {near}?" if near else ""
    origin = getattr(text, "origin", "")  # of a text that comes from a file
    where = f" [{origin}]" if origin else ""
    raise UserError(
        f"{spelling}={str(text)!r}: expected {_expects(field)}{hint} "
        f"(the default is {describe(field, field.default)}){where}"
    )


# ----------------------------------------------------------------------------
# The environment


def _refuse_near_miss(name: str, text: str, known: Mapping[str, Field]) -> None:
    """Refuse a misspelt knob. A name that is only similar may belong to another program, such as
    COMPILER=gnu: it counts as a misspelling if the knob could take its value."""
    near = near_name(name, known)
    if not near:
        return
    if squeezed(name) != squeezed(near):
        try:
            _convert(known[near], text)
        except ValueError:
            return
    raise UserError(
        f"{name} is set, but it is not a knob; did you mean {near}? "
        f"(env -u {name} unsets it for one command)"
    )


def _check_environment(env: Mapping[str, str], known: Mapping[str, Field], program: str) -> None:
    """Refuse names that are probably meant for this program, but set nothing in it."""
    for name in sorted(env.keys() - known.keys()):
        problem = family.renamed_problem(name, known)
        problem = problem or family.sibling_problem(name, program, known)
        if problem and not family.is_ordinary(name, env):
            raise UserError(problem)
        if problem and os.environ.get("RANK", "0") == "0":
            print(f"{program}: {problem}", file=sys.stderr)
        if not problem:
            _refuse_near_miss(name, env[name], known)


# ----------------------------------------------------------------------------
# Flags and --help


class _Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one line without the usage of sixty knobs before it."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help lists the knobs")


def _metavar(field: Field) -> str:
    """What stands for the value in --help."""
    meta, kind = field.metadata, kind_of(field)
    if meta["metavar"]:
        return meta["metavar"]
    if meta["choices"]:
        braces = "{" + ",".join(meta["choices"]) + "}"
        return braces if len(braces) <= 60 else "WORD"
    if kind is bool:
        return "0|1"
    if field.name.endswith("_s"):
        return "SECONDS"
    if kind is not str:
        return "N" if kind is int else "X"
    endings = {"_folder": "DIR", "_dir": "DIR", "_file": "PATH", "_path": "PATH", "_bin": "PATH"}
    for ending, word in endings.items():
        if field.name.endswith(ending):
            return word
    return "TEXT"


def _help(field: Field) -> str:
    """The line of --help: the text, what the value may be, and the default."""
    expected = _expects(field)
    if expected == "text" or (_metavar(field)[0] in "{0" and not field.metadata["none"]):
        expected = ""  # nothing that the word beside the name does not say
    default = describe(field, field.default).replace(f"{ROOT}/", "") or "empty"
    facts = f"{expected}; default {default}".removeprefix("; ")
    return f"{field.metadata['text']} ({facts})".replace("%", "%%")


def _add_flags(parser: argparse.ArgumentParser, known: Mapping[str, Field]) -> None:
    """Every spelling as a flag, with '_' and with '-'; --help shows one line per knob."""
    heading, sections = "knobs", {}
    for spelling, field in known.items():
        name = spelling.lower()
        if field.metadata["group"] and spelling == field.name.upper():
            heading = field.metadata["group"].lower()
        if heading not in sections:
            sections[heading] = parser.add_argument_group(heading)
        section = sections[heading]
        options = dict(dest=spelling, metavar=_metavar(field), default=argparse.SUPPRESS)
        is_switch = kind_of(field) is bool or "1" in family.ALIAS_VALUES.get(name, {})
        if is_switch:
            options |= dict(nargs="?", const="1")
        if spelling == field.name.upper():
            section.add_argument(f"--{name}", help=_help(field), **options)
        else:
            parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **options)
        if "_" in name:
            dashed = "--" + name.replace("_", "-")
            parser.add_argument(dashed, help=argparse.SUPPRESS, **options)
        if is_switch:  # the way to switch off, as argparse's own programs have it
            off = {f"--no_{name}", f"--no-{name}", "--no-" + name.replace("_", "-")}
            options = dict(dest=spelling, action="store_const", const="0")
            options |= dict(default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            parser.add_argument(*sorted(off), **options)


def _epilog(known: Mapping[str, Field]) -> str:
    """The end of --help: where settings may come from, and the other spellings of knobs."""
    text = (
        "Every knob is also an environment variable, its name in capitals. A flag beats the "
        "environment, the environment beats the preset, and the preset beats the default. A "
        "switch takes 0 or 1; --name alone is 1, and --no-name is 0."
    )
    others: dict[str, list[str]] = {}
    for spelling, field in known.items():
        if spelling != field.name.upper():
            others.setdefault(field.name, []).append(f"--{spelling.lower()}")
    if others:
        pairs = [f"{' and '.join(names)} for --{name}" for name, names in others.items()]
        text += " Other spellings are accepted too: " + ", ".join(pairs) + "."
    return textwrap.fill(text, 98, break_on_hyphens=False, break_long_words=False)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and the knobs within 100 columns."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=98)


def flag_texts(known: Mapping[str, Field], argv: Sequence[str], doc: str) -> dict[str, str]:
    """The text of every spelling that is given as a flag."""
    parser = _Parser(
        description=doc,
        usage="%(prog)s [--knob VALUE ...]",
        epilog=_epilog(known),
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    _add_flags(parser, known)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0].upper().replace("-", "_")
        near = near_name(name, known)
        hint = f"did you mean --{near.lower()}?" if near else "--help lists the knobs"
        raise UserError(f"{unknown[0]} is not a flag; {hint}")
    return vars(found)


# ----------------------------------------------------------------------------
# Reading


def values_of(known: Mapping[str, Field], source: Mapping[str, str]) -> dict[str, object]:
    """The values that one source gives, by knob. Raises UserError when two spellings disagree."""
    values: dict[str, object] = {}
    used: dict[str, str] = {}
    for spelling, field in known.items():
        if spelling not in source:
            continue
        value = _parse(spelling, field, source[spelling])
        if field.name in values and values[field.name] != value:
            other = used[field.name]
            raise UserError(
                f"{other}={source[other]} and {spelling}={source[spelling]} are one knob with two "
                f"values; set one of them"
            )
        values[field.name] = value
        used[field.name] = spelling
    return values


def read_knobs(
    cls: type[Knobs],
    presets: Mapping[str, Mapping] | None = None,
    argv: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    doc: str = "",
    config: Mapping[str, str] | None = None,
) -> Knobs:
    """Build `cls` from flags, environment, `config` (texts by knob name), presets and defaults.

    Raises UserError, naming the knob, its value and what would do: for a wrong type, a value out of
    range or not among the choices, an unknown flag, a near miss or a sibling's knob in the
    environment, two spellings that disagree, and knobs that do not fit together (a ValueError from
    `cls.__post_init__`).
    """
    env = os.environ if env is None else env
    known = spellings(cls)
    flags = flag_texts(known, sys.argv[1:] if argv is None else argv, doc)
    program = Path(getattr(sys.modules[cls.__module__], "__file__", None) or "this program").name
    _check_environment(env, known, program)
    given = {name.upper(): text for name, text in (config or {}).items()}
    for name in sorted(given.keys() - known.keys()):
        near = near_name(name, known)
        hint = f"; did you mean {near.lower()}?" if near else ""
        raise UserError(f"{name.lower()} is not a knob of {program}{hint}")
    values = values_of(known, given) | values_of(known, env) | values_of(known, flags)
    preset = (presets or {}).get(values.get("preset", getattr(cls, "preset", "")), {})
    try:
        return cls(**{**preset, **values})
    except ValueError as error:
        raise UserError(error) from None


def knobs_json(cfg: object, indent: int | None = 2) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=indent)
