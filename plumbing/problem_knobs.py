"""problem_knobs.py -- the knobs of a run that trains on problems, from files or drawn, in epochs.

Promises: the sets and the batches are the only ones that move a loss; the others,
PROBLEM_RUN_KNOBS, may differ when a run is resumed. Whoever lacks a file of records is told the
command that makes it. Names and defaults are those of
github.com/Nishal14/Step-free-arithmetic-transformers.
"""

from dataclasses import dataclass
from pathlib import Path

from plumbing.knobs import ROOT, knob
from plumbing.problems import GENERATE
from plumbing.run_knobs import RUN_KNOBS


@dataclass(frozen=True)
class ProblemKnobs:
    """To be inherited beside RunKnobs, some of which have other defaults here."""

    train_path: str = knob("data/pilot_train.jsonl", "file of records, or 'generate'", group="data")
    val_path: str = knob("data/pilot_val.jsonl", "file of records, or 'generate'")
    test_path: str = knob(
        "data/pilot_test_flat.jsonl", "files of records, separated by spaces, scored at the end"
    )
    train_examples: int = knob(0, "size of a generated set; 0: every batch is fresh", low=0)
    val_examples: int = knob(1000, "generated validation examples", low=1)
    sequence_length: int = knob(32, "most tokens of a problem; longer ones are refused", low=8)
    seed: int = knob(42, "seed of weights, order, dropout and generated data", low=0)
    config: str = knob("", "YAML file of knobs", group="machine")
    output_dir: str = knob("", "folder of the run, whose last part is its id")
    gpu_only: bool = knob(False, "abort where training would not run on a GPU")
    device: str = knob(
        "cpu", "where to train; cuda falls back to cpu", choices=("cpu", "cuda"), group="run"
    )
    compile: bool = knob(False, "compile the model's blocks with torch.compile")
    results_file: str = knob(str(ROOT / "experiments/results_arith.csv"), "gets one row per run")
    num_epochs: int = knob(50, "passes over the training set", low=1, group="training")
    num_iterations: int | None = knob(None, "steps; auto: from NUM_EPOCHS", low=0, none="auto")
    eval_interval: int = knob(5, "epochs between validations", low=1)
    save_interval: int = knob(10, "epochs between saved models", low=1)
    batch_size: int = knob(32, "examples per step, over all ranks", low=1)
    curriculum_exact: float = knob(
        0.0, "exact match of training batches that adds an operand; 0: off", low=0, high=1
    )
    answer_only_loss: bool = knob(False, "score the answer and its end only")
    val_every: int | None = knob(
        None,
        "steps between validations; auto: EVAL_INTERVAL, or a tenth of a run without epochs",
        low=0,
        none="auto",
        group="evaluation and saving",
    )
    save_every: int | None = knob(
        None,
        "steps between checkpoints; auto: SAVE_INTERVAL, or a tenth of a run without epochs",
        low=0,
        none="auto",
    )
    log_interval: int = knob(25, "steps between printed steps", low=1, group="logging")
    tracker_project: str = knob(
        "math-compact-pilot", "project at the tracker's service", alias=("wandb_project",)
    )

    def check_run(self) -> None:
        """Raise ValueError for knobs of the run and of its batches that do not fit together."""
        if self.output_dir and self.run_id not in ("", Path(self.output_dir).resolve().name):
            names = f"OUTPUT_DIR={self.output_dir} names the run, RUN_ID={self.run_id} differs"
            raise ValueError(f"{names}; leave one out")
        has_epochs = self.train_path != GENERATE
        if self.train_examples and not self.curriculum_exact:
            has_epochs = True
        if self.num_iterations is None and not has_epochs:
            raise ValueError(
                "TRAIN_PATH=generate has epochs only with TRAIN_EXAMPLES and without a curriculum; "
                "set NUM_ITERATIONS"
            )
        if self.curriculum_exact and self.train_path != GENERATE:
            what = "limits the operands of generated examples"
            raise ValueError(f"CURRICULUM_EXACT {what}: set TRAIN_PATH=generate")
        if self.curriculum_exact and not self.answer_only_loss:
            what = "reads the exact match of training answers"
            raise ValueError(f"CURRICULUM_EXACT {what}: set ANSWER_ONLY_LOSS=1 to measure it")


def how_to_make(path: str) -> str:
    """The command for a file of records that is not there: pilot_* as for configs/pilot.yaml,
    others as for configs/honest.yaml."""
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


# Of the files, ProblemBatches.content is compared.
PROBLEM_RUN_KNOBS = [*RUN_KNOBS, "config", "output_dir", "gpu_only", "log_interval"]
PROBLEM_RUN_KNOBS += ["eval_interval", "save_interval"]
PROBLEM_RUN_KNOBS += ["tracker_project", "train_path", "val_path", "test_path"]
