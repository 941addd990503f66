"""Every reader of a file that people or crashes can change, against thousands of changed files.

What must hold: the file is read, or refused in one line (UserError); never a traceback, never a
hang; and what one program has taken, the next one that needs it takes too. FUZZ_EXAMPLES=20000
tries so many files per reader instead of the usual few; docs/reliability.md says what a long run
found. Cases that were found stand as examples of their own above the tests.
"""

import csv
import io
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import import_logs
import numpy as np
import pytest
import status
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lib import curves, logs
from lib.program import read_toml
from lib.progress import status_number
from lib.results import read_results
from lib.speedrun_logs import read_log
from lib.stages import read_stages
from lib.study import read_study
from support import ONE, ROOT

import plumbing
import train_arith
from arithmetic import Language, exprs_of, problems_of, read_records
from plumbing import UserError, append_result, read_knobs
from plumbing.checkpoints import checkpoint_problem, load_checkpoint
from plumbing.config import read_yaml
from plumbing.data import TokenShards, read_shard
from plumbing.problem_config import FIXED, yaml_keys
from plumbing.records import RunLog
from plumbing.results import check_results
from plumbing.run_ids import read_status

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
LONGEST_S = 5.0  # of CPU time for one small file

fuzz = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

# ----------------------------------------------------------------------------
# Files

# What turns up in broken files: numbers of all kinds, quotes, other encodings, other formats.
WORDS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xf6", b"\r", b"\n", b"\r\n", b"\n\n", b'"', b"'", b";",
    b"\t", b",", b",,", b" ", b"nan", b"inf", b"-1", b"1e999", b"0", b"9" * 30, b"9" * 5000, b"null",
    b"true", b"[]", b"{}", b"[" * 2000, b"{" * 2000, b"step:", b"=", b"\xe2\x80\xa8", b"\xc2\x85",
    "\u0661".encode(), b"finished", b"run_id", b"../../x", b"PK\x03\x04", b"\x1f\x8b", b"&a", b"*a",
    b"!!python/object", b"- ", b": ", b"#", b"__import__", b"**", b"(", b")",
]  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, sample: bytes) -> bytes:
    """A good file with a few changes: parts cut, doubled, moved, overwritten, words put in."""
    data = sample
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(("cut", "word", "byte", "drop", "double", "replace", "recode")))
        start = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from((1, 2, 4, 16, 64)))
        word = draw(st.sampled_from(WORDS))
        if kind == "cut":
            data = data[:start]
        elif kind == "word":
            data = data[:start] + word + data[start:]
        elif kind == "byte":
            data = data[:start] + draw(st.binary(max_size=4)) + data[start + length :]
        elif kind == "drop":
            data = data[:start] + data[start + length :]
        elif kind == "double":
            data = data[: start + length] + data[start:]
        elif kind == "replace" and data:
            old = data[start : start + draw(st.sampled_from((1, 2, 4)))]
            data = data.replace(old, word)[:100_000] if old else data
        elif kind == "recode":
            encoding = draw(st.sampled_from(("utf-16", "utf-8-sig", "utf-16-le", "cp1252")))
            data = data.decode("utf-8", "replace").encode(encoding, "replace")
    return data


@contextmanager
def one_line_or_fine() -> Iterator[None]:
    """UserError of one line is an answer; anything else is not, and neither is a hang."""
    began = time.process_time()
    try:
        yield
    except UserError as error:
        assert str(error).strip(), "a refusal without words"
        assert "\n" not in str(error), str(error)[:3000]
    assert time.process_time() - began < LONGEST_S


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# ----------------------------------------------------------------------------
# Shards

SHARD = np.zeros(256, "<i4")
SHARD[:3] = 20240520, 1, 300
SHARD = SHARD.tobytes() + np.arange(300, dtype="<u2").tobytes()


@fuzz
@given(data=changed(SHARD) | st.binary(max_size=2000))
def test_a_shard_is_read_as_its_header_says_or_refused(place, data):
    path = place / "s_000001.bin"
    path.write_bytes(data)
    with one_line_or_fine():
        shard = read_shard(path)
        assert len(shard) == np.frombuffer(data, "<i4", 3)[2] > 0
        shards = TokenShards(str(path))
        assert len(shards.read(0, shards.total)) == shards.total == shards.content[0][1]
        shards.check_ids(300, ONE)


# ----------------------------------------------------------------------------
# Results and metrics

COLUMNS = ["run_id", "seed", "attn_gate", "final_val_loss", "num_iterations", "notes", "status"]
RESULTS = (
    ",".join(COLUMNS) + "\na,1,none,3.25,100,LR=1,finished\n"
    'b,2,none,3.5,100,"x, y",finished\nc,1,headwise,3.125,100,,failed\n'
).encode()
NEW = dict(run_id="new", seed=7, attn_gate="none", final_val_loss=2.5, num_iterations=3, notes="")


@fuzz
@given(data=changed(RESULTS) | st.binary(max_size=300))
@example(data=RESULTS.replace(b"c,1", b"run_id,1"))
def test_a_results_file_that_a_trainer_takes_is_one_that_tables_take(place, data):
    path = place / "results.csv"
    path.write_bytes(data)
    is_read = False
    with one_line_or_fine():
        before, _ = read_results(path)
        is_read = True
        [row.number("final_val_loss") for row in before]
    path.write_bytes(data)
    with one_line_or_fine():
        check_results(path, COLUMNS, ONE)
        append_result(path, COLUMNS, NEW | {"status": "finished"}, ONE, may_be_there=True)
        assert is_read, "a trainer takes what the tables refuse"
        rows, _ = read_results(path)
        assert rows[-1]["run_id"] == "new" and rows[-1].number("final_val_loss") == 2.5
        assert [row.line for row in rows[: len(before)]] == [row.line for row in before]


METRICS = b"step,train_loss,val_loss,lr,train_time_s,tokens\n" + b"".join(
    b"%d,%.3f,%s,0.1,%d.5,%d\n" % (i, 5 - i / 9, b"4.5" if i % 4 == 0 else b"", i, i * 64)
    for i in range(1, 13)
)


@fuzz
@given(data=changed(METRICS) | st.binary(max_size=300))
def test_metrics_are_read_alike_by_curves_and_logs_or_refused(place, data):
    path = place / "metrics.csv"
    path.write_bytes(data)
    with one_line_or_fine():
        log = logs.read_log(path, "a")
        assert all(math.isfinite(loss) for loss in log.val.loss)
    with one_line_or_fine():
        points, _ = curves.read_metrics(path)
        assert all(math.isfinite(loss) for loss in points.loss)


# ----------------------------------------------------------------------------
# Settings

TOML = (ROOT / "experiments/studies/mini.toml").read_bytes()
STAGES = (ROOT / "experiments/stages_original.toml").read_bytes()
YAML = (ROOT / "configs/honest.yaml").read_bytes()


@fuzz
@given(data=changed(TOML))
def test_a_study_file_is_read_or_refused(place, data):
    path = place / "study.toml"
    path.write_bytes(data)
    try:
        read_study(path, {})
    except UserError as error:
        assert str(error)


@fuzz
@given(data=changed(STAGES))
def test_a_stages_file_is_read_or_refused(place, data):
    path = place / "stages.toml"
    path.write_bytes(data)
    with one_line_or_fine():
        assert read_stages(path) is not None
    with one_line_or_fine():
        assert isinstance(read_toml(path, ""), dict)


@fuzz
@given(data=changed(YAML) | changed(b"model:\n  d_model: 16\n  dropout: 0.1\n"))
def test_a_yaml_file_is_read_or_refused_and_so_are_its_knobs(place, data):
    path = place / "config.yaml"
    path.write_bytes(data)
    with one_line_or_fine():
        texts = read_yaml(str(path), yaml_keys(train_arith.Knobs), FIXED)
        cfg = read_knobs(train_arith.Knobs, train_arith.PRESETS, [], {}, config=texts)
        assert isinstance(cfg, train_arith.Knobs)


RECORDS = "".join(
    json.dumps({"expr": f"({i}+{i % 7})*2-{i}", "result": (i + i % 7) * 2 - i}) + "\n"
    for i in range(10, 16)
).encode()


@fuzz
@given(data=changed(RECORDS) | st.binary(max_size=200))
@example(data=b'{"expr": "9**9**9", "result": 1}\n')
def test_records_are_read_or_refused_and_can_be_written_as_tokens(place, data):
    path = place / "records.jsonl"
    path.write_bytes(data)
    with one_line_or_fine():
        exprs, values = read_records(str(path))
        problems = problems_of(exprs, values, Language())
        assert exprs_of(problems, Language()) == exprs
        assert problems.values_N.tolist() == values


# ----------------------------------------------------------------------------
# A run's own files


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        plumbing.save_checkpoint(folder, step, {"step": step, "w": torch.ones(4)}, ONE, keep=2)
    return folder


MANIFEST = (
    b'{\n "step": 2,\n "files": {\n  "state.pt": {\n   "bytes": 1234,\n   "sha256": "'
    + b"ab" * 32
    + b'"\n  }\n }\n}'
)


@fuzz
@given(data=changed(MANIFEST) | st.binary(max_size=200))
def test_a_changed_manifest_is_a_step_back_and_never_an_unverified_state(run_folder, data):
    path = run_folder / "step_000002"
    good = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(data)
    try:
        said = []
        with one_line_or_fine():
            assert checkpoint_problem(path)
            assert load_checkpoint(run_folder, ONE, said.append)["step"] == 1
            assert len(said) == 1 and "\n" not in said[0]
    finally:
        (path / "manifest.json").write_bytes(good)


@fuzz
@given(data=st.data())
def test_a_changed_state_is_a_step_back(run_folder, data):
    path = run_folder / "step_000002/state.pt"
    good = path.read_bytes()
    bad = data.draw(changed(good))
    path.write_bytes(bad)
    try:
        found = load_checkpoint(run_folder, ONE, lambda line: None)
        assert found["step"] == (2 if bad == good else 1)
    finally:
        path.write_bytes(good)


STATUS = (
    b'{\n "status": "running",\n "step": 6,\n "run_id": "a",\n "train_loss": 3.5,\n "pid": 12\n}\n'
)


@fuzz
@given(data=changed(STATUS) | st.binary(max_size=100))
@example(data=b'{"status": ["finished"]}')
@example(data=b'{"status": {}}')
@example(data=b'{"status": "running", "host": "x", "updated": 1e999, "step": 1e999}')
@example(data=b'{"status": "finished", "updated": 1e308, "val_loss": null, "step": "six"}')
@example(data=b"[" * 100_000)
def test_a_changed_status_does_not_keep_a_run_from_going_on(place, data):
    folder = place / "logs"
    (folder / "a").mkdir(parents=True, exist_ok=True)
    (folder / "a/status.json").write_bytes(data)
    assert isinstance(read_status(folder / "a/status.json"), dict)
    status.report(folder, None, 100)
    assert isinstance(status_number(read_status(folder / "a/status.json"), "step"), float)
    with one_line_or_fine():
        log = RunLog(folder, "a", ONE, 9, 100)
        log.close()


# ----------------------------------------------------------------------------
# Other people's logs

LOG = (
    "import torch\nprint(1)\n" + "=" * 100 + "\nRunning pytorch 2.9\n" + "=" * 100 + "\n"
    "step:0/20 val_loss:10.8 train_time:0ms step_avg:nanms\n"
    + "".join(f"step:{i}/20 train_loss:{9 - i / 9:.4f} train_time:{i}ms\n" for i in range(1, 20))
    + "step:20/20 val_loss:3.2 train_time:20ms step_avg:1.00ms\n"
).encode()


@fuzz
@given(data=changed(LOG))
@example(data=LOG.replace(b"step:1/20", b"step:" + b"9" * 5000 + b"/20"))
def test_an_imported_log_is_one_that_tables_and_curves_take(place, data):
    path, results = place / "log.txt", place / "imported.csv"
    path.write_bytes(data)
    results.unlink(missing_ok=True)
    with one_line_or_fine():
        for number, run in enumerate(read_log(path), start=1):
            run_id = import_logs.run_id_of(path, run, number)
            (place / "metrics.csv").write_text(import_logs.metrics_text(run))
            row = import_logs.row_of(run, run_id, number, "x")
            import_logs.append_rows(results, [row])
            try:
                logs.read_log(place / "metrics.csv", run_id)
                rows, problems = read_results(results)
            except UserError as error:
                raise AssertionError(
                    f"imported, and refused by the next program: {error}"
                ) from None
            assert not problems and rows[-1]["run_id"] == run_id
            assert csv.DictReader(io.StringIO(results.read_text()))
