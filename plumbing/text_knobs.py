"""text_knobs.py -- the knobs of a run that trains on one text, in epochs.

Promises: the text, its tokenizer, how much of it is used and how it is cut into batches are the
only ones that move a loss; the others, TEXT_RUN_KNOBS, may differ when a run is resumed. Defaults
and further spellings are those of the program that train_gpu.py follows.
"""

from dataclasses import dataclass

from plumbing.kernels import check_kernel
from plumbing.knobs import ROOT, knob
from plumbing.run_knobs import RUN_KNOBS, RunKnobs

VOCABULARY = {"gpt2": 50304, "bytes": 256}  # GPT-2's 50257 ids, padded to a multiple of 64


@dataclass(frozen=True)
class TextRunKnobs(RunKnobs):
    data: str = knob(
        "wikitext-2", "wikitext-2, wikitext-103, embedded, or a text file or folder", group="data"
    )
    tokenizer: str = knob(
        "auto", "auto: bytes for the embedded text, else gpt2", choices=("auto", *VOCABULARY)
    )
    vocab_size: int | None = knob(None, "number of token ids", low=2, high=65536, none="auto")
    max_train_samples: int | None = knob(None, "sequences of an epoch at most", low=1, none="all")
    max_val_samples: int | None = knob(None, "sequences validated at most", low=1, none="all")
    num_workers: int = knob(4, "batches made ahead of use", low=1)
    data_folder: str = knob(str(ROOT / "data"), "folder of downloaded texts and token shards")
    batch_size: int = knob(16, "sequences per step, over all ranks", low=1, group="batch")
    device_batch_size: int | None = knob(None, "sequences per micro-batch", low=1, none="auto")
    sequence_length: int = knob(1024, "tokens per sequence", low=2)
    carry_state: bool = knob(False, "each row goes on from its state after the last step")
    num_epochs: int = knob(10, "passes over the data", low=1)
    num_iterations: int | None = knob(None, "steps; auto: by NUM_EPOCHS", low=0, none="auto")
    seed: int = knob(1337, "seed of initial weights, order of the data and dropout", low=0)
    val_every: int | None = knob(
        None, "steps between validations", low=0, none="epoch", group="evaluation and saving"
    )
    final_test: bool = knob(
        True,
        "at the end, score the test split, and splits as one stream",
        group="evaluation and saving",
    )
    save_every: int = knob(1000, "steps between checkpoints", low=0, alias=("save_steps",))
    save_epochs: bool = knob(True, "a checkpoint also at the end of each epoch")
    compile: bool = knob(False, "compile the model's block", alias=("compile_model",), group="run")
    kernel: str = knob(
        "plain",
        "plain tensor code, or fla: the kernels of the package fla-core, on a GPU",
        choices=("plain", "fla"),
        group="machine",
    )
    gradient_checkpointing: bool = knob(
        False, "save memory: compute a block twice", group="machine"
    )
    tracker_project: str = knob(
        "hamt-competitive-llm",
        "project at the tracker's service",
        alias=("wandb_project",),
        group="evaluation and saving",
    )
    run_id: str = knob("", "name of the run, to resume it", alias=("run_name",))
    logs_folder: str = knob(
        str(ROOT / "logs"), "folder of logs, metrics and checkpoints", alias=("output_dir",)
    )
    results_file: str = knob(str(ROOT / "experiments/results_hamt.csv"), "file with a row per run")

    def __post_init__(self):
        check_kernel(self.kernel, self.device)

    @property
    def encoding(self) -> str:
        """The tokenizer's name."""
        if self.tokenizer != "auto":
            return self.tokenizer
        return "bytes" if self.data in ("embedded", "bytes") else "gpt2"

    @property
    def vocabulary(self) -> int:
        return self.vocab_size or VOCABULARY[self.encoding]


# The last three move a loss by rounding only.
TEXT_RUN_KNOBS = [*RUN_KNOBS, "max_val_samples", "num_workers", "data_folder", "final_test"]
TEXT_RUN_KNOBS += ["save_epochs", "tracker_project", "device_batch_size", "gradient_checkpointing"]
TEXT_RUN_KNOBS += ["kernel"]
