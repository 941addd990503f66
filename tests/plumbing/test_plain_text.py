"""Text that programs read as settings and records: TOML, YAML and JSON lines, as people save them."""

import codecs
from pathlib import Path

import pytest
from lib.program import read_toml

from arithmetic import read_records
from plumbing import UserError
from plumbing.config import read_yaml
from plumbing.results import check_results

RECORDS = '{"expr": "1+2", "result": 3}\n{"expr": "2*3", "result": 6}\n'
READERS = {
    "toml": ('[stage.x]\nseed = 1\nnotes = "ö"\n', lambda path: read_toml(path, "")),
    "yaml": ("model:\n  d_model: 16\n", lambda path: read_yaml(path, {"model.d_model": "n_embd"})),
    "jsonl": (RECORDS, lambda path: read_records(str(path))),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("form", ["utf-8", "utf-8-sig", "CRLF", "blank lines"])
def test_utf8_is_taken_in_every_form(tmp_path, kind, form):
    text, read = READERS[kind]
    path = tmp_path / f"x.{kind}"
    path.write_text(text)
    plain = read(path)
    encoding = "utf-8-sig" if form == "utf-8-sig" else "utf-8"
    if form == "CRLF":
        text = text.replace("\n", "\r\n")
    if form == "blank lines":
        text += "\n\n"
    path.write_bytes(text.encode(encoding))
    assert read(path) == plain


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "form, words",
    [
        ("utf-16", "looks like UTF-16"),
        ("latin-1", "looks like"),
        ("zero byte", "has a zero byte"),
        ("missing", "No such file"),
        ("folder", "Is a directory"),
    ],
)
def test_what_is_not_utf8_text_is_one_line_with_the_file(tmp_path, kind, form, words):
    text, read = READERS[kind]
    path = tmp_path / f"x.{kind}"
    if form == "utf-16":
        path.write_bytes(text.encode("utf-16"))
    elif form == "latin-1":
        path.write_bytes(text.encode() + "# größer\n".encode("latin-1"))
    elif form == "zero byte":
        path.write_bytes(text.encode() + b"\0\n")
    elif form == "folder":
        path.mkdir()
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert words in message and f"x.{kind}" in message and "\n" not in message


BAD = {
    "a space": '{"expr": "7 + 1", "result": 8}',
    "a leading zero": '{"expr": "07+1", "result": 8}',
    "powers": '{"expr": "9**9**9", "result": 1}',
    "a call": '{"expr": "1(2)", "result": 2}',
    "a number": "7",
    "a list": "[1]",
    "null": "null",
    "nothing": "",
    "an empty expression": '{"expr": "", "result": 0}',
    "infinity": '{"expr": "1+1", "result": Infinity}',
    "a float": '{"expr": "1+1", "result": 2.0}',
    "a truth": '{"expr": "0+1", "result": true}',
    "23 digits": '{"expr": "99999999999999999999999", "result": 99999999999999999999999}',
    "a very long number": '{"expr": "1+1", "result": ' + "9" * 5000 + "}",
    "other digits": '{"expr": "\u0661+1", "result": 2}',
    "a line end": '{"expr": "1+1\\n", "result": 2}',
    "no result": '{"expr": "1+1"}',
    "a deep list": "[" * 100_000,
    "half a record": '{"expr": "1+1", "res',
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_one_line_with_its_number(tmp_path, name):
    path = tmp_path / "x.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + f"{RECORDS}{BAD[name]}\n{RECORDS}".encode())
    with pytest.raises(UserError, match=r"x.jsonl:3: expected a record such as") as caught:
        read_records(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_an_endless_device_is_no_results_file():
    from support import ONE

    with pytest.raises(UserError, match="/dev/zero: is not a file; set RESULTS_FILE"):
        check_results(Path("/dev/zero"), ["run_id"], ONE)
