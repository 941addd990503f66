"""config.py -- knobs from a YAML file and --set KEY=VALUE, beside flags and environment.

Promises that every key of a file reaches its knob or is refused in one line: an unknown key with
the nearest one, a key that is given twice, two keys of one knob that disagree, a file that is not
YAML or not UTF-8. The values become the texts that one would type as flags, so that read_knobs
checks them in the same way; each text remembers where it was written.
"""

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches

import yaml

from plumbing.knobs import Knobs, UserError, flag_texts, read_knobs, spellings, values_of
from plumbing.plain_text import read_text

# Keys that may have only one value: the value, and the reason.
Fixed = Mapping[str, tuple[object, str]]


class SourcedText(str):
    """The text of a knob's value, with the place where it was written."""

    origin = ""


class _Loader(yaml.SafeLoader):
    """YAML without its traps: a key that is given twice is an error, and so are references, with
    which a small file can stand for an endless one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                what = f"the key {key.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "references are not accepted", mark)
        return super().compose_node(parent, index)


def _flat_items(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested keys joined by dots, and their values."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat_items(value, path + ".")
        else:
            yield path, value


def _as_text(value: object) -> str:
    """A YAML value as one would type it as a flag."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return ",".join(_as_text(item) for item in value)
    return str(value)


def _check_key(path: str, source: str, names: Mapping[str, str], fixed: Fixed) -> None:
    """Refuse a key that is not in the table, with the nearest one that is."""
    if path in names or path in fixed:
        return
    known = [*names, *fixed]
    leaf = path.rsplit(".", 1)[-1]
    near = [key for key in known if key.rsplit(".", 1)[-1] == leaf]
    near = near or get_close_matches(path, known, n=1)
    hint = "--help lists the knobs, and the files in configs/ show their keys"
    if near:
        hint = f"did you mean {near[0]}?"
    raise UserError(f"{source}: {path} is not a key; {hint}")


def _take(
    texts: dict[str, str], path: str, value: object, source: str, names: Mapping, fixed: Fixed
) -> None:
    """Put the value of one key into `texts`, by its knob's name."""
    _check_key(path, source, names, fixed)
    if path in fixed:
        wanted, why = fixed[path]
        if value != wanted:
            raise UserError(
                f"{source}: {path}: {value} is refused: {why}; write {wanted}, or leave the key out"
            )
        return
    if value is None:
        raise UserError(f"{source}: {path} has no value; give one, or leave the key out")
    text = SourcedText(_as_text(value))
    text.origin = f"{source}: {path}: {text}"
    before = texts.get(names[path], text)
    if before != text and source != "--set":
        raise UserError(f"{text.origin}, but {before.origin}; they are one knob, give it one value")
    texts[names[path]] = text


def read_yaml(path: str, names: Mapping[str, str], fixed: Fixed | None = None) -> dict[str, str]:
    """The knobs' texts in a YAML file. `names` gives the knob, in any spelling, of each key;
    `fixed` lists keys that may have only one value, because it is what the program always does.
    Raises UserError for a file that cannot be read, and for a key that is not in either."""
    try:
        text = read_text(path)
    except OSError as error:
        what = error.strerror or error
        raise UserError(
            f"--config {path}: cannot be read ({what}); configs/ has examples"
        ) from None
    except UserError as error:
        raise UserError(f"--config {error}") from None
    try:
        tree = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"--config {path}: not YAML ({what}); configs/ has examples") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"--config {path}: expected sections such as model: and training:, as in "
            f"configs/pilot.yaml"
        )
    texts: dict[str, str] = {}
    for key, value in _flat_items(tree):
        is_empty_section = value is None and any(name.startswith(f"{key}.") for name in names)
        if not is_empty_section:
            _take(texts, key, value, path, names, fixed or {})
    return texts


def read_assignments(
    items: Sequence[str], names: Mapping[str, str], fixed: Fixed | None = None
) -> dict[str, str]:
    """The knobs' texts in a list of --set KEY=VALUE; of two for one knob, the later one."""
    texts: dict[str, str] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(
                f"--set {item}: expected key=value, such as training.optimizer.lr=0.001"
            )
        value: object = text
        if key in (fixed or {}) or text.lower() in ("true", "false"):
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                pass  # compared as the text that it is
        _take(texts, key, value, "--set", names, fixed or {})
    return texts


def section_keys(cls: type, sections: Collection[str]) -> dict[str, str]:
    """The keys `section.spelling` of a class of knobs, and the spelling that each one sets. The
    section of a knob is the heading that --help shows it under."""
    keys = {}
    section = ""
    for spelling, field in spellings(cls).items():
        name = spelling.lower()
        if name == field.name:
            section = field.metadata["group"] or section
        if section in sections:
            keys[f"{section}.{name}"] = name
    return keys


def read_configured(
    cls: type[Knobs],
    presets: Mapping[str, Mapping],
    argv: Sequence[str],
    env: Mapping[str, str],
    doc: str,
    names: Mapping[str, str],
    fixed: Fixed,
    settle: Callable[[Mapping[str, object]], Mapping[str, str]],
) -> Knobs:
    """Knobs from flags over environment over --set over the file of --config over presets over
    defaults. Before the file is opened, settle(values) sees all that the three others give, and
    returns the texts of knobs that it decides itself.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--set", action="append", default=[])
    found, flags = parser.parse_known_args(argv)
    known = spellings(cls)
    bare_names = {name.lower(): name.lower() for name in known}  # --set takes them, too
    assigned = read_assignments(found.set, {**names, **bare_names}, fixed)
    given = values_of(known, {name.upper(): text for name, text in assigned.items()})
    given |= values_of(known, env) | values_of(known, flag_texts(known, flags, doc))
    flags += [f"--{name}={text}" for name, text in settle(given).items()]
    texts = {}
    if given.get("config"):
        texts = read_yaml(given["config"], names, fixed)
    overridden = {known[name.upper()].name for name in assigned}
    texts = {n: text for n, text in texts.items() if known[n.upper()].name not in overridden}
    return read_knobs(cls, presets, flags, env, doc, config=texts | assigned)
