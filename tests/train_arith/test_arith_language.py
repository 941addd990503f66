"""arithmetic.py: values, answers, templates, drawing, and what the parser refuses."""

import ast
import operator
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from view_attention import read_answer

import arithmetic
from arithmetic import (
    BUCKET_OF,
    BUCKETS,
    FORMATS,
    GRAMMARS,
    Language,
    answer_tokens,
    decode,
    depth_labels,
    draw,
    draw_split,
    encode,
    evaluate_expr,
    exprs_of,
    hash_expr,
    longest_problem,
    problems_of,
    templates,
)
from plumbing import UserError

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value_of_tree(node: ast.AST) -> int:
    """An expression's value by walking its syntax tree: nothing of this is in arithmetic.py."""
    if isinstance(node, ast.BinOp):
        combine = OPERATORS[type(node.op)]
        return combine(value_of_tree(node.left), value_of_tree(node.right))
    assert isinstance(node, ast.Constant)
    return node.value


def write_answer(value: int, language: Language) -> str:
    (ids,) = answer_tokens(np.array([value]), language)
    return decode(ids[ids >= 0])


@st.composite
def languages(draw_from) -> Language:
    grammar = draw_from(st.sampled_from(GRAMMARS))
    most = draw_from(st.integers(2, 4 if grammar == "pilot" else 5))
    smallest = draw_from(st.integers(0, 20))
    return Language(
        grammar=grammar,
        operators=draw_from(st.sampled_from(["+", "-", "*", "+-", "-*", "+-*"])),
        operand_min=smallest,
        operand_max=draw_from(st.integers(max(1, smallest), 1200)),
        operands_min=draw_from(st.integers(2, most)),
        operands_max=most,
        depth_max=draw_from(st.integers(0, 2 if grammar == "pilot" else 3)),
        answer_format=draw_from(st.sampled_from(FORMATS)),
        spaces=draw_from(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(languages(), st.integers(0, 2**32))
def test_every_drawn_problem_is_its_text_with_its_value_in_its_language(language, seed):
    problems, hashes = draw(language, np.random.default_rng(seed), 60)
    exprs = exprs_of(problems, language)
    trees = [value_of_tree(ast.parse(expr, mode="eval").body) for expr in exprs]
    assert problems.values_N.tolist() == trees == [evaluate_expr(expr) for expr in exprs]
    assert hashes.tolist() == [hash_expr(expr) for expr in exprs]
    again = problems_of(exprs, trees, language)
    for row, other, n in zip(problems.tokens_NT, again.tokens_NT, problems.lengths_N, strict=True):
        assert row[:n].tolist() == other[:n].tolist() and not row[n:].any()
    assert np.array_equal(problems.starts_N, again.starts_N)
    for expr in exprs:
        numbers = [int(text) for text in re.findall(r"\d+", expr)]
        assert language.operands_min <= len(numbers) <= language.operands_max
        assert language.operand_min <= min(numbers) <= max(numbers) <= language.operand_max
        assert language.depth_min <= max(depth_labels(expr)) <= language.depth_max
        assert set(re.sub(r"[\d()]", "", expr)) <= set(language.operators)


@settings(max_examples=40, deadline=None)
@given(languages(), st.integers(0, 2**32), st.data())
def test_every_answer_is_read_back_as_it_was_written(language, seed, data):
    value = data.draw(st.integers(-language.largest, language.largest))
    for v in (value, 0, language.largest, -language.largest):
        assert read_answer(write_answer(v, language), language.answer_format) == v
    problems, _ = draw(language, np.random.default_rng(seed), 30)
    ends = zip(problems.starts_N, problems.lengths_N, strict=True)
    for row, (start, end), v in zip(problems.tokens_NT, ends, problems.values_N, strict=True):
        assert read_answer(decode(row[start:end]), language.answer_format) == v


@settings(max_examples=25, deadline=None)
@given(languages(), st.integers(0, 2**32))
def test_no_test_or_validation_expression_is_ever_drawn_for_training(language, seed):
    rng = np.random.default_rng(seed)
    _, hashes = draw(language, rng, 20)  # whatever bucket they fall into
    try:
        drawn = draw_split(language, rng, 300, "train", hashes)
    except UserError:
        return  # a language so small that all of it is kept out
    trained = {hash_expr(expr) for expr in exprs_of(drawn, language)}
    assert not trained & set(hashes.tolist())
    assert not {h % BUCKETS for h in trained} & set(BUCKET_OF.values())


def test_expressions_that_are_not_kept_out_do_come_up():
    language, rng = Language(operands_max=2, operand_max=9), np.random.default_rng(0)
    _, hashes = draw(language, rng, 20)
    drawn = draw_split(language, rng, 3000, "train")
    assert {hash_expr(expr) for expr in exprs_of(drawn, language)} & set(hashes.tolist())


@pytest.mark.parametrize("split", ["test", "val"])
def test_held_out_problems_are_different_ones_from_their_own_bucket(split):
    language = Language(operators="+-", grammar="redundant")
    exprs = exprs_of(draw_split(language, np.random.default_rng(1), 300, split), language)
    hashes = {hash_expr(expr) for expr in exprs}
    assert len(hashes) == 300 and {h % BUCKETS for h in hashes} == {BUCKET_OF[split]}


def test_a_split_that_is_too_small_is_refused_with_what_was_found():
    language = Language(operand_max=2, operands_max=2, depth_max=0, operators="+")
    with pytest.raises(UserError, match=r"only \d of 50 different test expressions were found"):
        draw_split(language, np.random.default_rng(1), 50, "test")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_larger_split_may_take_more_rounds(monkeypatch, split):
    language = Language(operators="+-", grammar="redundant")
    monkeypatch.setattr(arithmetic, "ROUND", 64)
    count = 64 * 60 if split == "train" else 200
    problems = draw_split(language, np.random.default_rng(1), count, split)
    assert len(problems) == count


@settings(max_examples=40, deadline=None)
@given(languages(), st.integers(0, 2**32))
def test_no_drawn_problem_is_longer_than_the_longest_nor_its_value_larger(language, seed):
    problems, _ = draw(language, np.random.default_rng(seed), 300)
    assert problems.lengths_N.max() <= longest_problem(language)
    assert abs(problems.values_N).max() <= language.largest


@pytest.mark.parametrize("form", FORMATS)
def test_the_longest_problem_does_come_up(form):
    language = Language(operators="+*", operand_min=98, answer_format=form, operands_max=3)
    problems, _ = draw(language, np.random.default_rng(0), 3000)
    assert problems.lengths_N.max() == longest_problem(language)


@pytest.mark.parametrize("n", range(2, 10))
def test_no_value_of_ones_is_beyond_the_largest(n):
    best = {1: 1}
    for m in range(2, n + 1):
        best[m] = max(max(best[i] + best[m - i], best[i] * best[m - i]) for i in range(1, m))
    language = Language(grammar="redundant", operators="+*", operand_max=1, operands_max=n)
    assert language.largest == best[n]
    shipped = Language(grammar="redundant", operators="+-*", operands_max=min(n, 8))
    assert shipped.largest == max(99 ** min(n, 8), 99 * min(n, 8))


def test_a_value_of_ones_is_read_back():
    language = Language(grammar="redundant", operators="+*", operand_max=1, operands_max=7)
    language = replace(language, answer_format="reversed")
    value = evaluate_expr("(1+1+1)*(1+1+1+1)")
    assert read_answer(write_answer(value, language), "reversed") == value == 12


def test_groupings_of_the_same_numbers_share_a_hash_and_other_numbers_do_not():
    same = ["1-2-3", "1-(2-3)", "(1-2)-3", "((1-2-3))"]
    assert len({hash_expr(expr) for expr in same}) == 1
    assert len({hash_expr(expr) for expr in ["1-2-3", "1-2+3", "1-3-2", "1-2", "12-3"]}) == 5


@pytest.mark.parametrize(
    "text",
    [
        *("9**9**9", "1(2)", "", "Infinity", "07+1", "1" * 23, "1+", "+1", "-1", "1--2", "(1+2"),
        *("1+2)", ")1+2(", "()", "(1+2)3", "(1)(2)", "1/2", "1 + 2", "1_0+1", "0x1+1", "1.5+1"),
        *("1+2\n", "a+b", "(" * 101 + "1" + ")" * 101, "1+" * 120 + "1", "\u0661+1"),
        "(" * 99 + "1+2" + ")" * 98,
    ],
)
def test_the_parser_admits_nothing_but_arithmetic(text):
    with pytest.raises(ValueError, match="not an arithmetic expression") as error:
        evaluate_expr(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_values_beyond_64_bits_are_refused():
    assert evaluate_expr("999999999*999999999") == 999999998000000001
    with pytest.raises(ValueError, match="64-bit"):
        evaluate_expr("999999999*999999999*999999999")


def test_depth_labels_count_an_opening_bracket_and_not_a_closing_one():
    assert depth_labels("(1+(2*3))") == [1, 1, 1, 2, 2, 2, 2, 1, 0]


def test_the_numbers_of_templates_are_those_counted_by_hand():
    count = lambda grammar, n: [len(templates(n, depth, grammar)) for depth in range(4)]
    assert count("redundant", 2) == [1, 1, 1, 1]
    assert count("redundant", 3) == [1, 3, 5, 7]
    assert count("pilot", 2) == [1, 1, 1, 0]
    assert count("pilot", 3) == [1, 3, 4, 0]
    assert count("pilot", 4) == [1, 3, 3, 0]
    # Schroeder's second problem: all bracketings of n letters, without doubled or outer brackets
    for n, wanted in ((2, 1), (3, 3), (4, 11), (5, 45), (6, 197)):
        every = [text for depth in range(n) for text in templates(n, depth, "redundant")]
        assert len([text for text in every if not is_doubled(text)]) == wanted
    assert set(templates(4, 2, "pilot")) < set(templates(4, 2, "redundant"))


def is_doubled(template: str) -> bool:
    """Whether a bracket holds nothing but another bracket, or all of the template."""
    text = f"({template})"
    while (shorter := re.sub(r"\((N(?:oN)+)\)", "N", text)) != text:
        text = shorter
    return text != "N"


@pytest.mark.parametrize("weights", ["1,0,2", "0,0,1"])
def test_operand_counts_are_drawn_by_their_weights(weights):
    language = Language(operands_weights=weights)
    problems, _ = draw(language, np.random.default_rng(0), 3000)
    counts = [len(re.findall(r"\d+", expr)) for expr in exprs_of(problems, language)]
    total = sum(float(text) for text in weights.split(","))
    for n, text in zip((2, 3, 4), weights.split(","), strict=True):
        assert counts.count(n) / 3000 == pytest.approx(float(text) / total, abs=0.03)


def test_answer_formats_are_the_documented_ones():
    three = lambda form: Language(answer_format=form, answer_digits=3)
    assert write_answer(-5, three("complement")) == "599-"
    assert write_answer(-5, three("complement_bare")) == "599"
    assert write_answer(-5, three("reversed")) == "500-"
    assert write_answer(268, three("complement")) == "862+"
    assert write_answer(-268, three("plain")) == "-268"
    assert read_answer("12", "complement") is None and read_answer("-", "plain") is None
    assert read_answer("", "reversed") is None and read_answer("1+2", "plain") is None
    assert read_answer("", "complement_bare") is None


def test_ranges_without_a_template_are_named_with_both_their_ends():
    language = Language(operands_min=4, depth_min=2, operands_weights="0")
    with pytest.raises(UserError, match="no template has 4 to 4 operands and depth 2 to 2; change"):
        draw(language, np.random.default_rng(0), 1)


def test_tokens_have_the_originals_ids():
    assert encode("0123456789+-*/()=ABCDEFabcdef ,", False) == list(range(4, 35))
    assert encode("1?") == [1, 5, 3, 2] and decode([1, 5, 14, 6, 2, 0, 0]) == "1+2"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(operators="+/"), "OPERATORS='+/': expected some of + - *"),
        (dict(operand_min=50, operand_max=9), "OPERAND_MIN=50 is above OPERAND_MAX=9; swap them"),
        (dict(depth_min=2, depth_max=1), "DEPTH_MIN=2 is above DEPTH_MAX=1"),
        (dict(operands_max=6), "GRAMMAR=pilot ends at 4 operands"),
        (dict(grammar="redundant", operands_max=9, operand_max=99999), "values beyond 1e17"),
        (dict(operands_weights="1,2"), "OPERANDS_WEIGHTS='1,2': expected one number >= 0 per"),
        (dict(operands_weights="1,2,-1"), "OPERANDS_WEIGHTS='1,2,-1'"),
        (dict(operands_weights="1,2,x"), "OPERANDS_WEIGHTS='1,2,x'"),
        (dict(operands_weights="1,2,inf"), "OPERANDS_WEIGHTS='1,2,inf'"),
    ],
)
def test_a_language_that_cannot_be_is_refused_in_one_line(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        Language(**changes)
    assert "\n" not in str(error.value)
