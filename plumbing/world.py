"""world.py -- this process among the others: its device, its signals, the few collectives.

Promises: under torchrun a process joins its group, under plain `python` it is a group of one, and a
trainer needs no `if distributed` for either. Nothing falls back to another device in silence. A
signal only asks the run to stop; what that means is decided between two steps, by all ranks
together (session.py). Every rank raises the same UserError, and only rank 0 prints it.
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
import typing
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plumbing.device import choose_threads, peak_flops
from plumbing.knobs import UserError


@dataclass(frozen=True)
class World:
    """This process among the others. `signals` fills with the numbers of the signals that asked
    the run to stop. `threads` says with how many threads a CPU computes, and why.
    """

    rank: int
    size: int
    device: torch.device
    signals: list[int] = field(default_factory=list)
    threads: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read now means what it says."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def share(self, n: int) -> slice:
        """This rank's part of n things: contiguous, in rank order, sizes differing by at most 1."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def gather(self, item: object) -> list:
        """Every rank's small, picklable item, on every rank. For setup, not for the loop."""
        items = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(items, item)
        return items

    def agree(self, problem: str | None) -> None:
        """Raise UserError on every rank if any rank has a problem, with the lowest rank's words."""
        problems = [p for p in self.gather(problem) if p]
        if problems:
            raise UserError(problems[0])

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place; bitwise the same on every rank."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's tensor, stacked: (size, *x.shape). Shapes must be equal."""
        if self.size == 1:
            return x[None]
        gathered = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(gathered.flatten(), x.contiguous().flatten())
        return gathered

    def broadcast(self, tree: object) -> object:
        """Rank 0's nested dicts and lists on every rank, tensors on the CPU.

        Tensors travel one by one, because a broadcast of objects would pickle gigabytes.
        """
        if self.size == 1:
            return tree
        tensors: list[Tensor] = []
        skeleton = [_without_tensors(tree, tensors)]
        dist.broadcast_object_list(skeleton, 0)
        return self._with_tensors(skeleton[0], iter(tensors))

    def _with_tensors(self, tree: object, tensors: Iterator[Tensor]) -> object:
        if isinstance(tree, _TensorSlot):
            empty = torch.empty(tree.shape, dtype=tree.dtype)
            tensor = (next(tensors) if self.is_main else empty).to(self.device).contiguous()
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)  # bytes: gloo lacks some dtypes
            return tensor.cpu()
        if isinstance(tree, dict):
            return {key: self._with_tensors(value, tensors) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self._with_tensors(value, tensors) for value in tree]
        return tree

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU ({os.cpu_count()} cores)"

    def peak_flops(self) -> float | None:
        """The device's best FLOP/s; None where it is not known, and MFU is then not claimed."""
        return peak_flops(self.device_name())

    def peak_memory_mib(self) -> int:
        """Peak device memory on CUDA, peak resident memory of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) // 2**20
        import resource  # not on Windows, where only CUDA runs come this far

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def flat_gradients(model: nn.Module) -> Tensor:
    """One buffer for all gradients of a model, end to end: every p.grad becomes a view of it, which
    backward adds to. So one all-reduce averages all of them, and one kernel zeroes them.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() for p in params]
    buffer = torch.zeros(sum(sizes), device=params[0].device)
    for p, view in zip(params, buffer.split(sizes), strict=True):
        p.grad = view.view_as(p)
    return buffer


@dataclass(frozen=True)
class _TensorSlot:
    """Stands for a tensor in a tree that is sent without its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _without_tensors(tree: object, tensors: list[Tensor]) -> object:
    """The tree with a slot for each tensor; the tensors are appended to `tensors` in order."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return _TensorSlot(tuple(tree.shape), tree.dtype)
    if isinstance(tree, dict):
        return {key: _without_tensors(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_tensors(value, tensors) for value in tree]
    return tree


# ----------------------------------------------------------------------------
# Joining and leaving


@contextmanager
def join_world(device_kind: str, hint: str = "set DEVICE=cpu") -> Iterator[World]:
    """Join the group that torchrun describes in the environment; without torchrun, be a group of
    one. While inside, SIGTERM, SIGUSR1, SIGHUP and Ctrl-C only ask the run to stop.

    Raises UserError when DEVICE=cuda and there is no GPU for this rank; `hint` ends its message.
    """
    device = _choose_device(device_kind, hint)
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    threads = ""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
        threads = choose_threads()
    if not faulthandler.is_enabled() and sys.stderr is sys.__stderr__:
        faulthandler.enable()  # a file cut while it is mapped ends in SIGBUS: say where
    if size > 1:
        _init_process_group(rank, size, device)
    world = World(rank, size, device, threads=threads)
    handlers_before = {}
    try:
        handlers_before = _catch_signals(world)
        _end_with_the_launcher()
        yield world
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()
    if (
        size > 1
    ):  # behind an error the others may be anywhere: launch() leaves without a word to them
        dist.destroy_process_group()


def launch(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run main() and exit with what it returns. A UserError is one line on stderr and exit code 2;
    every rank meets the same ones (World.agree), so only rank 0 prints it.
    """
    is_group = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        code = main() or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        code = 2
    except Exception:
        if not is_group:
            raise
        traceback.print_exc()
        code = 1
    if is_group:
        # All is written and closed. gloo's threads now and then abort the process while the
        # interpreter takes itself apart, which torchrun would report as a failed run, and which
        # would swallow the traceback of one that did fail.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _choose_device(kind: str, hint: str) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"DEVICE=cuda, but torch {torch.__version__} sees no CUDA GPU; {hint}")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(
            f"--nproc_per_node asks for GPU {local_rank}, this machine has {num_gpus}; ask for "
            f"that many"
        )
    return torch.device("cuda", local_rank)


def _init_process_group(rank: int, size: int, device: torch.device) -> None:
    # PyTorch's flight recorder: after a hang, `torchfrtrace` reads who waited for whom.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    options: dict[str, object] = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        options = {"store": _fresh_store(rank, size), "rank": rank, "world_size": size}
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        options["device_id"] = device
    # Half an hour: a cold compilation on one rank keeps the others waiting.
    dist.init_process_group(backend, timeout=timedelta(minutes=30), **options)


def _keep_freed_memory() -> None:
    """On a CPU, let glibc keep what is freed for the next step.

    By default it hands large blocks back to the kernel, which then clears every page of every
    activation again: up to 40% of a step's CPU time (docs/performance.md).
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl has none
        return
    m_trim_threshold, m_mmap_max = -1, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def _fresh_store(rank: int, size: int, wait_s: float = 600) -> dist.Store:
    """A part of torchrun's store that no earlier start of these workers has written to.

    torchrun (seen in 2.13) keeps one store through all its restarts, so a restarted worker can read
    the address that its predecessor left there, and both sides then wait for a connection for ever.
    Here rank 0 answers to the names that the others have made up for this start; an answer to an
    earlier start has other names in it.
    """
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=wait_s))
    my_name = uuid.uuid4().hex
    end = time.monotonic() + wait_s
    greetings = [f"flatrun/hello/{r}" for r in range(1, size)]
    if rank > 0:
        store.set(greetings[rank - 1], my_name)
    while time.monotonic() < end:
        if rank == 0:
            heard = {key: store.get(key).decode() for key in greetings if store.check([key])}
            store.set("flatrun/answer", json.dumps({"start": my_name, "heard": heard}))
            if all(store.check([f"{key}/{my_name}"]) for key in greetings):
                return dist.PrefixStore(f"flatrun/{my_name}", store)
        elif store.check(["flatrun/answer"]):
            answer = json.loads(store.get("flatrun/answer"))
            if answer["heard"].get(greetings[rank - 1]) == my_name:
                store.set(f"{greetings[rank - 1]}/{answer['start']}", "heard")
                return dist.PrefixStore(f"flatrun/{answer['start']}", store)
        time.sleep(0.02)
    raise TimeoutError(
        f"rank {rank} has waited {wait_s:.0f} s for the other {size - 1} rank(s) to start"
    )


def _catch_signals(world: World) -> dict:
    """Let signals ask for a stop; returns the handlers that were there before.

    A SIGHUP that was ignored at the start (nohup) stays ignored.
    """
    first_at = 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal first_at
        # torchrun hands the terminal's Ctrl-C on a second time at once, so that only a later
        # second one means "now".
        if world.signals and number == signal.SIGINT and time.monotonic() - first_at > 2:
            raise KeyboardInterrupt
        if not world.signals:
            first_at = time.monotonic()
            if world.is_main:
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: ends this step, saves and stops\n".encode())
        world.signals.append(number)

    before = {}
    for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"):
        number = getattr(signal, name, None)
        if number is None:
            continue
        if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, handle)
    return before


def _end_with_the_launcher() -> None:
    """Under torchrun, ask the kernel for a SIGTERM when the launcher dies, so that no worker trains
    on unseen after its launcher was killed.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        pr_set_pdeathsig = 1
        libc.prctl(pr_set_pdeathsig, signal.SIGTERM)
