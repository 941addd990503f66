"""session.py -- one run from start to end, as a training loop sees it.

A session owns what surrounds training: the log, metrics.csv, status.json, the results row,
trackers, checkpoints, the clock, and every decision to stop. It never computes or changes a loss.

    with Session(cfg, world, ...) as session:
        ...                                                # build model and optimizers
        session.describe(model, flops_per_token, ...)
        session.restore(model=model, optimizers=optimizers, state=state)
        while True:
            session.between_steps(state.step, finished=state.step >= cfg.num_iterations)
            if session.should_validate: session.log_validation(state.step, evaluate(...))
            if session.should_save: session.save(state.step, model=model, ...)
            if session.stopping: break
            session.start_clock()
            ...                                            # forward, backward
            all_finite = session.step(state.step + 1, loss, lr=lr, grad_norms=norms)
            ...                                            # update where all_finite; step += 1

Promises: all ranks decide alike, because they decide on the same exchanged numbers. The host reads
a step's numbers only after it has queued the next step, so it never waits for work that it has just
queued; a step that is not finite is never applied all the same, because the update is gated on the
device. A run that fails anywhere inside the with block, also behind its loop, is not called
finished. A row of metrics is on disk before the checkpoint that follows it.
"""

import dataclasses
import faulthandler
import hashlib
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from plumbing.checkpoints import check_resume, load_checkpoint, load_into, save_checkpoint, state_of
from plumbing.clock import Clock
from plumbing.device import keep_threads
from plumbing.exchange import StepExchange, StepStats
from plumbing.forks import note_fork, start_fork
from plumbing.knobs import UserError
from plumbing.records import RunLog, read_sources
from plumbing.results import append_result, check_results, results_row
from plumbing.run_ids import COMPLETE, new_run_id
from plumbing.world import World

WATCHDOG_S = 1800  # without a step for so long, every thread's stack is printed


@dataclass
class Progress:
    """What a session needs to go on where it was; saved in every checkpoint."""

    train_loss: float = math.nan
    val_loss: float = math.nan
    best_loss: float = math.nan
    bad_evals: int = 0  # validations in a row without improvement
    validated_at: int = -1  # step of the last validation
    spent_s: float = 0.0  # training time on rank 0's clock, as all ranks heard of it
    reached: str = ""  # when TARGET_LOSS was first reached


@dataclass(eq=False)
class Session:
    """One run. See the module's docstring for the order of the calls.

    Raises UserError, before training, for a results file or a run id that cannot be used.
    """

    cfg: object
    world: World
    _: dataclasses.KW_ONLY
    total_steps: int  # length of the run, in optimizer steps
    tokens_per_step: int  # over all ranks
    data: Mapping[str, Sequence]  # TokenShards.content under "training" and the like, for a resume
    columns: Sequence[str]  # names of the results row, in order
    presets: Mapping[str, Mapping]
    resume_may_differ: Collection[str]  # knobs that move no loss
    sources: Sequence[str | Path]  # the trainer's own files; plumbing's are added
    # Results columns that hold a knob of another name: {"attn_gate": "attngate"}.
    column_knobs: Mapping[str, str] = field(default_factory=dict)
    steps_per_epoch: int | None = None  # for the column `epochs`
    val_every: int | None = None  # in steps; None: the knob
    save_every: Sequence[int] | None = None  # a checkpoint where any of them is due; None: the knob
    validate_at_start: bool = True
    log_every: int = 1  # steps between log lines
    step_line: Callable[[StepStats], str] | None = None  # the trainer's own words of a step
    metrics: Sequence[str] = ()  # the trainer's own columns of metrics.csv
    unit: str = "tokens"  # what the trainer calls a token
    named_by: str = "RUN_ID"  # the knob that names a run
    out_of_memory: str = "lower DEVICE_BATCH_SIZE, or set it to auto"

    def __post_init__(self):
        cfg, world = self.cfg, self.world
        if self.val_every is None:
            self.val_every = cfg.val_every
        if self.save_every is None:
            self.save_every = [cfg.save_every]
        self.progress = Progress()
        self.status = ""  # why the run stops; empty while it goes on
        self.signal = 0
        self.step_now = 0
        self.saved_at = 0
        self.stepped = False  # a step was queued since the clock last ticked
        self.trained = False  # a step was made in this start
        self.overflows = 0  # of fp16, one after another
        self.row: dict[str, object] = {}  # further columns of the results row
        self.notes: list[str] = []  # further words of its column `notes`
        self.described = False
        self.fork: dict[str, object] = {}  # the checkpoint of another run that it started from
        self.data_sha256 = hashlib.sha256(repr(self.data).encode()).hexdigest()[:12]
        self.clock = Clock(world)
        self.exchange = StepExchange(world)
        check_results(Path(cfg.results_file), self.columns, world)
        run_id = cfg.run_id or new_run_id(world)
        self.log = RunLog(
            Path(cfg.logs_folder),
            run_id,
            world,
            self.total_steps,
            self.tokens_per_step,
            self.metrics,
            self.unit,
            self.named_by,
        )
        self.run_id, self.folder, self.say = self.log.id, self.log.folder, self.log.say

    # ------------------------------------------------------------------
    # Start

    def describe(
        self, model: nn.Module, flops_per_token: float, facts: Mapping[str, object]
    ) -> None:
        """Write the header of the log: all sources, the knobs, the machine, the trainer's facts."""
        self.parameter_names = [name for name, _ in model.named_parameters()]
        self.num_params = sum(p.numel() for p in model.parameters())
        known = {"run_id": self.run_id, "parameters": f"{self.num_params:,}"}
        known |= {**facts, "data_sha256": self.data_sha256}
        if self.world.threads:
            known["threads"] = self.world.threads
        self.log.header(self.cfg, read_sources(self.sources), flops_per_token, known)
        self.described = True

    def restore(self, **objects: object) -> dict | None:
        """Load the newest good checkpoint into `objects`: what has load_state_dict gets it called,
        a dataclass gets its fields, a list is taken element by element.

        Returns the saved dictionary, or None where the run has no checkpoint; with FORK_FROM it
        then starts from another run's. Raises UserError when the run was started with other knobs
        or on other data.
        """
        saved = load_checkpoint(self.folder, self.world, self.say)
        if saved is None:
            if self.cfg.fork_from:
                start_fork(self, objects)
            return None
        may_differ, named_by = self.resume_may_differ, self.named_by
        check_resume(saved, self.cfg, may_differ, self.data, self.run_id, named_by)
        for name, target in objects.items():
            load_into(target, saved[name])
        load_into(self.progress, saved["progress"])
        self.clock.load_state_dict(saved["clock"])
        torch.set_rng_state(saved["rng"])
        keep_threads(saved.get("threads"))
        self.step_now = self.saved_at = saved["step"]
        self.fork = saved.get("fork", {})
        note_fork(self, saved)
        written = f"a checkpoint written by {saved['world_size']} rank(s)"
        self.say(f"resumed step:{saved['step']} from {written}")
        now, then = self.log.code_sha256[:12], saved["code_sha256"][:12]
        if now != then:
            self.say(f"the code is not that of the checkpoint: {now}, was {then}")
        return saved

    # ------------------------------------------------------------------
    # The half of the loop with the clock stopped

    def between_steps(
        self, step: int, finished: bool = False, out_of_data: bool = False
    ) -> list[StepStats]:
        """Hear of the steps before and decide what comes next. If anything is due, the clock stops
        and all queued steps are heard of. Returns what was heard.
        """
        self.step_now = step
        if self.stepped:
            self.clock.tick()
            self.stepped = False
        heard = self._hear(keep=1)
        if finished and not self.stopping:
            self.status = "finished"
        if 0 < self.cfg.stop_after <= step and not self.stopping:
            self.status = "stopped"
        if out_of_data and not self.stopping:
            line = "the data are used up: get more, or set EPOCHS_OK=1, and start this run again"
            self.stop("preempted", f"step:{step} {line}")
        if self.should_validate or self.should_save or self.stopping:
            self.clock.stop()
            heard += self._hear(keep=0)
        return heard

    @property
    def stopping(self) -> bool:
        return self.status != ""

    @property
    def should_validate(self) -> bool:
        if self.progress.validated_at == self.step_now:
            return False
        if self.stopping:
            return self.status == "finished"
        if self.step_now == 0 and not self.validate_at_start:
            return False
        return self.val_every > 0 and self.step_now % self.val_every == 0

    @property
    def should_save(self) -> bool:
        if self.status == "nan" or self.saved_at == self.step_now:
            return False
        is_due = any(every > 0 and self.step_now % every == 0 for every in self.save_every)
        return is_due or self.stopping

    def log_validation(self, step: int, loss: float, note: str = "", **metrics: float) -> None:
        """Record a validation. It decides early stopping; every rank decides alike, because `loss`
        is the same all-reduced number on each. `note` ends the log line.
        """
        progress = self.progress
        progress.val_loss = loss
        progress.validated_at = step
        self.log.validation(step, loss, self.clock, note, metrics)
        self._check_target_loss(step, loss)
        least = progress.best_loss - self.cfg.early_stop_min_delta
        if math.isnan(progress.best_loss) or loss < least:
            progress.best_loss = loss
            progress.bad_evals = 0
        else:
            progress.bad_evals += 1
        if 0 < self.cfg.early_stop_patience <= progress.bad_evals:
            self.status = "early_stop"

    def _check_target_loss(self, step: int, loss: float) -> None:
        target = self.cfg.target_loss
        if target is None or self.progress.reached or loss > target:
            return
        milliseconds = 1000 * self.clock.train_s(step)
        self.progress.reached = f"reached_step={step} reached_ms={milliseconds:.0f}"
        self.say(f"target_loss:{target} {self.progress.reached}")

    def save(self, step: int, **objects: object) -> None:
        """Write a checkpoint of `objects`, which restore() takes back under the same names.

        Raises UserError on every rank when it cannot be written.
        """
        state = {name: state_of(value) for name, value in objects.items()}
        state.update(
            step=step,
            tokens=self.log.tokens(step),
            fork=self.fork,
            progress=state_of(self.progress),
            clock=self.clock.state_dict(),
            rng=torch.get_rng_state(),
            threads=torch.get_num_threads(),
            knobs=dataclasses.asdict(self.cfg),
            data={part: list(files) for part, files in self.data.items()},
            code_sha256=self.log.code_sha256,
            world_size=self.world.size,
            trainer=Path(self.sources[0]).stem,
        )
        self.log.sync()
        save_checkpoint(self.folder, step, state, self.world, self.cfg.keep)
        self.saved_at = step

    def stop(self, status: str, line: str) -> None:
        """Stop for a reason of the trainer's own; every rank must call it alike."""
        self.say(line)
        self.status = status

    def reset(self) -> None:
        """Forget queued steps and the decision to stop, before restoring an earlier checkpoint."""
        self.exchange = StepExchange(self.world)
        self.status = ""
        self.stepped = False

    # ------------------------------------------------------------------
    # The half of the loop with the clock running

    def start_clock(self) -> None:
        if not self.clock.running:
            self.clock.start()

    def step(
        self,
        step: int,
        loss: Tensor,
        lr: float,
        grad_norms: Tensor,
        overflow: Tensor | None = None,
        **metrics: Tensor,
    ) -> Tensor:
        """Queue one step's figures for the record; waits for nothing.

        loss, metrics   device scalars: this rank's shares, which add up over the ranks
        grad_norms      (P,), of the summed gradients, in the order of model.named_parameters()
        overflow        device bool: fp16 overflowed, so the update is left out, which is no fault
        Returns a device bool: whether the update may be applied.
        """
        if sys.stderr is sys.__stderr__:
            faulthandler.dump_traceback_later(WATCHDOG_S)
        self.stepped = True
        self.trained = True
        spent_s = self.clock.train_s(step - 1)
        return self.exchange.send(step, loss, lr, grad_norms, overflow, metrics, spent_s)

    @property
    def spent_s(self) -> float:
        """Training seconds, the same number on all ranks."""
        return self.progress.spent_s

    # ------------------------------------------------------------------
    # Records

    def _hear(self, keep: int) -> list[StepStats]:
        """Record the queued steps but for the newest `keep`, up to one that is not finite."""
        heard = []
        if self.status == "nan":
            return heard
        for stats in self.exchange.read(self.parameter_names, keep):
            if stats.problem:
                line = f"step:{stats.step} not finite: {stats.problem}; its update was not applied"
                self.stop("nan", line)
                break
            self.progress.train_loss = stats.loss
            self.progress.spent_s = stats.spent_s
            is_logged = stats.step % self.log_every == 0 or stats.step == self.total_steps
            line = self._line(stats) if is_logged else ""
            self.log.step(stats, self.clock, line)
            heard.append(stats)
            self.overflows = self.overflows + 1 if stats.skipped else 0
            if self.overflows == 50:  # the loss scale does not help
                self.stop("nan", "50 steps in a row overflowed fp16; use bf16, or a lower LR")
            if stats.signal and not self.stopping:
                self.signal = stats.signal
                self.status = "preempted"
        return heard

    def _line(self, stats: StepStats) -> str:
        if self.step_line:
            return self.step_line(stats)
        return f"{stats.line(self.total_steps)} {self.clock.times(stats.step)}"

    # ------------------------------------------------------------------
    # End

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        world = self.world
        if error is not None or not self.stopping:
            self.status = "failed"
            # The other ranks may be anywhere, so nothing may wait for them.
            world = dataclasses.replace(world, size=1)
        try:
            if self.described:
                path, row = Path(self.cfg.results_file), results_row(self)
                append_result(path, self.columns, row, world, may_be_there=not self.trained)
        except UserError as problem:
            self.status = "failed"
            if error is None:
                raise
            self.say(f"error: {problem}")
        finally:
            self._close()
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(f"out of memory on {self.world.device}; {self.out_of_memory}") from None

    def _close(self) -> None:
        if self.described:
            self.log.status(self.status, self.step_now)
            memory = self.world.peak_memory_mib()
            self.say(
                f"{self.status}: step:{self.step_now}/{self.total_steps} peak_memory:{memory}MiB "
                f"log:{self.log.path}"
            )
            if self.status == "preempted":
                self.say(f"to go on, start the same command with {self.named_by}={self.run_id}")
        self.log.close()

    @property
    def exit_code(self) -> int:
        """0 for a run that did what it was asked for, 128 + the number of the signal that stopped
        it, 1 for everything else.
        """
        if self.status in (*COMPLETE, "stopped"):
            return 0
        if self.status == "preempted" and self.signal:
            return 128 + self.signal
        return 1
