"""run_knobs.py -- the knobs that every run has, whatever it trains.

Promises: one name and one meaning in all trainers. None of them moves a loss but FORK_FROM, which
forks.py compares by itself, so all of them may differ when a run is resumed. A trainer's Knobs
class inherits them, adds its own, and states another default by naming a knob again.
"""

import dataclasses
from dataclasses import dataclass

from plumbing.knobs import ROOT, knob
from plumbing.trackers import TRACKERS


@dataclass(frozen=True)
class RunKnobs:
    val_every: int = knob(
        125, "steps between validations; 0: only the last", low=0, group="evaluation and saving"
    )
    early_stop_patience: int = knob(
        0, "stop after so many validations without improvement; 0: never", low=0
    )
    early_stop_min_delta: float = knob(0.0, "nats that count as an improvement", low=0)
    target_loss: float | None = knob(
        None, "log when the validation loss first reaches this", none="off"
    )
    save_every: int = knob(500, "steps between checkpoints; 0: only at the end", low=0)
    keep: int = knob(2, "number of checkpoints that are kept", low=1)
    stop_after: int = knob(0, "stop after this step, for forks to start there; 0: off", low=0)
    fork_from: str = knob(
        "", "checkpoint of another run to start from, such as logs/ID/step_000200"
    )
    device: str = knob(
        "cuda", "where to train; nothing falls back by itself", choices=("cuda", "cpu"), group="run"
    )
    compile: bool = knob(True, "compile the model's blocks with torch.compile")
    tracker: str = knob("off", "service that is also sent all figures", choices=TRACKERS)
    run_id: str = knob("", "name of the run; that of an unfinished run resumes it", metavar="NAME")
    stage: str = knob("", "stage of a study, copied into the results row", metavar="NAME")
    logs_folder: str = knob(str(ROOT / "logs"), "folder of logs, metrics and checkpoints")
    results_file: str = knob(
        str(ROOT / "experiments/results.csv"), "file that gets one row per run"
    )
    dry_run: bool = knob(False, "show the plan, make its checks, and stop")


RUN_KNOBS = tuple(field.name for field in dataclasses.fields(RunKnobs))
