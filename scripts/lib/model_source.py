"""model_source.py -- the part of a trainer that its model is made of, as a program of its own.

    text = model_source("train_gpt", "GPT")

Follows the names from the model's class: the functions, classes and constants of the trainer that
it uses, in the trainer's order, with the imports that they need. Annotations are not followed,
since they name what a model in use does not have (Knobs, World).
A function or class of plumbing/ that stands by itself is carried along.
Raises   UserError where the model needs more of plumbing/ than that
"""

import ast
import importlib
import inspect

from plumbing.knobs import UserError

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


def model_source(trainer: str, model_class: str) -> str:
    text = inspect.getsource(importlib.import_module(trainer))
    lines = text.splitlines()
    body = ast.parse(text).body
    homes: dict[str, list[ast.stmt]] = {}
    imports: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                imports[alias.asname or alias.name.split(".")[0]] = node
        for name in _defines(node):
            homes.setdefault(name, []).append(node)

    needed: set[str] = set()
    todo = {model_class}
    while todo:
        needed |= todo
        used = {name for n in todo for node in homes.get(n, []) for name in names_in(node)}
        todo = {name for name in used if name in homes} - needed
    nodes = [n for n in body if any(name in needed for name in _defines(n))]
    used = {name for node in nodes for name in names_in(node)} & imports.keys()
    from_plumbing = sorted(name for name in used if _module_of(imports[name]) == "plumbing")
    carried = [_carried(trainer, name, imports[name]) for name in from_plumbing]
    parts = [HEAD.format(trainer=trainer), *carried]
    others = used - set(from_plumbing)
    used_imports = sorted({imports[name] for name in others}, key=lambda node: node.lineno)
    parts += [ast.unparse(node) for node in used_imports]
    for node in nodes:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        parts.append("\n\n" + "\n".join(lines[first - 1 : node.end_lineno]))
    return "\n".join([*parts, f"\n\nMODEL = {model_class}\n"])


def _carried(trainer: str, name: str, imported: ast.ImportFrom) -> str:
    """The source of a function or class of plumbing/ that needs nothing else of plumbing/."""
    body = ast.parse(inspect.getsource(importlib.import_module(imported.module))).body
    (original,) = [alias.name for alias in imported.names if name in (alias.asname, alias.name)]
    (node,) = [n for n in body if original in _defines(n)] or [None]
    used = names_in(node) if node else set()
    lines = []
    needs_plumbing = node is None
    for n in body:
        if isinstance(n, ast.Import | ast.ImportFrom):
            names = {alias.asname or alias.name.split(".")[0] for alias in n.names}
            if used & names:
                lines.append(ast.unparse(n))
                needs_plumbing |= _module_of(n) == "plumbing"
        elif n is not node and used & set(_defines(n)):
            needs_plumbing = True
    if needs_plumbing:
        raise UserError(
            f"{trainer}.py: its model uses {name} of plumbing/, which an export does not carry; "
            f"export it without --format hf"
        )
    source = [*lines, "\n", ast.unparse(node), ""]
    if name != original:
        source.append(f"{name} = {original}")
    return "\n".join(source)


def _module_of(node: ast.stmt) -> str:
    name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
    return name.split(".")[0]
