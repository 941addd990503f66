"""byte_knobs.py -- the knobs of a run that trains on the bytes of one text.

Promises: of these, only the text, its rows (how many, how long, and whether they go on), the number
of steps, the seed, the weights to start from and how much is validated move a figure; the others,
BYTE_RUN_KNOBS, may differ when a run is resumed. With ON_NAN=rollback, the learning rate may be
halved.
"""

from dataclasses import dataclass

from plumbing.knobs import ROOT, knob
from plumbing.run_knobs import RUN_KNOBS, RunKnobs


@dataclass(frozen=True)
class ByteRunKnobs(RunKnobs):
    data: str = knob("embedded", "text file, folder, pattern, wikipedia:tr, embedded", group="data")
    init_from: str = knob("", "weights file (.pth) to start from; empty: new weights")
    batch_size: int = knob(2, "rows of a step, over all ranks", low=1, group="batch")
    device_batch_size: int | None = knob(2, "rows of a micro-batch", low=1, none="auto")
    sequence_length: int = knob(4096, "bytes of a row", low=8)
    carry_state: bool = knob(True, "a row goes on where it ended; 0: rows come from random places")
    num_iterations: int = knob(50000, "number of optimizer steps", low=0)
    seed: int = knob(1337, "seed of initial weights, random windows and dropout", low=0)
    val_every: int = knob(
        2000, "steps between validations; 0: only the last", low=0, group="evaluation and saving"
    )
    val_bytes: int | None = knob(
        None, "bytes of a validation", low=8, none="all", group="evaluation and saving"
    )
    save_every: int = knob(2000, "steps between checkpoints; 0: only at the end", low=0)
    log_every: int = knob(10, "steps between log lines", low=1)
    on_nan: str = knob(
        "stop", "loss is nan: stop, or go back once, at half the lr", choices=("stop", "rollback")
    )
    recompute: bool = knob(
        False, "keep only the blocks' inputs for the backward pass", group="machine"
    )
    cuda_graph: bool | None = knob(
        None, "launch a step's passes as one; auto: on a GPU, unless RECOMPUTE=1", none="auto"
    )
    results_file: str = knob(
        str(ROOT / "experiments/results_scaled.csv"), "file that gets one row per run"
    )

    def __post_init__(self):
        if self.cuda_graph and (self.device == "cpu" or self.recompute):
            raise ValueError("CUDA_GRAPH=1 needs DEVICE=cuda and RECOMPUTE=0")

    @property
    def uses_cuda_graph(self) -> bool:
        if self.cuda_graph is None:
            return self.device == "cuda" and not self.recompute
        return self.cuda_graph


# A micro-batch moves a loss by rounding only.
BYTE_RUN_KNOBS = [*RUN_KNOBS, "device_batch_size", "log_every", "on_nan", "recompute", "cuda_graph"]
