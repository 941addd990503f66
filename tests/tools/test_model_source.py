"""model_source: a model's own code, which needs nothing of this repository."""

import ast
import sys
import types
from pathlib import Path

import pytest
from lib import runs
from lib.model_source import model_source

from plumbing import UserError

TRAINERS = ["train_gpt", "train_gpu", "train_scaled"]
OURS = {path.stem for path in Path(__file__).resolve().parents[2].glob("*.py")} | {"plumbing"}


def run(source: str, monkeypatch) -> type:
    """The model's class, of the source run as a module."""
    module = types.ModuleType("flatrun_model")
    monkeypatch.setitem(sys.modules, "flatrun_model", module)
    exec(source, module.__dict__)
    return module.MODEL


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_source_imports_nothing_of_ours_and_runs_by_itself(trainer, monkeypatch):
    source = model_source(trainer, runs.MODELS[trainer])
    tree = ast.parse(source)
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {module.split(".")[0] for module in found} & OURS
    assert run(source, monkeypatch).__name__ == runs.MODELS[trainer]


def trainer_of(text: str, folder: Path, monkeypatch) -> str:
    (folder / "some_trainer.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "some_trainer", raising=False)
    return "some_trainer"


def test_what_a_carried_function_uses_of_its_own_module_comes_along(tmp_path, monkeypatch):
    text = "from histories import HistoryTables as Found\n\nclass Model:\n    part = Found\n"
    source = model_source(trainer_of(text, tmp_path, monkeypatch), "Model")
    tables = run(source, monkeypatch).part(8)
    assert [t.shape for t in tables.empty(2)] == [(2, 9, 9), (2, 9, 9), (2, 9, 9, 8)]


@pytest.mark.parametrize(
    "text, problem",
    [
        (
            "import histories\nclass Model:\n    p = histories.BYTES\n",
            "write from histories import",
        ),
        (
            "from histories import HistoryTables\nclass SuffixHash: ...\n"
            "class Model:\n    p = HistoryTables, SuffixHash\n",
            "histories, which an export does not carry because of SuffixHash",
        ),
        (
            "from plumbing.session import Session\nclass Model:\n    p = Session\n",
            "plumbing.session, which an export does not carry because of plumbing",
        ),
    ],
)
def test_a_model_that_cannot_be_carried_is_refused(text, problem, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=problem):
        model_source(trainer_of(text, tmp_path, monkeypatch), "Model")
