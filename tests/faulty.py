"""faulty.py -- train_gpt.main() with a fault put in, for test_faults: FAULT=kind:step[:rank], in
the first start only (a restart by torchrun finds nothing wrong). Kinds: raise, kill (SIGKILL), nan
(a loss), int, term and hup (signals).
"""

import os
import signal

import torch

import train_gpt
from plumbing import launch
from plumbing.exchange import StepExchange

kind, step, rank = [*os.environ["FAULT"].split(":"), "0"][:3]
is_first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
is_here = rank == os.environ.get("RANK", "0") and is_first_start
signals = {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM}
signals["hup"] = signal.SIGHUP
send = StepExchange.send


def faulty_send(self, at: int, loss: torch.Tensor, *rest) -> torch.Tensor:
    if is_here and at == int(step):
        if kind == "raise":
            raise RuntimeError(f"injected at step {at}")
        if kind == "nan":
            loss = loss * float("nan")
            rest = (rest[0], rest[1] * float("nan"), *rest[2:])  # lr, gradient norms, ...
        else:
            os.kill(os.getpid(), signals[kind])
    return send(self, at, loss, *rest)


StepExchange.send = faulty_send

if __name__ == "__main__":
    launch(train_gpt.main)
