"""Results files that a spreadsheet has saved: named as what they are, alike by trainers and tables."""

from pathlib import Path

import pytest
from lib.results import read_results
from support import ONE, ROOT

from plumbing import UserError, append_result
from plumbing.results import check_results

COLUMNS = ["run_id", "seed", "final_val_loss", "status", "notes"]
ROWS = [["a", "1", "3.25", "finished", ""], ["b", "2", "3.5", "finished", "LR=1"]]
TEXT = "".join(",".join(fields) + "\n" for fields in [COLUMNS, *ROWS])
NEW = dict(run_id="c", seed=3, final_val_loss=3.125, status="finished", notes="")

TAKEN = {
    "plain": TEXT.encode(),
    "byte order mark": TEXT.encode("utf-8-sig"),
    "CRLF": TEXT.replace("\n", "\r\n").encode(),
    "quotes": TEXT.replace("run_id", '"run_id"').encode(),
    "no last line end": TEXT.rstrip("\n").encode(),
    "blank lines": ("\n" + TEXT + "\n\n").encode(),
    "empty": b"",
    "a line end": b"\r\n",
    "a byte order mark": "\ufeff".encode(),
}
REFUSED = {
    "semicolons": (TEXT.replace(",", ";").encode(), "separated by semicolons"),
    "tabs": (TEXT.replace(",", "\t").encode(), "separated by tabs"),
    "tabs in UTF-16": (TEXT.replace(",", "\t").encode("utf-16"), "is UTF-16"),
    "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "is UTF-16"),
    "CR only": (TEXT.replace("\n", "\r").encode(), "end in CR alone"),
    "Run_ID": (
        TEXT.replace("run_id", "Run_ID").encode(),
        "writes 'Run_ID' for the column 'run_id'",
    ),
    "run id": (TEXT.replace("run_id", "run id").encode(), "writes 'run id'"),
    "spaces": (TEXT.replace("run_id,", "run_id , ").encode(), "has spaces around its names"),
    "spaces behind commas": (TEXT.replace(",", ", ").encode(), "spaces around its names"),
    "trailing blank columns": (TEXT.replace("\n", ",,\n").encode(), "2 column(s) without a name"),
    "a column twice": (TEXT.replace("notes", "status").encode(), "names status twice"),
    "sep=;": (("sep=;\n" + TEXT.replace(",", ";")).encode(), "word for the separator"),
    "a workbook": (b"PK\x03\x04" + bytes(200), "spreadsheet's own file"),
    "gzip": (b"\x1f\x8b" + bytes(200), "compressed with gzip"),
    "another table": (b"name,value\nx,1\n", "not a header of results"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_trainers_and_tables_take_the_same_files(tmp_path, name):
    path = tmp_path / "results.csv"
    path.write_bytes(TAKEN[name])
    before, _ = read_results(path)
    check_results(path, COLUMNS, ONE)
    append_result(path, COLUMNS, NEW, ONE)
    rows, problems = read_results(path)
    assert [row["run_id"] for row in rows] == [*(row["run_id"] for row in before), "c"]
    assert not problems and rows[-1].number("final_val_loss") == 3.125
    assert len(before) == (2 if b"final" in TAKEN[name] else 0)


@pytest.mark.parametrize("name", REFUSED)
def test_trainers_and_tables_name_what_a_spreadsheet_made(tmp_path, name):
    path = tmp_path / "results.csv"
    data, words = REFUSED[name]
    path.write_bytes(data)
    for read in (read_results, lambda path: check_results(path, COLUMNS, ONE)):
        with pytest.raises(UserError) as caught:
            read(path)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == data


def test_a_run_that_was_killed_behind_its_row_gets_no_second_one(tmp_path):
    path = tmp_path / "results.csv"
    for may_be_there in (False, True):
        append_result(path, COLUMNS, NEW, ONE, may_be_there)
    assert [row["run_id"] for row in read_results(path)[0]] == ["c"]
    append_result(path, COLUMNS, {**NEW, "status": "preempted"}, ONE, may_be_there=True)
    append_result(path, COLUMNS, NEW, ONE)
    assert [row.status for row in read_results(path)[0]] == ["finished", "preempted", "finished"]


def test_csv_files_needs_nothing_but_python():
    source = Path(ROOT / "plumbing/csv_files.py").read_text()
    imports = [line for line in source.split("\n") if line.startswith(("import", "from"))]
    assert {line.split()[1].split(".")[0] for line in imports} <= {
        "csv",
        "collections",
        "pathlib",
        "plumbing",
    }
