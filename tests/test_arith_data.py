"""The records of scripts/generate_*_dataset.py, and the expressions that train_arith.py draws by itself."""

import hashlib
import importlib
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

from plumbing import UserError
from train_arith import (
    BUCKETS,
    TEST,
    VAL,
    Data,
    Knobs,
    depth_labels,
    draw,
    draw_split,
    encode,
    entropy_floor,
    evaluate_expr,
    hash_expr,
    most_operands,
    problems_of,
    read_answer,
    templates,
    write_answer,
)

sys.path.insert(0, str(ROOT / "scripts"))

NONE = np.empty(0, np.uint64)
SHA256 = {"pilot_train": "c883029c", "pilot_val": "8fcb60e1", "pilot_test_flat": "5a71f7b8"}
SHA256 |= {"pilot_test_paren": "f84a856d", "pilot_test_depth3": "7b407c97"}


def make(program: str, folder: Path, *flags: str) -> str:
    """Run a generator in this process; what it prints."""
    argv, sys.argv = sys.argv, [program, "--output-dir", str(folder), *flags]
    try:
        with redirect_stdout(StringIO()) as out:
            assert importlib.import_module(program.removesuffix(".py")).main() == 0
    finally:
        sys.argv = argv
    return out.getvalue()


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pilot(tmp_path_factory) -> Path:
    """The original's five files."""
    folder = tmp_path_factory.mktemp("pilot")
    for program in ("generate_pilot_dataset.py", "generate_depth3_dataset.py"):
        make(program, folder)
    return folder


def of(folder: Path, **knobs) -> Knobs:
    files = dict(train_path="pilot_train", val_path="pilot_val", test_path="pilot_test_flat")
    return Knobs(**({name: str(folder / f"{file}.jsonl") for name, file in files.items()} | knobs))


HONEST = dict(
    grammar="redundant", operators="+-", spaces=False, answer_only_loss=True, num_iterations=10
)


@pytest.mark.parametrize("name", SHA256)
def test_the_default_records_are_the_originals_byte_for_byte(pilot, name):
    assert (
        hashlib.sha256((pilot / f"{name}.jsonl").read_bytes()).hexdigest().startswith(SHA256[name])
    )


def test_the_first_training_record_is_the_documented_one(pilot):
    first = records(pilot / "pilot_train.jsonl")[0]
    assert first == dict(expr="4*36+29+95", result=268, depth=[0] * 10)
    assert list(first) == ["expr", "result", "depth"]


def test_depth_labels_count_an_opening_bracket_and_not_a_closing_one():
    assert depth_labels("(1+(2*3))") == [1, 1, 1, 2, 2, 2, 2, 1, 0]


def test_the_entropy_floor_of_the_pilots_validation_set_is_the_documented_one(pilot):
    data = Data(of(pilot))
    assert round(entropy_floor(data.val, data.k), 4) == 1.0760
    assert round(entropy_floor(data.train, data.k), 4) == 1.0753
    assert np.isnan(entropy_floor(data.val, of(pilot, operand_max=50))), (
        "strings that the grammar cannot make"
    )


def test_other_flags_give_other_records_and_the_same_flags_the_same(tmp_path):
    flags = "--num-train 40 --num-val 0 --num-test 30 --operators +- --operand-min 5 --operand-max 20 --dedup".split()
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
    flags = "--num-train 0 --num-val 0 --num-test 40 --minimal-pairs 40 --held-out --dedup --sensitive --prefix study"
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
        str(ROOT / "scripts/generate_depth3_dataset.py"),
        "--output-dir",
        "here",
        "--size",
        "3",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(records(tmp_path / "here/pilot_test_depth3.jsonl")) == 3, (
        done.stderr
    )


def test_the_numbers_of_templates_are_those_counted_by_hand():
    count = lambda grammar, n: [len(templates(n, depth, grammar)) for depth in range(4)]
    assert count("trees", 2) == [1, 0, 0, 0]
    assert count("trees", 3) == [1, 2, 0, 0]
    assert count("trees", 4) == [1, 6, 4, 0]
    assert count("redundant", 2) == [1, 1, 1, 1]
    assert count("redundant", 3) == [1, 3, 5, 7]
    # Schroeder's second problem: all bracketings of n letters
    assert [sum(len(templates(n, d, "trees")) for d in range(9)) for n in (2, 3, 4, 5, 6)] == [
        1,
        3,
        11,
        45,
        197,
    ]
    assert set(templates(4, 2, "pilot")) < set(templates(4, 2, "redundant"))


DRAWN = [
    dict(),
    dict(
        operators="+-", grammar="redundant", spaces=False, answer_format="complement", operand_min=0
    ),
    dict(
        operators="+-",
        grammar="trees",
        answer_format="reversed",
        operands_max=6,
        depth_max=4,
        operand_max=999,
    ),
    dict(
        operators="*",
        operands_max=3,
        operand_sampling="balanced",
        operand_max=1234,
        grammar="redundant",
    ),
    dict(
        operators="-",
        grammar="redundant",
        answer_format="complement_bare",
        operands_weights="1,0,2",
    ),
]


@pytest.mark.parametrize("knobs", DRAWN)
def test_drawn_problems_are_what_encoding_their_text_and_value_gives(knobs):
    k = Knobs(**knobs)
    digits = len(str(2 * k.largest))
    problems, hashes = draw(k, np.random.default_rng(3), 400, k.operands_max, digits)
    exprs = problems.exprs(k)
    assert [evaluate_expr(e) for e in exprs] == problems.values_N.tolist()
    assert [hash_expr(e) for e in exprs] == hashes.tolist()
    again = problems_of(exprs, problems.values_N.tolist(), k, digits)
    for name in ("tokens_NT", "lengths_N", "starts_N"):
        assert np.array_equal(getattr(problems, name), getattr(again, name))
    numbers = [[int(x) for x in re.findall(r"\d+", e)] for e in exprs]
    assert {x for row in numbers for x in row} <= set(range(k.operand_min, k.operand_max + 1))
    assert {len(row) for row in numbers} == (
        {2, 4} if k.operands_weights else set(range(2, k.operands_max + 1))
    )
    depths = [max(depth_labels(e)) for e in exprs]
    assert max(depths) == k.depth_max and set(depths) <= set(range(k.depth_max + 1))


def test_balanced_operands_have_every_digit_count_alike():
    k = Knobs(operand_sampling="balanced", operand_max=9999, operators="+")
    problems, _ = draw(k, np.random.default_rng(0), 2000, 4, 9)
    lengths = np.array([len(x) for e in problems.exprs(k) for x in re.findall(r"\d+", e)])
    shares = [(lengths == n).mean() for n in (1, 2, 3, 4)]
    assert max(abs(share - 0.25) for share in shares) < 0.03


def test_no_drawn_training_expression_is_in_any_test_set(tmp_path, pilot):
    k = of(pilot, train_path="generate", **HONEST)
    make(
        "generate_depth3_dataset.py",
        tmp_path,
        *"--size 50 --controls --operators +- --held-out".split(),
    )
    data = Data(k)
    kept_out = {hash_expr(r["expr"]) for p in (k.val_path, k.test_path) for r in records(Path(p))}
    kept_out |= {hash_expr(r["expr"]) for path in tmp_path.glob("*.jsonl") for r in records(path)}
    drawn = data.split("train", [9], 12000)
    hashes = {hash_expr(e) for e in drawn.exprs(k)}
    assert not hashes & kept_out
    assert not {h % BUCKETS for h in hashes} & {TEST, VAL}
    free = draw_split(k, np.random.default_rng(9), 12000, "train", 4, 3, NONE)
    assert {hash_expr(e) for e in free.exprs(k)} & kept_out, (
        "the files' expressions do come up when they are not excluded"
    )


def test_validation_problems_are_different_ones_from_their_own_bucket():
    data = Data(
        Knobs(train_path="generate", val_path="generate", test_path="", val_examples=300, **HONEST)
    )
    exprs = data.val.exprs(data.k)
    assert len({hash_expr(e) for e in exprs}) == 300 and {
        hash_expr(e) % BUCKETS for e in exprs
    } == {VAL}
    other = Data(
        Knobs(
            train_path="generate",
            val_path="generate",
            test_path="",
            val_examples=300,
            seed=7,
            **HONEST,
        )
    )
    assert other.val.exprs(other.k) == exprs


def test_a_batch_is_a_function_of_seed_and_step():
    knobs = dict(train_path="generate", val_path="generate", test_path="", **HONEST)
    texts = lambda seed, step: Data(Knobs(seed=seed, **knobs)).batch(step).exprs(Knobs(**knobs))
    assert texts(1, 5) == texts(1, 5) != texts(1, 6)
    assert texts(2, 5) != texts(1, 5)


def test_a_finite_set_is_shuffled_anew_in_each_epoch_and_seen_whole(pilot):
    data = Data(of(pilot, batch_size=300))
    assert data.epoch_steps == 7 and data.total == 350
    epochs = [
        [e for step in range(7) for e in data.batch(7 * i + step).exprs(data.k)] for i in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(data.train.exprs(data.k))
    assert epochs[0] != epochs[1] and len(data.batch(6)) == 200


def test_a_generated_finite_set_has_its_size_and_grows_by_its_end():
    knobs = dict(train_path="generate", val_path="generate", test_path="", **HONEST)
    small, large = (Data(Knobs(train_examples=n, **knobs)) for n in (100, 250))
    assert len(small.train) == 100 and len(large.train) == 250


def test_the_curriculum_draws_few_operands_first():
    k = Knobs(train_path="generate", test_path="", val_path="generate", curriculum=0.2, **HONEST)
    assert [most_operands(step, k, 100) for step in (0, 9, 10, 19, 20, 99)] == [2, 2, 3, 3, 4, 4]
    assert [most_operands(step, Knobs(), 100) for step in (0, 99)] == [4, 4]
    first = Data(k).batch(0).exprs(k)
    assert {len(re.findall(r"\d+", e)) for e in first} == {2}


STAGED = {
    **HONEST,
    "num_iterations": 100,
    "curriculum": 0.2,
    "train_path": "generate",
    "val_path": "generate",
}


def test_under_a_curriculum_a_finite_set_gives_its_short_examples_first_and_then_all():
    data = Data(Knobs(train_examples=400, test_path="", **STAGED))
    whole = lambda batches: {e for batch in batches for e in batch}
    operands = lambda exprs: {len(re.findall(r"\d+", e)) for e in exprs}
    batches = [data.batch(step).exprs(data.k) for step in range(100)]
    assert [operands(batches[step]) for step in (0, 9)] == [{2}, {2}] and operands(batches[15]) == {
        2,
        3,
    }
    assert operands(whole(batches[20:])) == {2, 3, 4}
    assert whole(batches) == set(data.train.exprs(data.k)), "of these examples, and each comes up"
    assert (
        data.batch(30).exprs(data.k) == batches[30] and data.total == 100 and data.epoch_steps == 0
    )


def test_a_finite_set_without_the_curriculums_first_operand_count_is_refused_before_training():
    with pytest.raises(UserError, match="TRAIN_EXAMPLES=1: none has 2 operands"):
        Data(Knobs(train_examples=1, operands_weights="0.0001,1,1", test_path="", **STAGED))


@pytest.mark.parametrize("form", ["plain", "reversed", "complement", "complement_bare"])
def test_answers_are_read_back_as_written(form):
    for value in (0, 1, -1, 7, -268, 396, -297, 499, -500):
        text = write_answer(value, form, 3)
        assert read_answer(text, form) == value
        assert form == "plain" or len(text) == 3 + (form != "complement_bare")


def test_answer_formats_are_the_documented_ones():
    assert (
        write_answer(-5, "complement", 3) == "599-"
        and write_answer(-5, "complement_bare", 3) == "599"
    )
    assert (
        write_answer(-5, "reversed", 3) == "500-" and write_answer(268, "complement", 3) == "862+"
    )
    assert read_answer("12", "complement") is None and read_answer("-", "plain") is None
    assert read_answer("", "reversed") is None and read_answer("1+2", "plain") is None


def test_tokens_have_the_originals_ids_and_the_text_its_spaces(pilot):
    assert encode("0123456789+-*/()=ABCDEFabcdef ,", False) == list(range(4, 35))
    assert encode("1?") == [1, 5, 3, 2]
    data = Data(of(pilot))
    row, n = data.train.tokens_NT[0], data.train.lengths_N[0]
    assert row[:n].tolist() == encode("4*36+29+95 = 268") and data.train.starts_N[0] == 14
    assert (data.train.lengths_N.min(), data.train.lengths_N.max()) == (9, 30)
