"""Every notebook is small, has no outputs, and runs from its first cell to its last.

Cells run in plain Python, so that no Jupyter has to be installed: IPython.display is a stub, lines
that begin with `!` are programs that are forked, and cells tagged skip-execution (downloads, GPUs)
are left out.
"""

import ast
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from support import ROOT, environment

pytestmark = pytest.mark.timeout(900)  # they start a dozen programs; a busy machine is no failure
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The study that the others are shown with: own_study.ipynb trains it.
FIRST = ROOT / "notebooks/own_study.ipynb"

RUN = """
import json, os, shlex, sys, types
from pathlib import Path
import forked

display = types.ModuleType("IPython.display")
shown = []
display.display = lambda *things: shown.extend(things)
for name in ("Image", "Markdown", "HTML", "IFrame"):
    setattr(display, name, lambda *words, **more: words)
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].version_info = (9, 0)  # matplotlib asks for it
sys.modules["IPython.display"] = display


def shell(command):
    python, *words = shlex.split(os.path.expandvars(command))
    assert python == sys.executable, command
    may_fail = words[-2:] == ["||", "true"]
    done = forked.run(words[:-2] if may_fail else words, Path.cwd(), dict(os.environ))
    print(done.stdout, done.stderr)
    assert may_fail or done.returncode == 0, command


names = {"__name__": "__main__", "shell": shell}
for cell in json.load(open(sys.argv[1])):
    exec(compile(cell, "cell", "exec"), names)
print("shown:", len(shown))
"""


def name_of(path: Path) -> str:
    return path.name


def cells_of(path: Path, kind: str = "code") -> list[dict]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def python_of(cell: dict) -> str:
    """The cell's text, shell lines as calls."""
    lines = "".join(cell["source"]).split("\n")
    return "\n".join(f"shell({x[1:].strip()!r})" if x.startswith("!") else x for x in lines)


@lru_cache
def run(path: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run the cells of a notebook one after the other, on results of its own folder."""
    texts = [
        python_of(cell)
        for cell in cells_of(path)
        if "skip-execution" not in cell["metadata"].get("tags", [])
    ]
    (folder / "cells.json").write_text(json.dumps(texts))
    extra = {"LOGS_FOLDER": folder / "logs", "RESULTS_FILE": folder / "results.csv"}
    extra |= {"NOTEBOOK_STUDY": folder / "my_study.toml", "NOTEBOOK_STAGE": "lr"}
    env = environment(PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
    env |= {name: str(value) for name, value in extra.items()}
    return subprocess.run(
        [sys.executable, "-c", RUN, str(folder / "cells.json")],
        cwd=ROOT / "notebooks", env=env, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def own_study(tmp_path_factory) -> tuple[Path, str]:
    """The folder that own_study.ipynb fills, and what it prints."""
    folder = tmp_path_factory.mktemp("study")
    done = run(FIRST, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_study_of_ones_own_goes_from_a_question_to_a_table_and_figures(own_study):
    folder, out = own_study
    assert "My study: 4 of 4 done" in out and "| 0.02 |" in (folder / "tables/lr.md").read_text()
    assert (folder / "figures/val_loss_lr.png").exists() and "shown: 2" in out


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p != FIRST], ids=name_of)
def test_a_notebook_runs_from_its_first_cell_to_its_last(path, own_study):
    folder, _ = own_study
    done = run(path, folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_gating_study_shows_curves_and_final_figures_and_trains_nothing_twice(own_study):
    folder, _ = own_study
    done = run(ROOT / "notebooks/gating_study.ipynb", folder)
    assert "4 runs, 4 done, 0 to do" in done.stdout and "start: " not in done.stdout
    for name in ("val_loss_lr.png", "final_loss_lr.png", "difference_lr.png"):
        assert (folder / "figures" / name).exists()
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_small_and_has_no_outputs(path):
    book = json.loads(path.read_text())
    assert book["nbformat"] == 4 and len(path.read_bytes()) <= 24 * 1024
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells_of(path))
    assert sum(len(cell["source"]) for cell in cells_of(path)) <= 120
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    for cell in cells_of(path):
        ast.parse(python_of(cell))
    assert os.environ.get("HOME", "/root") + "/" not in path.read_text()
