"""model_source.py -- the part of a trainer that its model is made of, as a program of its own.

    text = model_source("train_gpt", "GPT")

Follows the names from the model's class: the functions, classes and constants of the trainer that
it uses, in the trainer's order, with the imports that they need. Annotations are not followed,
since they name what a model in use does not have (Knobs, World).
What the model imports by name from plumbing/ or from the trainer's data module is followed there in
the same way, and stands in front.
Raises   UserError where the model needs more of this repository than that
"""

import ast
import importlib
import inspect
from dataclasses import dataclass, field

from plumbing.knobs import ROOT, UserError

HEAD = '''"""The model of {trainer}.py, whose code this is (commit and knobs: config.json)."""

from __future__ import annotations
'''


def names_in(node: ast.AST) -> set[str]:
    """The names that a definition uses, but for those of its annotations."""
    found = set()
    for part in ast.walk(_without_annotations(node)):
        if isinstance(part, ast.Name):
            found.add(part.id)
    return found


def _without_annotations(node: ast.AST) -> ast.AST:
    copy = ast.parse(ast.unparse(node))
    for part in ast.walk(copy):
        if isinstance(part, ast.FunctionDef):
            part.returns = None
        elif isinstance(part, ast.arg):
            part.annotation = None
        elif isinstance(part, ast.AnnAssign):
            part.annotation = ast.Constant("")
    return copy


def _defines(node: ast.stmt) -> list[str]:
    """The names that a statement of a module gives a value."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    found = []
    for target in targets:
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        found += [part.id for part in parts if isinstance(part, ast.Name)]
    return found


@dataclass
class Needed:
    """What some names need of the module that defines them."""

    lines: list[str]  # of the module
    nodes: list[ast.stmt] = field(default_factory=list)  # definitions, in the module's order
    outside: list[ast.stmt] = field(default_factory=list)  # imports of other packages
    # Names imported from modules of this repository: {module: {name there: name here}}.
    inside: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def defined(self) -> set[str]:
        return {name for node in self.nodes for name in _defines(node)}

    @property
    def used(self) -> set[str]:
        return {name for node in self.nodes for name in names_in(node)}

    @property
    def text(self) -> str:
        parts = [ast.unparse(node) for node in self.outside]
        for node in self.nodes:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            parts.append("\n\n" + "\n".join(self.lines[first - 1 : node.end_lineno]))
        return "\n".join(parts)


def _needed_by(names: set[str], module: str) -> Needed:
    text = inspect.getsource(importlib.import_module(module))
    body = ast.parse(text).body
    homes: dict[str, list[ast.stmt]] = {}
    for node in body:
        for name in _defines(node):
            homes.setdefault(name, []).append(node)
    found = Needed(text.splitlines())
    needed: set[str] = set()
    todo = names
    while todo:
        needed |= todo
        used = {name for n in todo for node in homes.get(n, []) for name in names_in(node)}
        todo = (used & homes.keys()) - needed
    found.nodes = [node for node in body if needed & set(_defines(node))]
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            _add_import(found, node, module)
    return found


def _add_import(found: Needed, node: ast.Import | ast.ImportFrom, module: str) -> None:
    names = {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
    used = {here: there for here, there in names.items() if here in found.used}
    if not used:
        return
    source = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
    if not _is_ours(source):
        found.outside.append(node)
    elif isinstance(node, ast.ImportFrom):
        found.inside[source] = {there: here for here, there in used.items()}
    else:
        raise UserError(
            f"{module}.py: its model uses {source}, which an export carries only where names are "
            f"imported from it: write from {source} import NAME"
        )


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == "plumbing" or (ROOT / f"{module}.py").exists()


def model_source(trainer: str, model_class: str) -> str:
    model = _needed_by({model_class}, trainer)
    carried = {module: _needed_by(set(names), module) for module, names in model.inside.items()}
    for module, part in carried.items():
        others = [model, *(other for other in carried.values() if other is not part)]
        taken = {name for other in others for name in other.defined & part.used}
        if part.inside or taken:
            problem = ", ".join(sorted({*part.inside, *taken}))
            raise UserError(
                f"{trainer}.py: its model uses {module}, which an export does not carry because "
                f"of {problem}; export it without --format hf"
            )
    parts = [HEAD.format(trainer=trainer)]
    for module, part in carried.items():
        parts.append(part.text)
        renamed = {here: there for there, here in model.inside[module].items() if here != there}
        parts += [f"\n\n{here} = {there}" for here, there in renamed.items()]
    return "\n".join([*parts, model.text, f"\n\nMODEL = {model_class}\n"])
