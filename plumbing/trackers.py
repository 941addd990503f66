"""trackers.py -- also send a run's figures to TensorBoard, trackio or Weights & Biases.

Promises: a tracker can never stop or slow a run. A missing package, an error or a service that
hangs is one line in the log, and the run goes on; the run's own files have everything anyway.
"""

import importlib
import math
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

TRACKERS = ("off", "tensorboard", "trackio", "wandb")


class Tracker:
    """One tracker behind a daemon thread and a queue. `kind` is one of TRACKERS but for "off"."""

    def __init__(
        self,
        kind: str,
        project: str,
        run_id: str,
        config: dict,
        folder: Path,
        say: Callable[[str], None],
    ):
        self.kind, self.say, self.closed = kind, say, False
        self.queue: queue.Queue = queue.Queue(10_000)
        arguments = (project, run_id, config, folder)
        self.thread = threading.Thread(target=self._work, args=arguments, daemon=True)
        self.thread.start()

    def _work(self, project: str, run_id: str, config: dict, folder: Path) -> None:
        try:
            if self.kind == "tensorboard":
                log, finish = _open_tensorboard(folder)
            else:
                run = importlib.import_module(self.kind).init(
                    project=project, name=run_id, config=config
                )
                log, finish = run.log, run.finish
            while (item := self.queue.get()) is not None:
                step, values = item
                log({name: v for name, v in values.items() if math.isfinite(v)}, step=step)
            finish()
        except BaseException as error:  # whatever it is, it is not worth a run
            if self.closed:
                return
            if isinstance(error, ImportError):
                self.say(
                    f"tracker: the package {self.kind} is not installed, so nothing is sent; "
                    f"pip install {self.kind}"
                )
            else:
                what = f"{type(error).__name__}: {error}"
                self.say(f"tracker: {self.kind} failed, nothing more is sent: {what}")

    def send(self, step: int, values: dict[str, float]) -> None:
        if self.thread.is_alive():
            with suppress(queue.Full):  # a service that hangs
                self.queue.put_nowait((step, values))

    def close(self, wait_s: float = 20) -> None:
        """Let it finish, for a while."""
        with suppress(queue.Full):
            self.queue.put_nowait(None)
        self.thread.join(wait_s)
        self.closed = True
        if self.thread.is_alive():
            self.say(
                f"tracker: {self.kind} has not finished in {wait_s:.0f} s; its last values may be "
                f"missing"
            )


def _open_tensorboard(folder: Path) -> tuple[Callable, Callable]:
    """A log and a finish function as the other trackers have them; event files go to `folder`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close
