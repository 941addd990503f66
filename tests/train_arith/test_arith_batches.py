"""Records and generated sets, the batches of a step, and what is refused."""

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from arith_support import ONE, ROOT, batches_of, make, records, write_records
from lib_arith import entropy_floor

from arithmetic import (
    BUCKET_OF,
    BUCKETS,
    EOS,
    DataSets,
    Language,
    depth_labels,
    draw_split,
    encode,
    exprs_of,
    hash_expr,
    problems_of,
    read_records,
    shares,
)
from plumbing import UserError, World
from plumbing.problem_batches import Curriculum, ProblemBatches
from plumbing.problems import IGNORE, inputs_and_labels
from train_arith import Knobs

VAL = BUCKET_OF["val"]
HONEST = dict(grammar="redundant", operators="+-", spaces=False, answer_only_loss=True)
HONEST |= dict(num_iterations=10)
FRESH = dict(train_path="generate", val_path="generate", test_path="")
STAGED = {**HONEST, **FRESH, "num_iterations": 100, "curriculum_exact": 0.5}


def of(folder: Path, **knobs) -> Knobs:
    files = dict(train_path="pilot_train", val_path="pilot_val", test_path="pilot_test_flat")
    paths = {name: str(folder / f"{file}.jsonl") for name, file in files.items()}
    return Knobs(**(paths | knobs))


def texts(data: ProblemBatches, step: int, switches: Sequence[int] = ()) -> list[str]:
    """The expressions of a step's batch."""
    return exprs_of(data.problems(step, switches), data.sets.language)


@pytest.fixture(scope="module")
def pilot(tmp_path_factory) -> Path:
    """The original's five files."""
    folder = tmp_path_factory.mktemp("pilot")
    for program in ("generate_pilot_dataset.py", "generate_depth3_dataset.py"):
        make(program, folder)
    return folder


def test_the_entropy_floor_of_the_pilots_validation_set_is_the_documented_one(pilot, tmp_path):
    data = DataSets(of(pilot))
    assert round(entropy_floor(data.val, data.language), 4) == 1.0760
    assert round(entropy_floor(data.train, data.language), 4) == 1.0753
    narrow = of(pilot, operand_max=50)
    assert np.isnan(entropy_floor(data.val, narrow)), "strings that the grammar cannot make"
    said = make("generate_pilot_dataset.py", tmp_path)
    assert "entropy floor of pilot_val: 1.0760 nats per token" in said


def test_a_share_of_the_training_examples_is_nested_one_deeper_and_no_other_example_changes():
    language = Language(operators="+-", grammar="redundant", operands_weights="1,3,6")
    deeper = replace(language, deeper_share=0.1)
    exprs = exprs_of(draw_split(deeper, np.random.default_rng(0), 20000, "train"), deeper)
    depths = np.array([max(depth_labels(expr)) for expr in exprs])
    assert depths.max() == 3 and np.mean(depths == 3) == pytest.approx(0.1, abs=0.01)
    usual, more = shares(language, 3), shares(deeper, 3)
    assert all(more[text] == pytest.approx(0.9 * share) for text, share in usual.items())
    assert sum(more.values()) == pytest.approx(1)
    data = DataSets(Knobs(val_examples=300, deeper_share=0.5, **FRESH, **HONEST))
    same = DataSets(Knobs(val_examples=300, **FRESH, **HONEST))
    assert exprs_of(data.val, data.language) == exprs_of(same.val, same.language)


def test_no_drawn_training_expression_is_in_any_test_set(tmp_path, pilot):
    flags = "--size 50 --controls --operators +- --held-out".split()
    make("generate_depth3_dataset.py", tmp_path, *flags)
    cfg = of(pilot, train_path="generate", **HONEST)
    data = batches_of(cfg)
    paths = [Path(cfg.val_path), Path(cfg.test_path), *tmp_path.glob("*.jsonl")]
    kept_out = {hash_expr(r["expr"]) for path in paths for r in records(path)}
    drawn = [texts(data, step) for step in range(400)]
    hashes = {hash_expr(e) for exprs in drawn for e in exprs}
    assert len(hashes) > 10_000 and not hashes & kept_out
    assert not {h % BUCKETS for h in hashes} & set(BUCKET_OF.values())
    free = draw_split(data.sets.language, np.random.default_rng(9), 12000, "train")
    assert {hash_expr(e) for e in exprs_of(free, data.sets.language)} & kept_out, (
        "the files' expressions do come up when they are not excluded"
    )


def test_validation_problems_are_different_ones_from_their_own_bucket_for_every_seed():
    data = DataSets(Knobs(val_examples=300, **FRESH, **HONEST))
    exprs = exprs_of(data.val, data.language)
    hashes = {hash_expr(e) for e in exprs}
    assert len(hashes) == 300 and {h % BUCKETS for h in hashes} == {VAL}
    other = DataSets(Knobs(val_examples=300, seed=7, **FRESH, **HONEST))
    assert exprs_of(other.val, other.language) == exprs


def test_a_batch_is_a_function_of_seed_and_step(monkeypatch):
    monkeypatch.setattr(ProblemBatches, "CHUNK", 1000)

    def drawn(seed: int, step: int) -> list[str]:
        return texts(batches_of(Knobs(seed=seed, **FRESH, **HONEST)), step)

    assert drawn(1, 5) == drawn(1, 5) != drawn(1, 6)
    assert drawn(2, 5) != drawn(1, 5)
    data = batches_of(Knobs(batch_size=100, seed=1, **FRESH, **HONEST))
    late = [texts(data, step) for step in (9, 10, 11, 0, 10)]
    assert late[1] == late[4] and late[0] != late[1] != late[2], "across two chunks, in any order"
    assert all(len(batch) == 100 for batch in late)


def test_a_finite_set_is_shuffled_anew_in_each_epoch_and_seen_whole(pilot):
    data = batches_of(of(pilot, batch_size=300))
    assert data.epoch_steps == 7 and data.total_steps == 350
    epochs = [[e for step in range(7) for e in texts(data, 7 * i + step)] for i in range(2)]
    whole = sorted(exprs_of(data.sets.train, data.sets.language))
    assert sorted(epochs[0]) == sorted(epochs[1]) == whole
    assert epochs[0] != epochs[1] and len(data.problems(6)) == 200


def test_a_fresh_example_that_could_be_too_long_is_refused_however_rare(tmp_path):
    rare = dict(operands_max=3, operands_weights="1,0.0000001", depth_max=0) | FRESH | HONEST
    DataSets(Knobs(sequence_length=15, val_examples=2, **rare))  # 1 + 8 characters, =, -297, end
    with pytest.raises(UserError, match="generate: examples of up to 15 exceed SEQUENCE_LENGTH=14"):
        DataSets(Knobs(sequence_length=14, val_examples=2, **rare))


def test_a_generated_validation_set_is_checked_beside_a_generated_training_set():
    knobs = dict(train_examples=1, val_examples=300, **FRESH, **HONEST)
    data = DataSets(Knobs(sequence_length=64, **knobs))
    short, long = data.train.lengths_N.max(), data.val.lengths_N.max()
    assert short < long
    with pytest.raises(UserError, match=f"validation set: examples of up to {long} exceed"):
        DataSets(Knobs(sequence_length=int(short), **knobs))


def test_a_drawn_test_set_is_refused_in_one_line(tmp_path):
    paths = write_records(tmp_path)
    for test_path in ("generate", f"{paths['test_path']} generate"):
        for others in (FRESH, paths):
            knobs = HONEST | others | dict(test_path=test_path)
            with pytest.raises(UserError, match="only files of records can be tested") as error:
                DataSets(Knobs(**knobs))
            assert "\n" not in str(error.value)


def test_a_resume_compares_what_the_drawn_examples_depend_on(tmp_path):
    paths = write_records(tmp_path)
    drawn = HONEST | dict(val_examples=9, answer_format="complement") | FRESH
    content = lambda **knobs: batches_of(Knobs(**(drawn | knobs))).content
    usual = content(test_path=paths["test_path"])
    renamed = Path(paths["test_path"]).rename(tmp_path / "renamed.jsonl")
    assert content(test_path=str(renamed)) == usual
    assert content(test_path=paths["val_path"]) != usual != content()
    (tmp_path / "large.jsonl").write_text('{"expr": "999+999", "result": 1998}\n')
    before, after = content(), content(test_path=str(tmp_path / "large.jsonl"))
    assert (before[1], after[1]) == (["answer digits", 3], ["answer digits", 4])
    files = dict(train_path=paths["train_path"], answer_format="plain", num_iterations=9)
    assert content(**files) == content(**files, test_path=str(tmp_path / "large.jsonl"))


def test_a_generated_finite_set_has_its_size():
    small, large = (batches_of(Knobs(train_examples=n, **FRESH, **HONEST)) for n in (100, 250))
    assert len(small.train) == 100 and len(large.train) == 250
    assert small.epoch_steps == 4


def operands(exprs: list[str]) -> set[int]:
    return {len(re.findall(r"\d+", e)) for e in exprs}


def test_the_curriculum_draws_one_more_operand_from_every_switch_on():
    data = batches_of(Knobs(batch_size=200, **STAGED))
    found = [operands(texts(data, step, [5, 9])) for step in (0, 4, 5, 8, 9)]
    assert found == [{2}, {2}, {2, 3}, {2, 3}, {2, 3, 4}]
    assert operands(texts(data, 50)) == {2}


def test_a_further_operand_comes_eight_steps_behind_its_decision_and_none_beyond_the_most():
    cfg, curriculum, said = Knobs(**STAGED), Curriculum(), []
    for step in range(1, 61):
        stats = SimpleNamespace(step=step, metrics={"train_exact": 1.0 if step > 20 else 0.4})
        curriculum.hear(stats, cfg, said.append)
    # 0.4 for 20 steps is below the threshold of 0.5; then the running mean passes it.
    assert curriculum.switches == [23 + 8, 30 + 8], "from 2 operands to 4, the most"
    assert said[0] == "step:23 curriculum: 3 operands from step 31 on" and len(said) == 2


def test_the_ranks_shares_of_a_step_are_its_batch(pilot):
    cfg = of(pilot, batch_size=7, answer_only_loss=True)
    x, y, num_labels = batches_of(cfg).make(5, [])
    assert len(x) == 7 and num_labels == (y != IGNORE).sum()
    parts = [batches_of(cfg, World(rank, 3, ONE.device)).make(5, []) for rank in range(3)]
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert torch.equal(torch.cat([part[1] for part in parts]), y)
    assert all(part[2] == num_labels for part in parts)


def test_under_a_curriculum_a_finite_set_gives_its_short_examples_first_and_then_all():
    data = batches_of(Knobs(train_examples=400, **STAGED))
    batches = [texts(data, step, [10, 20]) for step in range(100)]
    assert operands(batches[0]) == operands(batches[9]) == {2} and operands(batches[15]) == {2, 3}
    assert operands([e for batch in batches[20:] for e in batch]) == {2, 3, 4}
    whole = set(exprs_of(data.sets.train, data.sets.language))
    assert {e for batch in batches for e in batch} == whole, "of these examples, and each comes up"
    assert texts(data, 30, [10, 20]) == batches[30]
    assert data.total_steps == 100 and data.epoch_steps == 0


def test_a_finite_set_without_the_curriculums_first_operand_count_is_refused_before_training():
    with pytest.raises(UserError, match="TRAIN_EXAMPLES=1: none has 2 operands"):
        batches_of(Knobs(train_examples=1, operands_weights="0.0001,1,1", **STAGED))


def test_tokens_of_a_record_are_its_text_with_the_originals_spaces(pilot):
    data = DataSets(of(pilot))
    row, n = data.train.tokens_NT[0], data.train.lengths_N[0]
    assert row[:n].tolist() == encode("4*36+29+95 = 268") and data.train.starts_N[0] == 14
    assert (data.train.lengths_N.min(), data.train.lengths_N.max()) == (9, 30)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"expr": "1+2"}', "expected a record"),
        (b"x", "expected a record"),
        (b'{"expr": "9**9**9", "result": 1}', "not an arithmetic expression: '9**9**9'"),
        (b'{"expr": "1(2)", "result": 2}', "not an arithmetic expression: '1(2)'"),
        (b'{"expr": "", "result": 0}', "not an arithmetic expression: ''"),
        (b'{"expr": 7, "result": 7}', "7 is not the value of 7"),
        (b'{"expr": "07+1", "result": 8}', "not an arithmetic expression: '07+1'"),
        (b'{"expr": "1+2", "result": Infinity}', "inf is not the value of '1+2'"),
        (b'{"expr": "1+2", "result": 3.0}', "3.0 is not the value of '1+2'"),
        (b'{"expr": "1+2", "result": "3"}', "'3' is not the value of '1+2'"),
        (b'{"expr": "1+2", "result": 4}', "4 is not the value of '1+2'"),
        (b'{"expr": "1+2", "result": true}', "True is not the value of '1+2'"),
        (b'{"expr": "11111111111111111111111+1", "result": 2}', "not an arithmetic expression"),
        (b"[" * 100_000, "expected a record"),
        (b"7", "expected a record"),
        (b"", "expected a record"),
    ],
)
def test_a_line_that_is_no_record_is_refused_with_its_number(tmp_path, line, words):
    good = b'{"expr": "1+2", "result": 3}'
    (tmp_path / "r.jsonl").write_bytes(b"\n".join([good, line, good]))
    with pytest.raises(UserError, match=re.escape(words)) as error:
        read_records(str(tmp_path / "r.jsonl"))
    assert f"{tmp_path}/r.jsonl:2: " in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_records_that_are_not_utf8_are_refused_with_the_line(tmp_path):
    good = b'{"expr": "1+2", "result": 3}'
    (tmp_path / "r.jsonl").write_bytes(good + b'\n{"expr": "1+\xff2", "result": 3}\n' + good)
    with pytest.raises(UserError, match=r"r\.jsonl: line 2 is not UTF-8 \(byte 0xff") as error:
        read_records(str(tmp_path / "r.jsonl"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["\ufeff{}", "{}\n\n\n", "{}\r\n"])
def test_a_byte_order_mark_and_blank_last_lines_do_no_harm(tmp_path, text):
    record = '{"expr": "1+2", "result": 3}'
    (tmp_path / "r.jsonl").write_text(text.replace("{}", record), encoding="utf-8")
    assert read_records(str(tmp_path / "r.jsonl")) == (["1+2"], [3])


def test_records_that_cannot_be_used_are_refused_by_name(tmp_path):
    paths = write_records(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl: no records"):
        DataSets(Knobs(**(paths | dict(train_path=str(tmp_path / "empty.jsonl")))))
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot be read"):
        DataSets(Knobs(**(paths | dict(train_path="nowhere.jsonl"))))
    with pytest.raises(UserError, match="exceed SEQUENCE_LENGTH=12 tokens"):
        DataSets(Knobs(**(paths | dict(sequence_length=12))))
    with pytest.raises(UserError, match="ANSWER_DIGITS=1"):
        DataSets(Knobs(**(paths | dict(answer_digits=1, answer_format="reversed"))))


@pytest.mark.parametrize("name", ["pilot_train", "study_test_pairs", "study_test_depth4_control"])
def test_the_command_that_a_missing_file_names_makes_it(tmp_path, name):
    path = tmp_path / f"{name}.jsonl"
    with pytest.raises(UserError) as error:
        read_records(str(path))
    command = str(error.value).split("make it with: ")[1].split()
    command += ["--size", "20"] if "depth" in name else ["--num-test", "20"]
    command += ["--minimal-pairs", "20"] if "pairs" in name else []
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_records(str(path))[0]


def test_labels_cover_all_next_tokens_or_the_answer_and_its_end():
    problems = problems_of(["1+2", "10-2"], [3, 8], Knobs())
    x, y = inputs_and_labels(problems, False, 3)
    row = encode("1+2 = 3")
    assert x[0].tolist() == [*row[:-1], EOS][: x.shape[1]] and y[0].tolist() == [*row[1:], -100]
    assert (y[2] == -100).all() and x[2, 0] == 1
    _, y = inputs_and_labels(problems, True, 2)
    assert [v for v in y[0].tolist() if v != -100] == [*encode("3", False), EOS]
    wide, labels = inputs_and_labels(problems, False, 3, length=40)
    assert wide.shape == labels.shape == (3, 39)
    assert np.array_equal(wide[:2, : x.shape[1]], x[:2]) and not wide[:, 20:].any()
