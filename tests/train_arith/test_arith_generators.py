"""The records of scripts/arith/generate_*_dataset.py."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from arith_support import ROOT, make, records

from arithmetic import BUCKET_OF, BUCKETS, evaluate_expr, hash_expr
from plumbing import UserError

TEST = BUCKET_OF["test"]
SHA256 = {"pilot_train": "c883029c", "pilot_val": "8fcb60e1", "pilot_test_flat": "5a71f7b8"}
SHA256 |= {"pilot_test_paren": "f84a856d", "pilot_test_depth3": "7b407c97"}


@pytest.fixture(scope="module")
def pilot(tmp_path_factory) -> Path:
    """The original's five files."""
    folder = tmp_path_factory.mktemp("pilot")
    for program in ("generate_pilot_dataset.py", "generate_depth3_dataset.py"):
        make(program, folder)
    return folder


@pytest.mark.parametrize("name", SHA256)
def test_the_default_records_are_the_originals_byte_for_byte(pilot, name):
    assert (
        hashlib.sha256((pilot / f"{name}.jsonl").read_bytes()).hexdigest().startswith(SHA256[name])
    )


def test_the_first_training_record_is_the_documented_one(pilot):
    first = records(pilot / "pilot_train.jsonl")[0]
    assert first == dict(expr="4*36+29+95", result=268, depth=[0] * 10)
    assert list(first) == ["expr", "result", "depth"]


def test_other_flags_give_other_records_and_the_same_flags_the_same(tmp_path):
    flags = "--num-train 40 --num-val 0 --num-test 30 --operators +- --operand-min 5".split()
    flags += "--operand-max 20 --dedup".split()
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        make("generate_pilot_dataset.py", tmp_path / folder, *flags, "--seed", seed, "--balance")
    texts = [(tmp_path / folder / "pilot_train.jsonl").read_text() for folder in "abc"]
    assert texts[0] == texts[1] != texts[2]
    assert not (tmp_path / "a/pilot_val.jsonl").exists()
    found = [
        r
        for name in ("train", "test_flat", "test_paren")
        for r in records(tmp_path / f"a/pilot_{name}.jsonl")
    ]
    assert len(found) == 100 and len({r["expr"] for r in found}) == 100
    for r in found:
        assert r["result"] == evaluate_expr(r["expr"]) and "*" not in r["expr"]
        assert all(5 <= int(x) <= 20 for x in re.findall(r"\d+", r["expr"]))
    cells = [(max(r["depth"]), len(re.findall(r"\d+", r["expr"]))) for r in found[:40]]
    assert max(cells.count(cell) for cell in cells) == 5 and len(set(cells)) == 9


def test_minimal_pairs_differ_only_in_grouping_and_in_value(tmp_path):
    flags = "--num-train 0 --num-val 0 --num-test 40 --minimal-pairs 40 --held-out --dedup "
    flags += "--sensitive --prefix study"
    make("generate_pilot_dataset.py", tmp_path, *flags.split(), "--operators", "+-")
    found = records(tmp_path / "study_test_pairs.jsonl")
    assert len(found) == 80
    for one, two in zip(found[::2], found[1::2], strict=True):
        bare = [re.sub(r"[()]", "", r["expr"]) for r in (one, two)]
        assert bare[0] == bare[1] and one["pair"] == two["pair"]
        assert one["result"] != two["result"] and len(one["expr"]) == len(two["expr"])
        assert max(one["depth"]) == max(two["depth"])
    assert all(hash_expr(r["expr"]) % BUCKETS == TEST for r in found)
    for r in records(tmp_path / "study_test_paren.jsonl"):
        assert r["result"] != evaluate_expr(re.sub(r"[()]", "", r["expr"]))


def test_a_deep_record_and_its_control_share_operands_operators_and_length(tmp_path):
    flags = "--depths 3 4 5 --size 30 --controls --operators +- --held-out --dedup".split()
    make("generate_depth3_dataset.py", tmp_path, *flags)
    for depth in (3, 4, 5):
        deep, control = (
            records(tmp_path / f"pilot_test_depth{depth}{end}.jsonl") for end in ("", "_control")
        )
        assert len(deep) == len(control) == 30
        for one, two in zip(deep, control, strict=True):
            assert max(one["depth"]) == depth and max(two["depth"]) <= 2
            assert len(one["expr"]) == len(two["expr"])
            assert re.sub(r"[()]", "", one["expr"]) == re.sub(r"[()]", "", two["expr"])
            assert hash_expr(one["expr"]) % BUCKETS == TEST


@pytest.mark.parametrize(
    ("program", "flags", "words"),
    [
        ("generate_pilot_dataset.py", "--operators /", "expected some of + - *"),
        ("generate_pilot_dataset.py", "--min-depth 2 --max-depth 1", "swap them"),
        ("generate_pilot_dataset.py", "--operand-min 9 --operand-max 3", "0 <= min <= max"),
        (
            "generate_pilot_dataset.py",
            "--num-train 90 --operand-max 1 --dedup --max-depth 0",
            "records were found",
        ),
        ("generate_depth3_dataset.py", "--depths 2", "3 and deeper"),
        ("generate_depth3_dataset.py", "--depths 4", "add --controls"),
    ],
)
def test_flags_that_describe_no_records_are_refused_in_one_line(tmp_path, program, flags, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        make(program, tmp_path, *flags.split())
    assert "\n" not in str(error.value)


def test_a_generator_runs_from_any_folder(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts/arith/generate_depth3_dataset.py"),
        "--output-dir",
        "here",
        "--size",
        "3",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(records(tmp_path / "here/pilot_test_depth3.jsonl")) == 3, (
        done.stderr
    )
