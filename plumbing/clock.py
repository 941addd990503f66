"""clock.py -- training time, as the speedrun records measure it.

Promises: the time of validation, saving and compilation is never training time, the clock is only
read when the device has caught up, and the figures of a resumed run compare with those of a run in
one piece.
"""

import math
import time

from plumbing.world import World


class Clock:
    """Training time: it stops for validation and saving, and leaves out the first ten steps of each
    start, as the speedrun records do (compilation, autotuning).

    step_avg_s is the mean over the timed steps. train_s(step) is step_avg_s times (step - 10): the
    time measured, for a run in one piece, and comparable for one that was resumed. A fork counts
    the time of the run that it starts from, and step_avg_s of its own steps only.
    """

    SKIPPED_STEPS = 10

    def __init__(self, world: World):
        self.world = world
        self.timed_s = 0.0
        self.timed_steps = 0
        self.base_s = 0.0  # training time up to base_step
        self.base_step = self.SKIPPED_STEPS
        self.steps_since_start = 0
        self.started_at: float | None = None
        self.step_s = math.nan  # of the newest step
        self.ticked_at = math.nan

    @property
    def running(self) -> bool:
        return self.started_at is not None

    def start(self) -> None:
        self.world.synchronize()
        self.started_at = time.perf_counter()
        self.ticked_at = self.started_at

    def stop(self) -> None:
        self.world.synchronize()
        if self.running and self.steps_since_start > self.SKIPPED_STEPS:
            self.timed_s += time.perf_counter() - self.started_at
        self.started_at = None

    def tick(self) -> None:
        """One more step is queued. The host is at most one step ahead of the device, so step_s is
        the time that a step takes.
        """
        now = time.perf_counter()
        self.step_s = now - self.ticked_at
        self.ticked_at = now
        self.steps_since_start += 1
        if self.steps_since_start > self.SKIPPED_STEPS:
            self.timed_steps += 1
        elif self.steps_since_start == self.SKIPPED_STEPS:
            self.start()

    @property
    def step_avg_s(self) -> float:
        if self.timed_steps == 0:
            return math.nan
        running_s = 0.0
        if self.running and self.steps_since_start > self.SKIPPED_STEPS:
            running_s = time.perf_counter() - self.started_at
        return (self.timed_s + running_s) / self.timed_steps

    def train_s(self, step: int) -> float:
        if self.timed_steps == 0:
            return self.base_s
        return self.base_s + self.step_avg_s * max(step - self.base_step, 0)

    def start_over(self, step: int) -> None:
        """Keep the time up to this step, and measure the steps from here on by themselves."""
        self.base_s = self.train_s(step)
        self.base_step = max(step, self.SKIPPED_STEPS)
        self.timed_s = 0.0
        self.timed_steps = 0

    def times(self, step: int) -> str:
        """The clock in a log line, in the words of the speedrun records."""
        words = f"train_time:{1000 * self.train_s(step):.0f}ms"
        if self.timed_steps > 0:
            words += f" step_avg:{1000 * self.step_avg_s:.2f}ms"
        return words

    def state_dict(self) -> dict:
        base = {"base_s": self.base_s, "base_step": self.base_step}
        return {"timed_s": self.timed_s, "timed_steps": self.timed_steps, **base}

    def load_state_dict(self, state: dict) -> None:
        self.__init__(self.world)
        self.timed_s = state["timed_s"]
        self.timed_steps = state["timed_steps"]
        self.base_s = state.get("base_s", 0.0)  # older checkpoints have none
        self.base_step = state.get("base_step", self.SKIPPED_STEPS)
