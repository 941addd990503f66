"""arithmetic.py -- the language of train_arith.py: expressions, their values and answers, drawing.

Values are those of the texts, no expression of a test or validation set is drawn for training in
any bracketing, and records are checked line by line.

    problems = draw_split(Language(operators="+-"), np.random.default_rng(0), 1000, "train")

Shapes   N problems, T tokens, M operands, W digits of an operand
Sources  tokenizer, templates: github.com/Nishal14/Step-free-arithmetic-transformers. Answers: Lee
         et al., arXiv 2307.03381. Constants of the hash: SplitMix64 (Steele et al. 2014)
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache

import numpy as np

from plumbing.knobs import UserError, knob
from plumbing.plain_text import read_json_lines
from plumbing.problem_knobs import ProblemKnobs, how_to_make
from plumbing.problems import BOS, EOS, GENERATE, HOLE, PAD, SAMPLE_TAG, SET_TAG, Problems

VOCABULARY = ["<PAD>", "<BOS>", "<EOS>", "<UNK>", *"0123456789+-*/()=ABCDEFabcdef ,"]
UNK, ZERO = 3, 4  # beside the ids PAD, BOS and EOS
IDS = {character: i for i, character in enumerate(VOCABULARY)}
# The hash of its operands and operators, without brackets, puts an expression into one of 32
# buckets. One is kept for tests, one for validation; training draws from the other 30.
BUCKETS = 32
BUCKET_OF = {"test": 0, "val": 1}
GRAMMARS = ("pilot", "redundant")  # the original's 18 templates; all bracketings, also ((1+2))
FORMATS = ("plain", "reversed", "complement", "complement_bare")


@dataclass(frozen=True)
class Language:
    """Which expressions are drawn, how often, and how a problem is written down."""

    grammar: str = knob("pilot", "which bracketings there are", group="data", choices=GRAMMARS)
    operators: str = knob("+-*", "operators to draw from, some of + - *")
    operand_min: int = knob(1, "smallest operand", low=0)
    operand_max: int = knob(99, "largest operand", low=1)
    operands_min: int = knob(2, "fewest operands of an expression", low=2)
    operands_max: int = knob(4, "most operands of an expression", low=2, high=9)
    operands_weights: str = knob("", "weight of each operand count, such as 1,1,1.5; empty: alike")
    depth_min: int = knob(0, "smallest depth of nested brackets", low=0)
    depth_max: int = knob(2, "largest depth of nested brackets", low=0, high=8)
    deeper_share: float = knob(
        0.0, "share of training examples nested one deeper than DEPTH_MAX", low=0, high=1
    )
    answer_format: str = knob("plain", "how a value is written", choices=FORMATS)
    answer_digits: int | None = knob(None, "digits of an answer", low=1, high=17, none="auto")
    spaces: bool = knob(True, "write a space on both sides of '='")

    def __post_init__(self):
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"OPERATORS={self.operators!r}: expected some of + - *, such as +-")
        for name in ("operand", "operands", "depth"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                name = name.upper()
                raise ValueError(f"{name}_MIN={low} is above {name}_MAX={high}; swap them")
        deepest = self.depth_max + (self.deeper_share > 0)
        if self.grammar == "pilot" and (self.operands_max > 4 or deepest > 2):
            raise ValueError("GRAMMAR=pilot ends at 4 operands and depth 2; use GRAMMAR=redundant")
        if self.largest > 10**17:
            most = f"OPERAND_MAX={self.operand_max} and OPERANDS_MAX={self.operands_max}"
            raise ValueError(f"{most} give values beyond 1e17; lower one of the two")
        count = self.operands_max - self.operands_min + 1
        numbers = re.fullmatch(r"\d+\.?\d*(,\d+\.?\d*)*", self.operands_weights)
        if self.operands_weights and (not numbers or len(self.weights) != count):
            what = f"one number >= 0 per operand count, {count} with commas"
            raise ValueError(f"OPERANDS_WEIGHTS={self.operands_weights!r}: expected {what}")

    @property
    def weights(self) -> list[float]:
        return [float(text) for text in self.operands_weights.split(",") if text]

    @property
    def largest(self) -> int:
        """No drawn value has a larger magnitude."""
        summed = self.operands_max * self.operand_max
        product = self.operand_max**self.operands_max
        if self.operand_max == 1:  # as (1+1+1)*(1+1+1)
            product = int(3 ** (self.operands_max / 3))
        return max(summed, product) if "*" in self.operators else summed

    @property
    def separator(self) -> str:
        return " = " if self.spaces else "="

    @property
    def digits(self) -> int:
        return self.answer_digits or self.digits_for(self.largest)

    def digits_for(self, largest: int) -> int:
        """Digits that values up to +-largest need. The last digit of a bare complement also holds
        the sign, so it reaches half as far."""
        return len(str(2 * largest if self.answer_format == "complement_bare" else largest))


# ---------------- Tokens, values and answers


def encode(text: str, special: bool = True) -> list[int]:
    """Character ids, between BOS and EOS when `special`; an unknown character is UNK."""
    ids = [IDS.get(character, UNK) for character in text]
    return [BOS, *ids, EOS] if special else ids


def decode(ids: Sequence[int]) -> str:
    """The text without PAD, BOS and EOS."""
    return "".join(VOCABULARY[int(i)] for i in ids if int(i) not in (PAD, BOS, EOS))


EXPRESSION = re.compile(r"\(*N\)*([-+*]\(*N\)*)*".replace("N", "(0|[1-9][0-9]{0,17})"))


def evaluate_expr(expr: str) -> int:
    """The value of an expression of + - * and brackets over numbers of at most 18 digits. Raises
    ValueError for any other text. To Python the pattern leaves one fault: an unmatched bracket."""
    problem = f"not an arithmetic expression: {expr!r:.60}"
    if len(expr) > 200 or not EXPRESSION.fullmatch(expr):
        raise ValueError(f"{problem}; expected numbers, + - * and brackets, as in (12-7)*30")
    try:
        value = eval(expr, {"__builtins__": {}})
    except SyntaxError:
        raise ValueError(f"{problem}; its brackets do not match") from None
    if abs(value) >= 2**63:
        raise ValueError(f"{problem} of 64-bit integers")
    return value


def depth_labels(expr: str) -> list[int]:
    """Nesting depth of each character: '(' counts itself, ')' does not."""
    steps = [(character == "(") - (character == ")") for character in expr]
    return np.cumsum(steps, dtype=int).tolist()


def digit_tokens(numbers: np.ndarray, width: int, strip: bool) -> np.ndarray:
    """(..., W) ids, most significant digit first; `strip` makes leading zeros holes."""
    powers_W = 10 ** np.arange(width - 1, -1, -1)
    digits = numbers[..., None] // powers_W % 10 + ZERO
    if strip:
        digits[(numbers[..., None] < powers_W) & (powers_W > 1)] = HOLE
    return digits


def answer_tokens(values_N: np.ndarray, language: Language) -> np.ndarray:
    """Ids of the written values, with holes. plain: the number. Others have ANSWER_DIGITS digits,
    least significant first. reversed: |value|, then the sign. complement: value mod 10^digits
    (ten's complement), then the sign, so that each digit depends on lower ones only.
    complement_bare: without the sign, which the last digit tells: from 5 on it is negative."""
    sign_N = np.where(values_N < 0, IDS["-"], IDS["+"])
    if language.answer_format == "plain":
        width = len(str(max(language.largest, abs(values_N).max())))
        minus_N = np.where(values_N < 0, sign_N, HOLE)
        return np.column_stack([minus_N, digit_tokens(abs(values_N), width, strip=True)])
    bodies_N = values_N % 10**language.digits
    if language.answer_format == "reversed":
        bodies_N = abs(values_N)
    written = digit_tokens(bodies_N, language.digits, strip=False)[:, ::-1]
    if language.answer_format == "complement_bare":
        return written
    return np.column_stack([written, sign_N])


def problems_of(exprs: Sequence[str], values: Sequence[int], language: Language) -> Problems:
    """Written expressions and their values as token sequences."""
    texts = [[BOS, *encode(expr + language.separator, special=False)] for expr in exprs]
    heads = np.full((len(texts), max(map(len, texts))), HOLE)
    for row, text in zip(heads, texts, strict=True):
        row[: len(text)] = text
    values_N = np.array(values, np.int64)
    return Problems.packed(heads, answer_tokens(values_N, language), values_N)


def exprs_of(problems: Problems, language: Language) -> list[str]:
    """The expressions of problems that are written in this language."""
    ends = problems.starts_N - len(language.separator)
    return [decode(row[1:end]) for row, end in zip(problems.tokens_NT, ends, strict=True)]


# ---------------- Grammar: a template is a bracketing, with N for an operand and o for an operator

PILOT = (  # the original's templates, in its order
    "NoN NoNoN NoNoNoN (NoN) (NoN)oN No(NoN) (NoNoN) (NoN)o(NoN) (NoNoN)oN No(NoNoN) ((NoN)) "
    "((NoN)oN) (No(NoN)) ((NoN))oN No((NoN)) ((NoN)o(NoN)) (No(NoN))oN No((NoN)oN)"
)


@cache
def nestings(n: int, depth: int) -> list[str]:
    """Templates of n operands, at most `depth` deep; a bracket holds at least two operands."""

    def items(m: int) -> list[str]:
        if m == 1:
            return ["N"]
        return [f"({text})" for text in nestings(m, depth - 1)] if depth else []

    splits = [(first, m) for m in range(1, n) for first in items(m)]
    return [f"{first}o{rest}" for first, m in splits for rest in nestings(n - m, depth)] + items(n)


@cache
def templates(n: int, depth: int, grammar: str) -> list[str]:
    """All templates of exactly n operands and exactly this depth."""
    texts = PILOT.split() if grammar == "pilot" else nestings(n, depth)
    return [text for text in texts if text.count("N") == n and max(depth_labels(text)) == depth]


@lru_cache(maxsize=16)
def shares(language: Language, most: int) -> dict[str, float]:
    """The probability of each template of at most `most` operands: the operand count is drawn by
    its weight, then a depth that it allows, then a template. Raises UserError when none fits."""
    counts = range(language.operands_min, most + 1)
    depths = range(language.depth_min, language.depth_max + 1)
    found = {}
    for i, n in enumerate(counts):
        cells = [cell for depth in depths if (cell := templates(n, depth, language.grammar))]
        for cell in cells:
            weight = language.weights[i] if language.weights else 1.0
            found |= dict.fromkeys(cell, weight / len(cells) / len(cell))
    total = sum(found.values())
    if total <= 0:
        what = f"no template has {counts.start} to {most} operands"
        what += f" and depth {depths.start} to {depths[-1]}"
        raise UserError(f"GRAMMAR={language.grammar}: {what}; change a range")
    found = {text: share / total for text, share in found.items()}
    if language.deeper_share:
        depth = language.depth_max + 1
        deeper = replace(language, depth_min=depth, depth_max=depth, deeper_share=0.0)
        found = {text: share * (1 - language.deeper_share) for text, share in found.items()}
        for text, share in shares(deeper, most).items():
            found[text] = share * language.deeper_share
    return found


# ---------------- Drawing

ROUND, ROUNDS = 65536, 40  # examples drawn together; how often at least, before giving up


def hash_of(operands_NM: np.ndarray, operators_NM: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """uint64 of operands and operators in their order. Of expressions that differ in brackets
    alone, all are held out or none is."""
    hashes_N = np.full(len(counts_N), 0x9E3779B97F4A7C15, np.uint64)
    for i, (operand_N, operator_N) in enumerate(zip(operands_NM.T, operators_NM.T, strict=True)):
        operator_N = np.where(i + 1 < counts_N, operator_N, 0)
        x = hashes_N ^ (operand_N * 64 + operator_N).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashes_N = np.where(i < counts_N, x ^ (x >> np.uint64(31)), hashes_N)
    return hashes_N


def hash_expr(expr: str) -> int:
    """hash_of a written expression; modulo BUCKETS it is the expression's bucket."""
    operands = [int(text) for text in re.findall(r"[0-9]+", expr)]
    operators = [IDS[text] for text in re.findall(r"[-+*]", expr)] + [0]
    return int(hash_of(np.array([operands]), np.array([operators]), np.array([len(operands)]))[0])


def draw(
    language: Language, rng: np.random.Generator, count: int, most: int | None = None
) -> tuple[Problems, np.ndarray]:
    """`count` problems of at most `most` operands, from all buckets, and their hashes."""
    chances = shares(language, most or language.operands_max)
    texts = list(chances)
    which_N = rng.choice(len(texts), count, p=list(chances.values()))
    counts_N = np.array([text.count("N") for text in texts])[which_N]
    shape = (count, language.operands_max)
    operands_NM = rng.integers(language.operand_min, language.operand_max + 1, shape)
    drawn_NM = rng.integers(0, len(language.operators), shape)
    drawn_NM[np.arange(shape[1]) >= counts_N[:, None] - 1] = 0
    written = digit_tokens(operands_NM, len(str(language.operand_max)), strip=True)
    separator = encode(language.separator, special=False)
    longest = max(map(len, texts)) + shape[1] * (written.shape[2] - 1)
    heads = np.full((count, 1 + longest + len(separator)), HOLE)
    heads[:, 0] = BOS
    heads[:, 1 + longest :] = separator
    values_N = np.empty(count, np.int64)
    # Problems of the same template and operators are evaluated together.
    patterns = np.column_stack([which_N, drawn_NM])
    patterns, pattern_N = np.unique(patterns, axis=0, return_inverse=True)
    for i, (which, *operators) in enumerate(patterns):
        rows = np.flatnonzero(pattern_N == i)
        code = texts[which]
        # In a shorter template, operands and operators that are too many replace nothing.
        for m, operator in enumerate(operators):
            code = code.replace("N", f"x{m}", 1).replace("o", language.operators[operator], 1)
        operands = {f"x{m}": column for m, column in enumerate(operands_NM[rows].T)}
        values_N[rows] = eval(code, {"__builtins__": {}}, operands)
        columns = []
        for part in re.findall(r"x\d|.", code):
            is_operand = part in operands
            ids = written[rows, int(part[1])] if is_operand else np.full((len(rows), 1), IDS[part])
            columns.append(ids)
        block = np.concatenate(columns, 1)
        heads[rows, 1 : 1 + block.shape[1]] = block
    operators_NM = np.array(encode(language.operators, special=False))[drawn_NM]
    problems = Problems.packed(heads, answer_tokens(values_N, language), values_N)
    return problems, hash_of(operands_NM, operators_NM, counts_N)


def longest_problem(language: Language) -> int:
    """No drawn problem has more tokens: the longest expression with the longest answer."""
    chances = shares(language, language.operands_max).items()
    operand = str(language.operand_max)
    expr = max(len(text.replace("N", operand)) for text, chance in chances if chance)
    value = -language.largest if "-" in language.operators else language.largest
    answer = answer_tokens(np.array([value]), language) != HOLE
    return len([BOS, EOS]) + expr + len(language.separator) + answer.sum()


def draw_split(
    language: Language,
    rng: np.random.Generator,
    count: int,
    split: str,
    excluded: np.ndarray | None = None,
    most: int | None = None,
) -> Problems:
    """`count` problems of train, val or test, from its own buckets, without the hashes `excluded`;
    those of val and test are all different. Raises UserError when the split has too few."""
    found: list[Problems] = []
    missing = count
    seen = np.empty(0, np.uint64) if excluded is None else excluded
    tries = 1.1 if split == "train" else BUCKETS  # per problem
    for _ in range(ROUNDS + int(2 * count * tries) // ROUND):
        wanted = int(missing * tries) + 16
        problems, hashes_N = draw(language, rng, min(wanted, ROUND), most)
        buckets_N = hashes_N % np.uint64(BUCKETS)
        good_N = ~np.isin(hashes_N, seen)
        if split == "train":
            good_N &= ~np.isin(buckets_N, list(BUCKET_OF.values()))
        else:
            first = np.zeros_like(good_N)
            first[np.unique(hashes_N, return_index=True)[1]] = True
            good_N &= first & (buckets_N == BUCKET_OF[split])
            seen = np.concatenate([seen, hashes_N[good_N]])
        found.append(problems.rows(np.flatnonzero(good_N)[:missing]))
        missing -= len(found[-1])
        if missing == 0:
            return Problems.joined(found)
    different = f"{count - missing} of {count} different {split} expressions"
    raise UserError(f"only {different} were found; widen the ranges")


# ---------------- Records and sets

VAL_SEEDS = [1]  # of the validation set


@dataclass(frozen=True)
class DataKnobs(ProblemKnobs, Language):
    """The language, and where training, validation and test problems come from."""


def read_record(record: dict) -> tuple[str, int]:
    """Expression and value. Raises ValueError, KeyError or TypeError for what is no record."""
    expr, value = record["expr"], record["result"]
    if type(expr) is not str or type(value) is not int or evaluate_expr(expr) != value:
        raise ValueError(f"{value!r:.60} is not the value of {expr!r:.60}")
    return expr, value


def read_records(path: str) -> tuple[list[str], list[int]]:
    """Expressions and values of a .jsonl file, looked for here, then in the repository."""
    wanted = 'a record such as {"expr": "1+2", "result": 3}'
    pairs = read_json_lines(path, read_record, wanted, how_to_make(path))
    return [expr for expr, _ in pairs], [value for _, value in pairs]


class DataSets:
    """Training, validation and test problems in the language that all of them need."""

    def __init__(self, cfg: DataKnobs):
        self.cfg = cfg
        if GENERATE in cfg.test_path.split():
            raise UserError(f"TEST_PATH={cfg.test_path}: only files of records can be tested")
        sources = [cfg.train_path, cfg.val_path, *cfg.test_path.split()]
        records = {path: read_records(path) for path in sources if path != GENERATE}
        self.language = self.language_of(records.values(), GENERATE in sources)
        sets = {path: problems_of(*pair, self.language) for path, pair in records.items()}
        hashes = {hash_expr(expr) for exprs, _ in records.values() for expr in exprs}
        self.excluded = np.array(sorted(hashes), np.uint64)
        self.val = sets.get(cfg.val_path)
        if cfg.val_path == GENERATE:  # for every SEED the same, no deeper than DEPTH_MAX
            usual = replace(self.language, deeper_share=0.0)
            rng = np.random.default_rng(VAL_SEEDS)
            self.val = draw_split(usual, rng, cfg.val_examples, "val", self.excluded)
            sets["validation set"] = self.val
        self.tests = {path: sets[path] for path in cfg.test_path.split()}
        self.train: Problems | None = None  # no set: every batch is drawn
        if cfg.train_path != GENERATE:
            self.train = sets[cfg.train_path]
        elif cfg.train_examples:
            self.train = self.draw([cfg.seed, SET_TAG], cfg.train_examples)
            sets["training set"] = self.train
        self.check_lengths(sets)
        self.sample = self.train or self.draw([cfg.seed, SAMPLE_TAG], 4096)  # as training is

    def language_of(self, records: Iterable[tuple], is_generated: bool) -> Language:
        """The language of the knobs, with as many answer digits as all values need."""
        language = Language(**{f.name: getattr(self.cfg, f.name) for f in fields(Language)})
        values = [value for _, column in records for value in column]
        if is_generated:
            values.append(language.largest)
        largest = max(map(abs, values))
        digits = language.digits_for(largest)
        if (self.cfg.answer_digits or digits) < digits:
            what = f"answers go up to {largest:,}; use {digits}, or auto"
            raise UserError(f"ANSWER_DIGITS={self.cfg.answer_digits}: {what}")
        return replace(language, answer_digits=self.cfg.answer_digits or digits)

    def check_lengths(self, sets: dict[str, Problems]) -> None:
        lengths = {name: problems.lengths_N.max() for name, problems in sets.items()}
        if self.train is None:
            lengths[self.cfg.train_path] = longest_problem(self.language)
        for name, longest in lengths.items():
            if longest > self.cfg.sequence_length:
                limit = f"SEQUENCE_LENGTH={self.cfg.sequence_length} tokens; raise it"
                raise UserError(f"{name}: examples of up to {longest} exceed {limit}")

    def operand_counts(self) -> np.ndarray:
        """(N,) operands of each training expression."""
        exprs = exprs_of(self.train, self.language)
        return np.array([len(re.findall(r"[0-9]+", expr)) for expr in exprs])

    def draw(self, seeds: list[int], count: int, most: int | None = None) -> Problems:
        """Training problems of at most `most` operands, the same for the same seeds."""
        rng = np.random.default_rng(seeds)
        return draw_split(self.language, rng, count, "train", self.excluded, most)
