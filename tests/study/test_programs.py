"""All programs of scripts/ name the folder of logs and the results file in one way."""

import ast
from pathlib import Path

import compare
import export
import fork_gain
import import_logs
import plot
import pytest
import report
import run_study
import split_results
from lib.program import add_data_options, add_logs_option
from study_support import ROOT

PROGRAMS = sorted((ROOT / "scripts").rglob("*.py"))
# run_study.py passes what it is given on to the trainer, whose defaults hold; plot_arith.py reads
# another results file by default
OWN_WORDS = ("scripts/lib/program.py", "scripts/run_study.py", "scripts/arith/plot_arith.py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def options_of(path: Path) -> list[str]:
    """The first word of every call that looks like add_argument("--name", ...)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if called == "add_argument" or getattr(node.func, "id", "") == "add":
                found.append(str(node.args[0].value))
    return found


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_no_program_has_its_own_idea_of_logs_folder_or_results_file(path):
    if name_of(path) in OWN_WORDS:
        return
    own = {"--logs_folder", "--results_file", "--logs-folder", "--results-file"}
    assert not own & set(options_of(path)), "use lib/program.py's add_data_options"
    text = path.read_text()
    assert 'environ.get("LOGS_FOLDER")' not in text and 'environ.get("RESULTS_FILE")' not in text


class Parser:
    """Stands for argparse's, and keeps the defaults."""

    def __init__(self):
        self.defaults = {}

    def add_argument(self, name: str, *_: str, default: object = None, **more: object) -> None:
        self.defaults[name] = default


def test_the_environment_is_the_default_and_the_flag_goes_before_it(monkeypatch, tmp_path):
    monkeypatch.setenv("LOGS_FOLDER", str(tmp_path / "l"))
    monkeypatch.setenv("RESULTS_FILE", str(tmp_path / "r.csv"))
    parser = Parser()
    add_data_options(parser)
    assert parser.defaults["--logs_folder"] == tmp_path / "l"
    assert parser.defaults["--results_file"] == tmp_path / "r.csv"
    only_logs = Parser()
    add_logs_option(only_logs)
    assert only_logs.defaults == {"--logs_folder": tmp_path / "l"}
    for arguments, words in (
        (split_results.arguments, []),
        (plot.arguments, ["--stage", "a"]),
        (fork_gain.arguments, ["--stages", "a.toml"]),
    ):
        found = arguments(words)
        assert found.logs_folder == tmp_path / "l"
        assert found.results_file in (tmp_path / "r.csv", [tmp_path / "r.csv"])
        assert arguments([*words, "--logs-folder", "x"]).logs_folder == Path("x")


@pytest.mark.parametrize(
    "program", [compare, export, fork_gain, import_logs, plot, report, run_study, split_results]
)
def test_help_names_both_spellings_of_the_folder(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    out = capsys.readouterr().out
    assert "--logs_folder" in out and "--logs-folder" in out


def test_a_study_writes_where_the_environment_says(pretend, tmp_path, monkeypatch):
    from pretender import TWO_BY_TWO, go

    monkeypatch.setenv("LOGS_FOLDER", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("RESULTS_FILE", str(tmp_path / "others.csv"))
    assert go(pretend(TWO_BY_TWO)) == 0
    assert (tmp_path / "elsewhere/started.txt").exists() and (tmp_path / "others.csv").exists()
