"""The house as docs/design.md draws it: sizes, copies, and who may import whom."""

import ast
import re
from pathlib import Path

import pytest
from support import ROOT

# Lines and KiB at most. The design has 540 lines for train_gpt.py; it came out at 29 KiB, as the
# design wants, in more and shorter lines, and so did arithmetic.py (400 lines, 24 KiB).
# train_gpu.py and train_scaled.py have the design's 38 and 46 KiB, too, in more and shorter lines
# than its 680 and 840; docs/design.md says what the lines are.
BUDGETS = {
    "train_gpt.py": (630, 29),
    "train_gpu.py": (800, 38),
    "train_scaled.py": (990, 46),
    "train_arith.py": (540, 25),
    "arithmetic.py": (435, 22),
}
TRAINERS = [name for name in BUDGETS if name.startswith("train_")]
FOLDERS = ("plumbing", "scripts")
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_as_small_as_the_design_has_it(path):
    lines, kib = BUDGETS.get(name_of(path), (400, 24))
    text = path.read_text()
    assert text.count("\n") <= lines and len(text.encode()) <= kib * 1024


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_function_is_longer_than_a_screen(path):
    for function in functions(path):
        most = 60 if function.name == "train" else 50
        length = function.end_lineno - function.lineno + 1
        assert length <= most, function.name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_line_is_wider_than_100_columns(path):
    wide = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not wide


@pytest.mark.parametrize("name", TRAINERS)
def test_the_two_halves_of_the_loop_stand_in_train(name):
    (train,) = [f for f in functions(ROOT / name) if f.name == "train"]
    lines = (ROOT / name).read_text().splitlines()[train.lineno - 1 : train.end_lineno]
    text = "\n".join(lines)
    halves = re.findall(r"# -------- (.*) --------", text)
    assert [half.split(":")[0] for half in halves] == ["clock stopped", "clock running"]
    first, second = text.split("# -------- clock running")
    assert "save(" in first and "evaluate(" in first and "session.stopping" in first
    assert re.search(r"\.backward\(\)|= backward_pass\(", second)  # one is recorded as a CUDA graph
    assert ".step(" in second and ".item()" not in second


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_imports_plumbing_and_at_most_one_data_module(name):
    tree = ast.parse((ROOT / name).read_text())
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {path.stem for path in ROOT.glob("*.py")} | {"scripts", "plumbing"}
    used = {module.split(".")[0] for module in found} & ours
    assert "plumbing" in used and len(used - {"plumbing"}) <= 1


def test_plumbing_imports_no_trainer_and_no_data_module():
    others = "|".join(["train_", "scripts", *(path.stem for path in ROOT.glob("*.py"))])
    for path in (ROOT / "plumbing").glob("*.py"):
        assert not re.search(rf"^(from|import) ({others})", path.read_text(), re.M), path


def marked_blocks(path: Path) -> dict[str, tuple[str, ast.AST]]:
    """Functions and classes by name: what the line above says ("same", "differs" or ""), and their
    syntax without docstrings.
    """
    lines = path.read_text().splitlines()
    found = {}
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        above = lines[first - 2] if first > 1 else ""
        mark = ""
        if above.startswith("# same as train_gpt.py"):
            mark = "same"
        elif above.startswith("# differs"):
            mark = "differs"
        for inner in ast.walk(node):
            is_block = isinstance(inner, ast.FunctionDef | ast.ClassDef)
            if is_block and ast.get_docstring(inner) is not None:
                inner.body = inner.body[1:]
        found[node.name] = (mark, node)
    return found


@pytest.mark.parametrize("name", TRAINERS[1:])
def test_blocks_marked_same_are_the_same(name):
    original = marked_blocks(ROOT / "train_gpt.py")
    for block, (mark, node) in marked_blocks(ROOT / name).items():
        if mark == "same":
            assert block in original, f"train_gpt.py has no {block}"
            assert ast.dump(node) == ast.dump(original[block][1]), f"{block} is not train_gpt's"
