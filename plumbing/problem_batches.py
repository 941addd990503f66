"""problem_batches.py -- which problems each step trains on, and the curriculum that limits them.

Promises: the problems of a step are a function of seed, step and curriculum, so that any number of
ranks trains on the same ones and a resumed run needs no state of a reader. The curriculum is a
function of what the run has measured, and is saved with it.

Problems come from a finite set, in epochs that are shuffled anew, or are drawn fresh at every step.
Under a curriculum the first steps have the fewest operands, and a further operand comes once enough
of the answers are right.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from plumbing.exchange import StepStats
from plumbing.knobs import UserError
from plumbing.problems import BATCH_TAG, GENERATE, IGNORE, ORDER_TAG, Problems, inputs_and_labels
from plumbing.world import World


class BatchKnobs(Protocol):
    """The knobs that the batches read."""

    batch_size: int  # problems of a step, over all ranks
    sequence_length: int
    num_iterations: int | None
    num_epochs: int
    train_path: str
    operands_min: int
    operands_max: int
    curriculum_exact: float  # exact match that adds an operand; 0: no curriculum
    answer_only_loss: bool
    answer_format: str
    uses_cuda_graph: bool
    seed: int


class ProblemLanguage(Protocol):
    digits: int  # of an answer


class ProblemSets(Protocol):
    """What the batches are made of; arithmetic.DataSets is one."""

    language: ProblemLanguage
    train: Problems | None  # None: every batch is drawn
    val: Problems
    tests: dict[str, Problems]  # by their files' names
    sample: Problems  # as training is
    excluded: np.ndarray  # hashes of what is never drawn

    def operand_counts(self) -> np.ndarray:
        """(N,) of the training set."""

    def draw(self, seeds: list[int], count: int, most: int) -> Problems:
        """Training problems of at most `most` operands, the same for the same seeds."""


@dataclass
class Curriculum:
    """How far a curriculum is; a trainer's state inherits it, so that it is saved with that."""

    switches: list[int] = field(default_factory=list)  # steps from which one more operand is drawn
    # Running exact match of batches since the last switch was decided. The next SWITCH_DELAY ones
    # are still of the old stage and count: with a low threshold they may decide another switch.
    exact: float = 0.0

    SWITCH_DELAY = 8  # steps from a decision to its switch, whose batch is not made yet

    def hear(self, stats: StepStats, cfg: BatchKnobs, say: Callable[[str], None]) -> None:
        """Take one finished step into account."""
        if not cfg.curriculum_exact:
            return
        self.exact = 0.9 * self.exact + 0.1 * stats.metrics["train_exact"]
        operands = cfg.operands_min + len(self.switches) + 1
        if self.exact > cfg.curriculum_exact and operands <= cfg.operands_max:
            self.switches.append(stats.step + self.SWITCH_DELAY)
            self.exact = 0.0
            what = f"{operands} operands from step {self.switches[-1]} on"
            say(f"step:{stats.step} curriculum: {what}")


class ProblemBatches:
    """Batches of BATCH_SIZE problems, by step. Only a finite set without a curriculum has epochs.
    Raises UserError for a set without a problem that the curriculum could begin with."""

    CHUNK = 16384  # fresh problems that are drawn together

    def __init__(self, sets: ProblemSets, cfg: BatchKnobs, world: World):
        self.sets, self.cfg, self.world = sets, cfg, world
        self.train = sets.train
        self.epoch_steps = 0
        if self.train and not cfg.curriculum_exact:
            self.epoch_steps = math.ceil(len(self.train) / cfg.batch_size)
        self.total_steps = cfg.num_iterations
        if self.total_steps is None:
            self.total_steps = cfg.num_epochs * self.epoch_steps
        mean_tokens = float((sets.sample.lengths_N - 1).mean())
        self.step_tokens = round(mean_tokens * cfg.batch_size)
        # Successive steps share an order or a chunk.
        self.order = lru_cache(maxsize=2)(self._order)
        self.chunk = lru_cache(maxsize=2)(self._chunk)
        if self.train and cfg.curriculum_exact:
            self.counts_N = sets.operand_counts()
            if cfg.operands_min not in self.counts_N:
                what = f"none has {cfg.operands_min} operands, where the curriculum starts"
                raise UserError(f"TRAIN_EXAMPLES={len(self.train)}: {what}; raise it")

    def _order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.cfg.seed, ORDER_TAG, epoch])
        return rng.permutation(len(self.train))

    def _chunk(self, number: int, most: int) -> Problems:
        count = max(self.CHUNK, self.cfg.batch_size)
        return self.sets.draw([self.cfg.seed, BATCH_TAG, number, most], count, most)

    def problems(self, step: int, switches: Sequence[int] = ()) -> Problems:
        """All problems of a step; the last batch of an epoch may be smaller. `switches` are the
        steps from which one more operand is drawn. Under a curriculum, batches of a finite set are
        drawn from the problems that are short enough, with replacement."""
        cfg, most = self.cfg, self.cfg.operands_max
        if cfg.curriculum_exact:
            most = cfg.operands_min + sum(step >= switch for switch in switches)
        if self.train is None:
            chunk, place = divmod(step, max(1, self.CHUNK // cfg.batch_size))
            start = place * cfg.batch_size
            return self.chunk(chunk, most).rows(slice(start, start + cfg.batch_size))
        if cfg.curriculum_exact:
            rng = np.random.default_rng([cfg.seed, BATCH_TAG, step])
            short_enough = np.flatnonzero(self.counts_N <= most)
            return self.train.rows(rng.choice(short_enough, cfg.batch_size))
        epoch, i = divmod(step, self.epoch_steps)
        return self.train.rows(self.order(epoch)[i * cfg.batch_size : (i + 1) * cfg.batch_size])

    def make(self, step: int, switches: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's inputs and labels of the step, and the number of labels over all ranks. Every
        rank makes the whole batch, BATCH_SIZE rows as long as its longest problem, so that all
        ranks see one shape. A CUDA graph needs the same shape at every step."""
        cfg = self.cfg
        length = cfg.sequence_length if cfg.uses_cuda_graph else 0
        problems = self.problems(step, switches)
        x, y = inputs_and_labels(problems, cfg.answer_only_loss, cfg.batch_size, length)
        num_labels = torch.tensor(float((y != IGNORE).sum()))
        rows = self.world.share(cfg.batch_size)
        return torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), num_labels

    @property
    def content(self) -> list[list]:
        """What a resume compares; not the paths, so that a file may have another name. Validation
        and test sets decide what is kept out of drawn problems, and how many digits an answer has:
        with other ones, a resumed run could be scored on what it was trained on."""
        tokens = self.train.tokens_NT.tobytes() if self.train else b""
        excluded = self.sets.excluded
        if self.cfg.train_path != GENERATE:
            excluded = excluded[:0]
        digits = self.sets.language.digits
        if self.cfg.answer_format == "plain":  # of any number of digits
            digits = 0
        return [
            ["training set", len(self.train or ()), hashlib.sha256(tokens).hexdigest()],
            ["answer digits", digits],
            ["excluded expressions", len(excluded), hashlib.sha256(excluded.tobytes()).hexdigest()],
        ]

    @property
    def facts(self) -> dict[str, object]:
        """For the log and --dry_run."""
        cfg, digits = self.cfg, self.sets.language.digits
        return {
            "Train dataset size": len(self.train) if self.train else "fresh at every step",
            "Validation dataset size": len(self.sets.val),
            "answer": f"{cfg.answer_format}, up to {digits} digits",
            "tokens_per_step": f"{self.step_tokens:,}, mean of {cfg.batch_size} examples",
        }
