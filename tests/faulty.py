"""faulty.py -- train_gpt.main() with a fault put in, for test_faults: FAULT=kind:step[:rank], in the first start
only (a restart by torchrun finds nothing wrong). Kinds: raise, kill (SIGKILL), nan (a loss), int and term (signals)."""

import os
import signal

import torch

import train_gpt
from plumbing import Pulse, launch

kind, step, rank = [*os.environ["FAULT"].split(":"), "0"][:3]
here = (
    rank == os.environ.get("RANK", "0") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
)
send = Pulse.send


def faulty_send(self, at: int, values_n: torch.Tensor, clock: float) -> torch.Tensor:
    if here and at == int(step):
        if kind == "raise":
            raise RuntimeError(f"injected at step {at}")
        if kind == "nan":
            values_n = values_n.clone().fill_(float("nan"))
        else:
            os.kill(
                os.getpid(),
                {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM}[kind],
            )
    return send(self, at, values_n, clock)


Pulse.send = faulty_send

if __name__ == "__main__":
    launch(train_gpt.main)
