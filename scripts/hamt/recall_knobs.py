"""recall_knobs.py -- what recall_bench.py can be asked to do."""

from dataclasses import dataclass

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import numpy as np
import recall_tasks as tasks
from lib import program
from recall_tasks import Alphabet, Sequences

import train_gpu
from plumbing import UserError, knob, read_knobs

MIXERS = ("hamt", "zero", "local", "attention", "attention_conv")
MEMORIES = dict(hamt="on", zero="off", local="local", attention="on", attention_conv="on")
# Streams of held-out sequences: one to choose a learning rate by, one to report.
SELECT, MEASURE = 1, 2
ENOUGH = 0.95  # accuracy whose first step is noted


@dataclass(frozen=True)
class Bench:
    # task
    task: str = knob("mqar", "what is asked", choices=tuple(tasks.TASKS))
    length: int = knob(128, "tokens of a training sequence", low=4)
    pairs: int = knob(8, "pairs of a training sequence; copy: symbols", low=1)
    keys: int = knob(64, "different keys", low=1)
    values: int = knob(64, "different values: chance is 1 / VALUES", low=2)
    fillers: int = knob(16, "different filler tokens", low=1)
    density: float = knob(0.5, "share of training tokens that are queries", above=0, high=1)
    # budget, of each model
    mixers: str = knob("hamt,zero,attention", f"with commas: {', '.join(MIXERS)}")
    steps: int = knob(300, "optimizer steps", low=1)
    batch_size: int = knob(32, "sequences per step", low=1)
    learning_rates: str = knob("3e-3", "peak rates of AdamW, with commas; the best is shown")
    weight_decay: float = knob(0.1, "of matrices only", low=0)
    warmup: int = knob(50, "steps of linear warm-up", low=0)
    seeds: int = knob(3, "models of each kind, seeds 0, 1, ...", low=1)
    rate_seeds: int | None = knob(
        None, "seeds with which every rate is tried; the best has all", low=1, none="all"
    )
    # model
    hidden_dim: int = knob(64, "model width, channels", low=2)
    hcm_dim: int = knob(128, "memory width, real numbers", low=2)
    num_layers: int = knob(2, "blocks", low=1)
    num_slots: int = knob(16, "slots of a head's memory", low=1)
    num_attention_heads: int = knob(2, "heads", low=1)
    slowest_decay: float = knob(
        2**-12,
        "of the slots' initial rates; the trainer's forgets in 100 tokens",
        above=0,
        high=0.25,
    )
    model: str = knob("", 'more of train_gpu.py\'s knobs: "name=value name=value"')
    # measurement
    eval_pairs: str = knob("1,2,4,8,16,32,64", "with commas; those that do not fit are left out")
    eval_lengths: str = knob("auto", "with commas, tokens; auto: 1, 2 and 4 times LENGTH")
    sequences: int = knob(300, "held-out sequences of a measurement", low=2)
    slot_sequences: int = knob(32, "sequences for slot statistics; 0: none", low=0)
    curve_every: int = knob(25, "steps between points of the learning curve", low=1)
    run: str = knob(
        "", "measure the slots of this run's checkpoint on its own text, and train nothing"
    )
    logs_folder: str = knob(str(program.ROOT / "logs"), "where that run is")
    device: str = knob("cpu", "where", choices=("cpu", "cuda"))
    out: str = knob("", "folder of the results; empty: experiments/recall/<date and time>")

    def __post_init__(self):
        if bad := [m for m in self.mixers.split(",") if m not in MIXERS]:
            raise ValueError(
                f"MIXERS={self.mixers}: no mixer {bad[0]!r}; there are {', '.join(MIXERS)}"
            )
        if any(rate <= 0 for rate in self.rates):
            raise ValueError(
                f"LEARNING_RATES={self.learning_rates}: expected numbers above 0, with commas"
            )
        if min(*self.numbers("eval_pairs"), *self.lengths) < 1:
            raise ValueError(
                f"EVAL_PAIRS={self.eval_pairs} and EVAL_LENGTHS={self.eval_lengths} must be 1 or "
                f"more"
            )
        # A ValueError where they do not fit
        self.sequences_of(np.random.default_rng(0), 1, self.length, self.pairs)

    def numbers(self, name: str, kind: type = int) -> list:
        try:
            return [kind(part) for part in getattr(self, name).split(",")]
        except ValueError:
            text = getattr(self, name)
            raise ValueError(
                f"{name.upper()}={text!r}: expected numbers with commas between them"
            ) from None

    @property
    def rates(self) -> list[float]:
        return self.numbers("learning_rates", float)

    @property
    def lengths(self) -> list[int]:
        return (
            [self.length, 2 * self.length, 4 * self.length]
            if self.eval_lengths == "auto"
            else self.numbers("eval_lengths")
        )

    @property
    def alphabet(self) -> Alphabet:
        return Alphabet(self.keys, self.values, self.fillers)

    def sequences_of(
        self, rng: np.random.Generator, B: int, T: int, pairs: int, **more: object
    ) -> Sequences:
        return tasks.TASKS[self.task](rng, B, T, self.alphabet, pairs, **more)

    def training(self, seed: int, step: int) -> Sequences:
        """The fresh sequences of a step: the same for all mixers and rates."""
        more = dict(density=self.density) if self.task in tasks.DENSE else {}
        rng = np.random.default_rng([seed, 0, step])
        return self.sequences_of(rng, self.batch_size, self.length, self.pairs, **more)

    def held_out(
        self, stream: int, n: int, T: int, pairs: int, distance: int | None = None
    ) -> Sequences:
        more = {} if distance is None else dict(distance=distance)
        return self.sequences_of(
            np.random.default_rng([20261121, stream, T, pairs, distance or 0]), n, T, pairs, **more
        )


def model_knobs(b: Bench, mixer: str, rate: float, seed: int) -> train_gpu.Knobs:
    """train_gpu.py's knobs for one model."""
    names = "hidden_dim hcm_dim num_layers num_slots num_attention_heads slowest_decay batch_size"
    names += " weight_decay device"
    values = {name: getattr(b, name) for name in names.split()} | dict(
        seed=seed, lr=rate, sequence_length=b.length
    )
    values |= dict(mixer="hamt", memory=MEMORIES[mixer])
    if mixer.startswith("attention"):
        values |= dict(mixer="attention", conv=int(mixer == "attention_conv"))
    values |= dict(vocab_size=b.alphabet.size, data="embedded", precision="fp32", dropout=0.0)
    values |= dict(num_iterations=b.steps, warmup_iters=b.warmup)
    given = [f"--{part}" for part in b.model.split()]
    if wrong := [part for part in given if "=" not in part]:
        raise UserError(f"--model {b.model!r}: {wrong[0][2:]!r} is not of the form name=value")
    return read_knobs(
        train_gpu.Knobs, {}, [f"--{name}={value}" for name, value in values.items()] + given, {}
    )
