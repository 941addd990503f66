"""epochs.py -- what a run in epochs says and leaves behind, in the words of the program it follows.

Promises one line per epoch with the mean training loss over its tokens, a JSON file of all
validations, whole at any time, and a summary at the end. All of it is saved with a checkpoint, so a
resumed run says and writes what an uninterrupted one does. The words and the keys of the file are
those of github.com/Nishal14/Step-free-arithmetic-transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch

from plumbing.checkpoints import save_json
from plumbing.exchange import StepStats
from plumbing.session import Session


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


@dataclass
class EpochRecord:
    """Pass it to session.save and session.restore beside the state of training."""

    loss_sum: float = 0.0  # of this epoch's tokens, in nats
    tokens: float = 0.0
    start_s: float = 0.0  # training time when the epoch began
    best_at: int = 0  # epoch, or step where there are no epochs, of the best validation
    history: list[dict] = field(default_factory=list)

    def hear(self, stats: StepStats, session: Session, tokens: float) -> None:
        """Take a finished step of so many tokens into account, and report the end of an epoch."""
        self.loss_sum += stats.loss * tokens
        self.tokens += tokens
        steps = session.steps_per_epoch
        if not steps or stats.step % steps:
            return
        mean = self.loss_sum / self.tokens
        session.say(f"Epoch {stats.step // steps}/{math.ceil(session.total_steps / steps)}")
        session.say(
            f"Train Loss: {mean:.4f} | Train Perplexity: {perplexity(mean):.2f} | "
            f"Time: {stats.spent_s - self.start_s:.2f}s"
        )
        self.loss_sum = 0.0
        self.tokens = 0.0
        self.start_s = stats.spent_s

    def validated(self, step: int, session: Session, figures: Mapping[str, float]) -> bool:
        """Add a validation, of which session.log_validation knows already, and write the file;
        whether it is the best one so far."""
        progress, seed = session.progress, session.cfg.seed
        epoch = epoch_of(step, session)
        entry = {"epoch": epoch, "step": step, "train_loss": progress.train_loss}
        self.history.append(entry | {f"val_{name}": value for name, value in figures.items()})
        session.say(
            f"Val Loss: {figures['loss']:.4f} | Val Perplexity: {perplexity(figures['loss']):.2f}"
        )
        is_best = progress.bad_evals == 0
        if is_best:
            self.best_at = epoch or step
            session.say("New best model!")
        content = {
            "config": asdict(session.cfg),
            "seed": seed,
            "metrics": self.history,
            "best_val_loss": progress.best_loss,
            "best_val_epoch": self.best_at,
            "best_val_perplexity": perplexity(progress.best_loss),
        }
        path = session.folder / f"metrics/training_metrics_seed{seed}.json"
        save_json(path, content, session.world)
        return is_best

    def model_names(self, step: int, session: Session) -> list[str]:
        """The model files of a checkpoint: one is always the latest, and at every SAVE_INTERVAL
        epochs one is kept."""
        names = ["checkpoint_latest.pt"]
        steps = session.steps_per_epoch
        if steps and step % (session.cfg.save_interval * steps) == 0:
            names.append(f"checkpoint_epoch_{step // steps}.pt")
        return names

    def summarize(self, session: Session) -> None:
        """The closing words."""
        say, best = session.say, session.progress.best_loss
        rule = "=" * 50
        say(f"{rule}\nTRAINING SUMMARY\n{rule}")
        if self.history:
            unit = "epoch" if session.steps_per_epoch else "step"
            say(f"Best validation loss:        {best:.4f}")
            say(f"Best validation perplexity:  {perplexity(best):.2f}")
            say(f"{f'Achieved at {unit}:':29}{self.best_at}")
        else:
            say("No validation metrics available")
        if session.world.device.type == "cuda":
            say(f"Peak VRAM:                   {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
        say("Training complete!")


class IntervalKnobs(Protocol):
    """The knobs that `intervals` reads."""

    val_every: int | None  # in steps; None: by epochs
    save_every: int | None
    eval_interval: int  # in epochs
    save_interval: int


def intervals(cfg: IntervalKnobs, epoch_steps: int, total_steps: int) -> tuple[int, list[int]]:
    """Steps between validations, and between checkpoints, of which one is due where any is: as the
    knobs say, in steps or in epochs. Without epochs (0 steps) it is a tenth of the run."""
    tenth = max(1, total_steps // 10)
    val_every, save_every = cfg.val_every, cfg.save_every
    if val_every is None:
        val_every = cfg.eval_interval * epoch_steps or tenth
    if save_every is None:
        save_every = cfg.save_interval * epoch_steps or tenth
    return val_every, [save_every, cfg.save_interval * epoch_steps]


def epoch_of(step: int, session: Session) -> int:
    """How many epochs are complete; 0 where there are none."""
    return step // session.steps_per_epoch if session.steps_per_epoch else 0
