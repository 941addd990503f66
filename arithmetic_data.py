"""arithmetic_data.py -- data sets of arithmetic: records, generated sets, batches, what needs no
model.

Promises that the examples of a step are a function of seed, step and curriculum, whatever the
number of ranks, and that nothing of a validation or test set is drawn for training. A file of
records is checked line by line.

Shapes   N problems, T tokens
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

import arithmetic
from arithmetic import (
    BOS,
    IDS,
    VOCABULARY,
    Language,
    Problems,
    depth_labels,
    draw_split,
    evaluate_expr,
    hash_expr,
    problems_of,
    shares,
)
from plumbing.knobs import ROOT, UserError, knob

GENERATE = "generate"  # instead of a file's name: expressions are drawn
IGNORE = -100  # label of a token that is not scored
SOURCES = (arithmetic.__file__, __file__)
__all__ = ["VOCABULARY", "Data", "DataKnobs", "Problems"]  # what a trainer finds here


@dataclass(frozen=True)
class DataKnobs(Language):
    """The language, and which examples of it train, validate and test a model."""

    train_path: str = knob("data/pilot_train.jsonl", "records, or 'generate'", group="Data")
    val_path: str = knob("data/pilot_val.jsonl", "records, or 'generate'")
    test_path: str = knob("data/pilot_test_flat.jsonl", "records scored at the end, or ''")
    train_examples: int = knob(0, "size of a generated set; 0: every batch is fresh", low=0)
    val_examples: int = knob(1000, "generated validation examples", low=1)
    curriculum_exact: float = knob(
        0.0, "draw one more operand at this exact match of batches; 0: off", low=0, high=1
    )
    sequence_length: int = knob(32, "most tokens of a problem; longer ones are refused", low=8)
    num_epochs: int = knob(50, "passes over the training set", low=1)
    num_iterations: int | None = knob(None, "steps; auto: from NUM_EPOCHS", low=0, none="auto")
    batch_size: int = knob(32, "examples per step, over all ranks", low=1)
    seed: int = knob(42, "seed of weights, order, dropout and generated data", low=0)
    answer_only_loss: bool = knob(False, "score the answer and its end only")

    def __post_init__(self):
        super().__post_init__()
        is_endless = self.curriculum_exact > 0 or self.train_examples == 0
        if self.train_path == GENERATE and is_endless and self.num_iterations is None:
            raise ValueError(
                "TRAIN_PATH=generate has epochs only with TRAIN_EXAMPLES and without a curriculum; "
                "set NUM_ITERATIONS"
            )
        if self.curriculum_exact and self.train_path != GENERATE:
            raise ValueError("CURRICULUM_EXACT sorts generated examples: set TRAIN_PATH=generate")
        if self.curriculum_exact and not self.answer_only_loss:
            raise ValueError("CURRICULUM_EXACT needs the training answers: set ANSWER_ONLY_LOSS=1")


# The sections of a YAML file. Its keys are the knobs, most in the original's spelling.
SECTIONS = {
    "model": "d_model num_layers num_heads d_ff max_seq_len dropout use_rope tie_weights ffn_type",
    "data": "train_path val_path test_path max_seq_len train_examples val_examples "
    "curriculum_exact " + " ".join(f.name for f in fields(Language)),
    "training": "num_epochs num_iterations batch_size schedule warmdown_frac answer_only_loss "
    "grad_clip eval_interval val_every save_interval save_every",
    "training.optimizer": "lr muon_lr weight_decay warmup_steps betas",
    "logging": "log_interval use_wandb wandb_project tracker",
}
SECTIONS = {section: words.split() for section, words in SECTIONS.items()}
YAML = {f"{section}.{key}": key for section, keys in SECTIONS.items() for key in keys}
YAML |= {"model.name": "model_name", "training.optimizer.name": "optimizer"}
KNOB_OF = {"d_model": "n_embd", "num_layers": "n_layer", "num_heads": "n_head"}
KNOB_OF |= {"max_seq_len": "sequence_length", "learning_rate": "lr"}
FIXED = {
    "model.vocab_size": (35, "the tokenizer has 35 ids"),
    "data.use_steps": (False, "there are no steps in the text"),
    "data.step_masking_mode": ("none", "there are no steps in the text; see ANSWER_ONLY_LOSS"),
}


def how_to_make(path: str) -> str:
    """The command that writes a file of records, by the file's name."""
    prefix = Path(path).name.split("_")[0]
    sizes = "--num-train 0 --num-val 0 --num-test 1000 --minimal-pairs 1000"
    program = "generate_pilot_dataset.py"
    if "_depth" in Path(path).name:
        sizes = "--depths 3 4 5 --size 1000 --controls"
        program = "generate_depth3_dataset.py"
    command = f"make it with: python scripts/arith/{program} --output-dir {Path(path).parent}"
    if prefix == "pilot":
        return command
    return f"{command} --prefix {prefix} --operators=+- --held-out --dedup {sizes}"


def read_records(path: str) -> tuple[list[str], list[int]]:
    """Expressions and values of a .jsonl file, looked for here and then in the repository. Raises
    UserError, with the line's number, for what is no record."""
    place = Path(path) if Path(path).exists() else ROOT / path
    exprs: list[str] = []
    values: list[int] = []
    try:
        lines = place.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {how_to_make(path)}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            expr, value = record["expr"], record["result"]
            if type(expr) is not str or type(value) is not int or evaluate_expr(expr) != value:
                raise ValueError(f"{value!r:.60} is not the value of {expr!r:.60}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = 'expected a record such as {"expr": "1+2", "result": 3}'
            raise UserError(f"{path}:{number}: {wanted} ({error!s:.160})") from None
        exprs.append(expr)
        values.append(value)
    if not exprs:
        raise UserError(f"{path}: no records; {how_to_make(path)}")
    return exprs, values


def entropy_floor(problems: Problems, language: Language) -> float:
    """The lowest mean loss, in nats per token, of whoever does not know the expressions: the
    generator's own -log probability of operands, operators and brackets, with separator, answer and
    end for nothing. nan where the language cannot make an expression."""
    chances = shares(language, language.operands_max)
    operand_nats = math.log(language.operand_max - language.operand_min + 1)
    total = 0.0
    for expr in problems.exprs(language):
        numbers = [int(text) for text in re.findall(r"[0-9]+", expr)]
        template = re.sub(r"[-+*]", "o", re.sub(r"[0-9]+", "N", expr))
        in_range = language.operand_min <= min(numbers) <= max(numbers) <= language.operand_max
        if template not in chances or not in_range:
            return math.nan
        operator_nats = (len(numbers) - 1) * math.log(len(language.operators))
        total += len(numbers) * operand_nats + operator_nats - math.log(chances[template])
    return total / float((problems.lengths_N - 1).sum())


def breakdown(problems: Problems, exact_N: np.ndarray, language: Language) -> dict[str, dict]:
    """[exact match, problems] by depth, operators, operands, answer digits and characters."""
    groups: dict[str, dict[str, list]] = {}
    exprs = problems.exprs(language)
    for expr, value, exact in zip(exprs, problems.values_N.tolist(), exact_N, strict=True):
        keys = {
            "depth": max(depth_labels(expr)),
            "operators": "".join(sorted(set(re.findall(r"[-+*]", expr)))),
            "operands": len(re.findall(r"[0-9]+", expr)),
            "answer_digits": len(str(abs(value))),
            "chars": len(expr),
        }
        for name, key in keys.items():
            groups.setdefault(name, {}).setdefault(str(key), []).append(float(exact))
    shown = lambda scores: [round(sum(scores) / len(scores), 4), len(scores)]
    return {name: {k: shown(v) for k, v in sorted(g.items())} for name, g in groups.items()}


def baselines(problems: Problems, language: Language, common: int) -> dict[str, float]:
    """Exact match of a calculator that reads no brackets, and of always answering `common`."""
    blind = [evaluate_expr(re.sub(r"[()]", "", expr)) for expr in problems.exprs(language)]
    return {
        "paren_blind": float(np.mean(problems.values_N == blind)),
        "most_frequent": float(np.mean(problems.values_N == common)),
    }


class Data:
    """Training, validation and test problems, and which examples a step trains on: a function of
    seed, step and curriculum, whatever the number of ranks."""

    CHUNK = 16384  # fresh examples that are drawn together

    def __init__(self, cfg: DataKnobs):
        self.cfg = cfg
        sources = [cfg.train_path, cfg.val_path, *cfg.test_path.split()]
        records = {path: read_records(path) for path in sources if path != GENERATE}
        self.language = self.language_of(records.values(), GENERATE in sources)
        sets = {p: problems_of(*texts, self.language) for p, texts in records.items()}
        hashes = {hash_expr(e) for exprs, _ in records.values() for e in exprs}
        self.excluded = np.array(sorted(hashes), np.uint64)
        if cfg.val_path == GENERATE:  # the same for every seed
            usual = replace(self.language, deeper_share=0.0)
            rng = np.random.default_rng([1])
            sets[GENERATE] = draw_split(usual, rng, cfg.val_examples, "val", self.excluded)
        self.val = sets[cfg.val_path]
        self.tests = {path: sets[path] for path in cfg.test_path.split()}
        self.train = records.get(cfg.train_path) and sets[cfg.train_path]
        if cfg.train_path == GENERATE and cfg.train_examples:
            self.train = self.draw([cfg.seed, 3], cfg.train_examples)
        self.sample = self.train or self.draw([cfg.seed, 4], 4096)
        self.check_lengths(sets | {cfg.train_path: self.sample})
        self.epoch_steps = 0  # where there are no epochs
        if self.train and not cfg.curriculum_exact:
            self.epoch_steps = -(-len(self.train) // cfg.batch_size)
        self.total_steps = cfg.num_iterations
        if self.total_steps is None:
            self.total_steps = cfg.num_epochs * self.epoch_steps
        self.step_tokens = round(float((self.sample.lengths_N - 1).mean()) * cfg.batch_size)
        self.floor = 0.0
        if not cfg.answer_only_loss:
            self.floor = entropy_floor(self.val, self.language)
        self.order, self.pool, self.chunk = (
            lru_cache(maxsize=2)(f) for f in (self._order, self._pool, self._chunk)
        )
        if self.train and cfg.curriculum_exact:
            self.pool(cfg.operands_min)  # raises now rather than in the middle of training

    def language_of(self, records: Iterable[tuple], is_generated: bool) -> Language:
        """The language of the knobs, with as many answer digits as all values need."""
        language = Language(**{f.name: getattr(self.cfg, f.name) for f in fields(Language)})
        largest = language.largest if is_generated else 0
        for _, values in records:
            largest = max(largest, *map(abs, values))
        digits = language.digits_for(largest)
        if (self.cfg.answer_digits or digits) < digits:
            what = f"answers go up to {largest:,}; use {digits}, or auto"
            raise UserError(f"ANSWER_DIGITS={self.cfg.answer_digits}: {what}")
        return replace(language, answer_digits=self.cfg.answer_digits or digits)

    def check_lengths(self, sets: dict[str, Problems]) -> None:
        for name, problems in sets.items():
            longest = problems.lengths_N.max()
            if longest > self.cfg.sequence_length:
                over = (problems.lengths_N > self.cfg.sequence_length).sum()
                raise UserError(
                    f"{name}: {over} of {len(problems)} examples exceed SEQUENCE_LENGTH="
                    f"{self.cfg.sequence_length} tokens, up to {longest}; none is cut: raise it"
                )

    @property
    def content(self) -> list[list]:
        """What a resume compares."""
        tokens = self.train.tokens_NT.tobytes() if self.train else b""
        name = self.cfg.train_path
        return [[name, len(self.train or ()), hashlib.sha256(tokens).hexdigest()]]

    def draw(self, seeds: list[int], count: int, split: str = "train", most: int | None = None):
        rng = np.random.default_rng(seeds)
        return draw_split(self.language, rng, count, split, self.excluded, most)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.cfg.seed, 1, epoch]).permutation(len(self.train))

    def _chunk(self, number: int, most: int) -> Problems:
        count = max(self.CHUNK, self.cfg.batch_size)
        return self.draw([self.cfg.seed, 2, number, most], count, most=most)

    def _pool(self, most: int) -> np.ndarray:
        """Rows of the finite training set with at most so many operands."""
        at = np.arange(self.train.tokens_NT.shape[1])
        is_operator = np.isin(self.train.tokens_NT, [IDS[character] for character in "+-*"])
        counts = (is_operator & (at < self.train.starts_N[:, None])).sum(1) + 1
        rows = np.flatnonzero(counts <= most)
        if not len(rows):
            what = f"none has {most} operands, where the curriculum is; raise it"
            raise UserError(f"TRAIN_EXAMPLES={len(self.train)}: {what}")
        return rows

    def batch(self, step: int, switches: Sequence[int] = ()) -> Problems:
        """All examples of a step; the last batch of an epoch may be smaller. `switches` are the
        steps from which one more operand is drawn. Under a curriculum a finite set has no epochs:
        batches are drawn from the examples that are short enough, with replacement."""
        cfg, most = self.cfg, self.cfg.operands_max
        if cfg.curriculum_exact:
            most = cfg.operands_min + sum(step >= switch for switch in switches)
        if self.train is None:
            chunk, place = divmod(step, max(1, self.CHUNK // cfg.batch_size))
            start = place * cfg.batch_size
            return self.chunk(chunk, most).rows(slice(start, start + cfg.batch_size))
        if cfg.curriculum_exact:
            rng = np.random.default_rng([cfg.seed, 2, step])
            return self.train.rows(rng.choice(self.pool(most), cfg.batch_size))
        epoch, i = divmod(step, self.epoch_steps)
        return self.train.rows(self.order(epoch)[i * cfg.batch_size : (i + 1) * cfg.batch_size])


def inputs_and_labels(
    problems: Problems, answer_only: bool, rows: int, length: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, T) ids and labels, T the longest or `length`; IGNORE is the label of what is not
    scored, and of rows beyond the problems."""
    T = length or int(problems.lengths_N.max())
    tokens = problems.tokens_NT[:, :T]
    ids = np.zeros((rows, T), np.int64)
    ids[:, 0] = BOS
    ids[: len(problems), : tokens.shape[1]] = tokens
    at = np.arange(1, T)
    is_scored = at < problems.lengths_N[:, None]
    if answer_only:
        is_scored &= at >= problems.starts_N[:, None]
    labels = np.full((rows, T - 1), IGNORE)
    labels[: len(problems)] = np.where(is_scored, ids[: len(problems), 1:], IGNORE)
    return ids[:, :-1], labels


SCORES = "loss tokens answer_loss answer_tokens end_loss end_ok first_ok digits_ok exact".split()


def summary(table: np.ndarray) -> dict[str, float]:
    """Means over a score table. eos_after_gold is the original's "accuracy": whether the end is
    predicted after the whole gold answer was read. A model that always says "end" has 1."""
    s = dict(zip(SCORES, table.sum(0).tolist(), strict=True))
    n, loss = len(table), s["loss"] / s["tokens"]
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "exact_match": s["exact"] / n,
        "eos_after_gold": s["end_ok"] / n,
        "digit_accuracy": s["digits_ok"] / s["answer_tokens"],
        "first_token_accuracy": s["first_ok"] / n,
        "answer_loss": s["answer_loss"] / s["answer_tokens"],
        "end_loss": s["end_loss"] / n,
    }


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))
