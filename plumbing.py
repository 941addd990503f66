"""plumbing.py -- what keeps a run alive and accounted for, and cannot change a loss.

    knob, read_knobs      frozen dataclass + preset + environment + flags -> checked knobs
    world                 join torchrun's process group, or be a world of one; catch signals
    TokenShards           .bin shards or text files as one stream of tokens, memory-mapped and checked
    hub_list, hub_fetch   files of a dataset on the hub: retried, gone on with, checked, whole or absent
    Prefetch              batches made on a thread, copied to the device ahead of use
    Pulse                 one small all-gather a step: losses, signals and clocks of all ranks, one step late
    RunLog                logs/<id>.txt, logs/<id>/{metrics.csv, status.json}, one row in results.csv
    save_checkpoint, load_checkpoint    a folder that is whole or absent, for any number of ranks

House rule: a line that could move a loss curve, or that two trainers could want to differ, is the trainers'.
Importing this file does nothing. Shapes: W ranks, N tokens.
"""

import argparse
import ast
import csv
import ctypes
import dataclasses
import faulthandler
import glob
import hashlib
import importlib
import importlib.util
import io
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import typing
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
T = typing.TypeVar("T")


class UserError(ValueError):
    """What a user can put right. The message says what was found, what was expected, what to do next."""


def launch(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run main() and exit with what it returns. A UserError becomes one line on stderr and exit code 2;
    every rank meets the same ones (World.agree), so only rank 0 speaks."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


# ----------------------------------------------------------------------------
# Knobs


def knob(default, text, *, low=None, above=None, high=None, choices=None, none=None, alias=()):
    """One field of a Knobs class: its default and a help text with the unit.

    low, high are inclusive bounds and above is an exclusive one; `none` is the word for None (off, auto);
    alias lists other spellings.
    """
    meta = dict(text=text, low=low, above=above, high=high, choices=choices, none=none, alias=alias)
    return field(default=default, metadata=meta)


def _kind(f: dataclasses.Field) -> type:
    return next(t for t in (typing.get_args(f.type) or (f.type,)) if t is not type(None))


def _expects(f: dataclasses.Field) -> str:
    m, kind = f.metadata, _kind(f)
    if m["choices"]:
        words = "one of " + ", ".join(map(str, m["choices"]))
    else:
        words = {bool: "0 or 1", int: "a whole number", float: "a number", str: "text"}[kind]
    bounds = [
        f"{sign} {m[key]}"
        for key, sign in (("low", ">="), ("above", ">"), ("high", "<="))
        if m[key] is not None
    ]
    return (
        words
        + (" " + " and ".join(bounds) if bounds else "")
        + (f", or '{m['none']}'" if m["none"] else "")
    )


def _parse(name: str, f: dataclasses.Field, text: str):
    m, kind = f.metadata, _kind(f)
    if m["none"] and text == m["none"]:
        return None
    try:
        value = {"0": False, "1": True}[text] if kind is bool else kind(text)
        bad = (
            (kind is float and not math.isfinite(value))
            or (m["choices"] and value not in m["choices"])
            or (m["low"] is not None and value < m["low"])
            or (m["above"] is not None and value <= m["above"])
            or (m["high"] is not None and value > m["high"])
        )
    except (ValueError, KeyError):
        bad = True
    if bad:
        near = get_close_matches(text.lower(), map(str, m["choices"] or ()), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{name}={text!r}: expected {_expects(f)}{hint} (the default is {show(f, f.default)})"
        )
    return value


def show(f: dataclasses.Field, value) -> str:
    """A knob's value as one would type it."""
    return (
        f.metadata["none"]
        if value is None
        else str(int(value))
        if isinstance(value, bool)
        else str(value)
    )


def _near_miss(name: str, known: Mapping[str, dataclasses.Field]) -> str | None:
    squeezed = {spelling.replace("_", ""): spelling for spelling in known}
    plain = name.upper().replace("_", "")
    if plain in squeezed:
        return squeezed[plain]
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.85)), None)


def _from_flags(
    known: Mapping[str, dataclasses.Field], argv: Sequence[str], doc: str
) -> dict[str, str]:
    parser = argparse.ArgumentParser(
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every knob is also an environment variable, its name in capitals. A flag beats the environment,\n"
        "the environment beats PRESET, PRESET beats the default. Switches take 0 or 1; --name is 1, --no-name is 0.",
    )
    for spelling, f in known.items():
        name = spelling.lower()
        if spelling != f.name.upper():
            text = argparse.SUPPRESS
        else:
            text = f"{f.metadata['text']}; {_expects(f)}; default {show(f, f.default)}".replace(
                "%", "%%"
            )
        switch = _kind(f) is bool
        extra = dict(nargs="?", const="1") if switch else {}
        flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(
            *flags, dest=spelling, metavar="X", default=argparse.SUPPRESS, help=text, **extra
        )
        if (
            switch
        ):  # the way out of a switch that is on by default, as argparse's own programs have it
            off = dict.fromkeys((f"--no_{name}", f"--no-{name}", f"--no-{name.replace('_', '-')}"))
            extra = dict(dest=spelling, action="store_const", const="0", default=argparse.SUPPRESS)
            parser.add_argument(*off, help=argparse.SUPPRESS, **extra)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        near = _near_miss(unknown[0].lstrip("-").split("=")[0].upper().replace("-", "_"), known)
        hint = f"did you mean --{near.lower()}?" if near else "--help lists the knobs"
        raise UserError(f"{unknown[0]} is not a flag; {hint}")
    return vars(found)


def read_knobs(
    cls,
    presets: Mapping[str, Mapping] | None = None,
    argv: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    doc: str = "",
):
    """Build `cls`: a flag beats the environment, the environment beats PRESET, PRESET beats the default.

    Raises UserError, naming knob, value and what would do, for a wrong type, a value out of range or not among
    the choices, an unknown flag, a near miss in the environment, two spellings that disagree, or knobs that do
    not fit together (a ValueError from `cls.__post_init__`).
    """
    env = os.environ if env is None else env
    known = {s.upper(): f for f in dataclasses.fields(cls) for s in (f.name, *f.metadata["alias"])}
    flags = _from_flags(known, sys.argv[1:] if argv is None else argv, doc)
    for name in sorted(env.keys() - known.keys()):
        if near := _near_miss(name, known):
            raise UserError(
                f"{name} is set, but it is not a knob; did you mean {near}? (env -u {name} unsets it for one command)"
            )
    values: dict[str, object] = {}
    for source in (env, flags):
        given: dict[str, tuple[str, object]] = {}
        for spelling in known.keys() & source.keys():
            f = known[spelling]
            value = _parse(spelling, f, source[spelling])
            other, before = given.setdefault(f.name, (spelling, value))
            if before != value:
                raise UserError(
                    f"{spelling}={value} and {other}={before} are one knob with two values; set one of them"
                )
        values |= {name: value for name, (_, value) in given.items()}
    chosen = (presets or {}).get(values.get("preset", getattr(cls, "preset", "")), {})
    try:
        return cls(**{**chosen, **values})
    except ValueError as error:
        raise UserError(error) from None


def knobs_json(k, indent: int | None = 2) -> str:
    return json.dumps(dataclasses.asdict(k), indent=indent)


# ----------------------------------------------------------------------------
# World


@dataclass(frozen=True)
class World:
    """This process among the others. `signals` fills with the numbers of the signals that asked it to stop."""

    rank: int
    size: int
    device: torch.device
    signals: list[int] = field(default_factory=list)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sync(self) -> None:
        """Wait for the device, so that a clock read now means what it says."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gather(self, item) -> list:
        """Every rank's (small, picklable) item, on every rank. For setup, not for the loop."""
        items = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(items, item)
        return items

    def agree(self, problem: str | None) -> None:
        """Raise UserError on every rank if any rank has a problem, with the lowest such rank's words."""
        if found := [p for p in self.gather(problem) if p]:
            raise UserError(found[0])

    def sum(self, x: Tensor) -> Tensor:
        """All-reduce in place; bitwise the same on every rank."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def mean_scatter(self, table_WN: Tensor) -> None:
        """Reduce-scatter in place: row r of rank r's table becomes the mean over ranks of their rows r."""
        if self.size > 1:
            reduce_scatter = (
                getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            )
            reduce_scatter(table_WN[self.rank], table_WN.view(-1), op=dist.ReduceOp.AVG)

    def all_rows(self, table_WN: Tensor) -> Tensor:
        """All-gather in place: row r of everybody's table becomes rank r's row r."""
        if self.size > 1:
            all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            all_gather(table_WN.view(-1), table_WN[self.rank])
        return table_WN

    def peak_memory_mib(self) -> int:
        """Peak device memory on CUDA, peak resident memory of the process on CPU, in MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) // 2**20
        import resource  # not on Windows, where only CUDA runs come this far

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
            2**20 if sys.platform == "darwin" else 2**10
        )

    def name(self) -> str:
        return (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"CPU ({os.cpu_count()} cores)"
        )


def _choose_device(kind: str, hint: str) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"DEVICE=cuda, but torch {torch.__version__} sees no CUDA GPU; {hint}")
    if local >= torch.cuda.device_count():
        raise UserError(
            f"--nproc_per_node asks for GPU {local}, this machine has {torch.cuda.device_count()}; ask for that many"
        )
    return torch.device("cuda", local)


@contextmanager
def world(kind: str, hint: str = "set DEVICE=cpu") -> Iterator[World]:
    """Join the group that torchrun describes in the environment; under plain `python`, be a group of one, so
    that trainers need no `if distributed`. While inside, SIGTERM, SIGUSR1 and Ctrl-C only ask to stop.

    Raises UserError when DEVICE=cuda and there is no GPU for this rank: nothing falls back to CPU by itself.
    """
    device = _choose_device(kind, hint)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # PyTorch's own flight recorder: after a hang, `torchfrtrace` reads who waited for whom.
    for name, value in (("TORCH_FR_BUFFER_SIZE", "2000"), ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")):
        os.environ.setdefault(name, value)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
    if (
        size > 1
    ):  # half an hour: a cold compile on one rank keeps the others waiting for longer than the default
        extra = dict(device_id=device) if cuda else {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            extra |= dict(store=_fresh_store(rank, size), rank=rank, world_size=size)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30), **extra)
    w = World(rank, size, device)
    before = {}
    try:
        before = _catch_signals(w)
        yield w
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()
        if size > 1:
            dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """On a CPU, let glibc keep what is freed for the next step. It hands large blocks back to the kernel, which then
    clears every page of every activation again: up to 40% of a step's CPU time (docs/performance.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _fresh_store(rank: int, size: int, wait_s: float = 600) -> dist.Store:
    """A part of torchrun's store that no earlier start of these workers has written to.

    torchrun (seen in 2.13) keeps one store through all its restarts, so a restarted worker can read the address that
    its predecessor left there, and both sides then wait for a connection for ever. Rank 0 answers to the names that
    the others have made up for this start; an old answer has other names in it.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=wait_s))
    name, end = uuid.uuid4().hex, time.monotonic() + wait_s
    others = [f"flatrun/hello/{r}" for r in range(1, size)]
    if rank > 0:
        store.set(others[rank - 1], name)
    while time.monotonic() < end:
        if rank == 0:
            heard = {key: store.get(key).decode() for key in others if store.check([key])}
            store.set("flatrun/answer", json.dumps(dict(start=name, heard=heard)))
            if all(store.check([f"{key}/{name}"]) for key in others):
                return dist.PrefixStore(f"flatrun/{name}", store)
        elif store.check(["flatrun/answer"]):
            answer = json.loads(store.get("flatrun/answer"))
            if answer["heard"].get(others[rank - 1]) == name:
                store.set(f"{others[rank - 1]}/{answer['start']}", "heard")
                return dist.PrefixStore(f"flatrun/{answer['start']}", store)
        time.sleep(0.02)
    raise TimeoutError(
        f"rank {rank} has waited {wait_s:.0f} s for the other {size - 1} rank(s) to start"
    )


def _catch_signals(w: World) -> dict:
    first = [0.0]

    def handle(number, frame):
        # torchrun forwards the terminal's Ctrl-C a second time at once, so only a later one means "now".
        if w.signals and number == signal.SIGINT and time.monotonic() - first[0] > 2:
            raise KeyboardInterrupt
        if not w.signals:
            first[0] = time.monotonic()
            if w.main:
                os.write(
                    2,
                    f"\n{signal.Signals(number).name}: ends this step, saves and stops\n".encode(),
                )
        w.signals.append(number)

    wanted = [s for s in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, s)]
    return {getattr(signal, s): signal.signal(getattr(signal, s), handle) for s in wanted}


# ----------------------------------------------------------------------------
# Token shards

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


def read_shard(path: str | Path) -> np.ndarray:
    """Map one shard: 256 int32 (magic, version, count, zeros), then `count` uint16 tokens.

    Raises UserError, naming the file, when the magic, the version, the count or the length is wrong.
    """
    header = np.fromfile(path, "<i4", 3)
    redo = "delete it and make or download it again"
    if len(header) < 3 or header[0] != MAGIC or header[1] != VERSION:
        raise UserError(
            f"{path}: not a token shard (its first ints are {header.tolist()}, not [{MAGIC}, {VERSION}, count]); {redo}"
        )
    promised, found = HEADER_BYTES + 2 * int(header[2]), os.path.getsize(path)
    if promised != found or header[2] < 1:
        raise UserError(
            f"{path}: its header promises {header[2]:,} tokens, {promised:,} bytes; the file has {found:,}; {redo}"
        )
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES)


def read_bytes(path: str | Path) -> np.ndarray:
    """Map any file as uint8 tokens, its bytes. Raises UserError, naming the file, when it is empty."""
    if not os.path.getsize(path):
        raise UserError(f"{path}: is empty; leave it out, or put text into it")
    return np.memmap(path, np.uint8, "r")


def write_shard(path: str | Path, tokens_N: np.ndarray) -> None:
    """Write uint16 tokens as one shard; the file exists whole or not at all."""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens_N)
    _write_whole(Path(path), header, tokens_N.astype("<u2", copy=False))


def _write_whole(path: Path, *data: bytes | np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with open(part, "wb") as f:
        for piece in data:
            f.write(piece)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


# ----------------------------------------------------------------------------
# Embedded corpus


def _python_text(stdlib: Path) -> Iterator[str]:
    """The English every Python carries: docstrings of the standard library, then pydoc's topics."""
    for folder, subfolders, names in os.walk(stdlib):
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        subfolders[:] = sorted(set(subfolders) - skip)
        for name in sorted(n for n in names if n.endswith(".py")):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in old modules
                    tree = ast.parse(Path(folder, name).read_bytes())
            except (SyntaxError, ValueError):  # templates, and files that are broken on purpose
                continue
            for node in ast.walk(tree):
                if isinstance(
                    node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                ):
                    yield ast.get_docstring(node) or ""  # runs inspect.cleandoc
    try:
        from pydoc_data.topics import topics
    except ImportError:  # stripped; the size check below decides whether enough is left
        return
    whole = [topics[key].strip() for key in sorted(topics)]
    for (
        text
    ) in whole:  # a topic that is a section of a longer one, under the same title, is left out
        if not any(text.split("\n", 3)[-1] in other for other in whole if len(other) > len(text)):
            yield text


def embedded_corpus(folder: Path) -> tuple[str, str, str]:
    """Byte shards of Python's own documentation, built under `folder` unless they are there already.

    Returns the patterns of the training and the validation shard and the SHA-256 of the text, which differs
    from one Python version to the next. Byte 0 stands before every document; about 7% of the documents,
    chosen by their hash, are validation. Raises UserError when this Python comes without its sources.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    made_from = f"recipe 1, {sys.version}, {stdlib}"  # known builds cost no parsing
    for note in sorted(folder.glob("embedded-*/made_from.json")):
        known = json.loads(note.read_text())
        patterns = [str(note.parent / f"embedded_{part}_*.bin") for part in ("train", "val")]
        if known["made_from"] == made_from and all(glob.glob(p) for p in patterns):
            return patterns[0], patterns[1], known["sha256"]

    texts = (t.replace("\0", "").encode("utf-8", "replace") for t in _python_text(stdlib))
    # In the order of their hashes, so that one part of the stream is like another.
    docs = sorted((hashlib.sha256(t).digest(), t) for t in {t for t in texts if len(t) > 80})
    corpus = b"".join(b"\0" + text for _, text in docs)
    if len(corpus) < 500_000:
        raise UserError(
            f"{stdlib}: {len(corpus):,} bytes of documentation, about 1.9 million expected; this Python is "
            f"without its sources. Use another one, or make shards of any text with scripts/make_shards.py"
        )
    sha = hashlib.sha256(corpus).hexdigest()
    home = folder / f"embedded-{sha[:12]}"
    for part, is_val in (("train", False), ("val", True)):
        stream = b"".join(b"\0" + text for digest, text in docs if (digest[-1] < 18) == is_val)
        write_shard(
            home / f"embedded_{part}_000000.bin", np.frombuffer(stream, np.uint8).astype(np.uint16)
        )
    _write_whole(
        home / "made_from.json", json.dumps(dict(sha256=sha, made_from=made_from)).encode()
    )
    return str(home / "embedded_train_*.bin"), str(home / "embedded_val_*.bin"), sha


# ----------------------------------------------------------------------------
# The dataset hub

ATTEMPTS = 3  # per request; inside one attempt the library resumes a dropped connection by itself


def _hub():
    os.environ.setdefault(
        "HF_HUB_DISABLE_XET", "1"
    )  # plain HTTP, the way whose faults tests/test_data.py acts out
    import huggingface_hub  # here, because it takes a third of a second and most runs need none of it
    import huggingface_hub.errors

    return huggingface_hub


def hub_persist(repo: str, name: str, attempt: Callable[[], T], otherwise: str) -> T:
    """attempt(), up to ATTEMPTS times, for file `name` of dataset `repo`; `otherwise` says what can be done without the
    hub. Raises UserError: at once for what will not heal (no such file, a full disk, offline mode), else at last."""
    hub = _hub()
    url = hub.hf_hub_url(repo, name, repo_type="dataset") if name else f"dataset {repo}"
    faults = (
        hub.errors.HTTPError,
        OSError,
        UserError,
    )  # the first: of whatever HTTP client the library has
    for k in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except faults as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403, 404):
                what = f"{url}: the hub has no such file (HTTP {status})"
                raise UserError(f"{what}; ask for others, or check HF_ENDPOINT") from None
            if (
                isinstance(error, OSError) and error.errno is not None
            ):  # the network's errors carry no errno
                raise UserError(f"{name}: cannot be written: {error}") from None
            damaged = isinstance(error, UserError)
            fault = (
                str(error) if damaged else f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
            if isinstance(error, hub.errors.OfflineModeIsEnabled):
                break
            if k < ATTEMPTS:
                print(
                    f"{name or repo}: attempt {k} of {ATTEMPTS} failed, trying again: {fault}",
                    flush=True,
                )
                time.sleep(k)
    if damaged:
        raise UserError(f"{url}: {ATTEMPTS} downloads were all bad, giving up. The last: {fault}")
    raise UserError(
        f"{url}: no answer, or a broken one ({fault}). Rerun to go on; with no way to the hub, set HF_ENDPOINT to a "
        f"mirror, or {otherwise}"
    )


OWN_TEXT = (
    "train on a text file or folder of your own, or on the embedded corpus, which needs no download"
)


def hub_list(repo: str, prefix: str = "", otherwise: str = OWN_TEXT) -> list[str]:
    """Names of the dataset's files that start with `prefix`, sorted. Raises UserError when the hub does not answer or
    has none."""
    files = hub_persist(
        repo, "", lambda: _hub().HfApi().list_repo_files(repo, repo_type="dataset"), otherwise
    )
    found = sorted(name for name in files if name.startswith(prefix))
    if not found:
        raise UserError(
            f"dataset {repo}: none of its {len(files)} files starts with {prefix!r}; is the name right?"
        )
    return found


def hub_facts(repo: str, name: str, otherwise: str = OWN_TEXT):
    """The hub's size in bytes, commit, and etag, which for large files is the SHA-256."""
    hub = _hub()
    url = hub.hf_hub_url(repo, name, repo_type="dataset")
    facts = hub_persist(repo, name, lambda: hub.get_hf_file_metadata(url), otherwise)
    if facts.size is None:
        raise UserError(
            f"{facts.location}: the answer has no size; is HF_ENDPOINT a mirror of the hub?"
        )
    return facts


def hub_problem(path: Path, facts) -> str:
    """What keeps `path` from being the hub's file of these facts; empty if nothing does."""
    if (size := path.stat().st_size) != facts.size:
        return f"{path}: {size:,} bytes, but the hub's file has {facts.size:,}"
    # An etag of another form (small files, or a mirror that stores its own way) is no SHA-256 and says nothing.
    if re.fullmatch("[0-9a-f]{64}", facts.etag or "") and _sha256(path) != facts.etag:
        return (
            f"{path}: right length, wrong bytes: its SHA-256 is not the hub's {facts.etag[:12]}..."
        )
    return ""


def hub_fetch(
    repo: str,
    name: str,
    path: Path,
    check: Callable[[Path, object], str] = hub_problem,
    otherwise: str = OWN_TEXT,
    facts=None,
) -> None:
    """Download file `name` of dataset `repo` and give it the name `path` once check(file, facts) finds nothing wrong. A
    download that was cut off is gone on with. Raises UserError as hub_persist does."""
    hub, part = _hub(), path.parent / ".part"
    facts = facts or hub_facts(repo, name, otherwise)

    def attempt() -> Path:
        # The library checks the size only, and copies from its cache straight to the final name: hence a folder of our
        # own for both.
        kind = dict(repo_type="dataset", revision=facts.commit_hash)
        got = Path(
            hub.hf_hub_download(repo, name, **kind, local_dir=part, cache_dir=part / "cache")
        )
        if fault := check(got, facts):
            got.unlink()  # else the library would call it present
            raise UserError(fault)
        return got

    path.parent.mkdir(parents=True, exist_ok=True)
    got = hub_persist(repo, name, attempt, otherwise)
    with open(got, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(got, path)


# ----------------------------------------------------------------------------
# The stream of tokens


TEXT_SUFFIXES = {
    ".txt",
    ".md",
    ".rst",
    ".raw",
    ".tokens",
    ".text",
    ".csv",
    ".json",
    ".jsonl",
    ".xml",
    ".html",
    ".py",
}


def text_files(path: str | Path) -> list[str]:
    """The files that `path` names, in name order: a file, a glob, or the text files anywhere below a folder. Raises
    UserError when there are none."""
    path = str(path)
    if os.path.isdir(path):
        found = sorted(
            str(p)
            for p in Path(path).rglob("*")
            if p.suffix.lower() in TEXT_SUFFIXES and p.is_file()
        )
        hint = f"none of its files ends in one of {' '.join(sorted(TEXT_SUFFIXES))}"
    else:
        found = (
            [path]
            if os.path.isfile(path)
            else sorted(p for p in glob.glob(path) if os.path.isfile(p))
        )
        hint = "there is no such file or folder, and as a pattern it matches nothing"
    if not found:
        raise UserError(
            f"{path}: no text there ({hint}); name a text file, a folder of them, or a pattern"
        )
    return found


def build_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by make(aside) if it is not there yet: it gets its name by one rename when make has returned, so
    it exists whole or not at all. Several processes and ranks may call this at once; one builds, the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.exists():
            aside = folder.parent / f".{folder.name}.part"
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
            aside.mkdir()
            make(aside)
            _fsync_folder(aside)
            aside.rename(folder)
    return folder


class TokenShards:
    """All tokens of the shards matching `pattern`, in name order, as one stream. `pattern` may also be a list of files.
    `open_file` maps one file: read_shard for uint16 tokens, read_bytes for text as bytes. Raises UserError if there are
    none."""

    def __init__(
        self,
        pattern: str | Sequence[str],
        hint: str = "python cached_fineweb10B.py 9 downloads some; PRESET=demo needs none",
        open_file: Callable[[str], np.ndarray] = read_shard,
    ):
        listed = not isinstance(pattern, str)
        self.paths = list(pattern) if listed else sorted(glob.glob(pattern))
        self.pattern = (
            ", ".join(self.paths[:3]) + ", ..." * (len(self.paths) > 3) if listed else pattern
        )
        if not self.paths:
            raise UserError(f"no token shards match {pattern}; {hint}")
        self.shards = [open_file(p) for p in self.paths]
        self.lengths = [len(s) for s in self.shards]
        self.starts = np.concatenate(
            [[0], np.cumsum(self.lengths)]
        ).tolist()  # of each shard in the stream; then the total

    @property
    def total(self) -> int:
        return self.starts[-1]

    @property
    def content(self) -> list[list]:
        """[name, tokens] of each shard: enough to notice on resume that the data are not the same."""
        return [[Path(p).name, n] for p, n in zip(self.paths, self.lengths, strict=True)]

    def read(self, start: int, n: int) -> np.ndarray:
        """(n,) tokens, uint16 (of text files uint8), from stream position `start`, running over shard edges."""
        parts, shard = [], int(np.searchsorted(self.starts, start, "right")) - 1
        while n > 0:
            part = self.shards[shard][start - self.starts[shard] :][:n]
            parts.append(part)
            start, n, shard = start + len(part), n - len(part), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def gaps(self) -> list[int]:
        """Numbers missing from the shards' own numbering, such as 2 when there are ..._000001 and ..._000003."""
        numbers = {int(m[1]) for p in self.paths if (m := re.search(r"(\d+)\.bin$", p))}
        return sorted(set(range(min(numbers), max(numbers))) - numbers) if numbers else []

    def check_ids(self, vocab_size: int, w: World, last: int | None = None) -> None:
        """Refuse, by name, a shard with ids beyond the vocabulary; looks at the stream up to position `last`.
        Ranks share the reading, which warms the page cache for the first epoch."""
        problem = None
        used = [i for i in range(len(self.paths)) if last is None or self.starts[i] < last]
        for i in used[w.rank :: w.size]:
            if self.shards[i].dtype == np.uint8 and vocab_size >= 256:
                continue
            if problem is None and (top := int(self.shards[i].max())) >= vocab_size:
                problem = (
                    f"{self.paths[i]}: holds token id {top}, VOCAB_SIZE={vocab_size} ends at {vocab_size - 1}; "
                    f"raise VOCAB_SIZE or use shards made with another tokenizer"
                )
        w.agree(problem)


class Prefetch:
    """make(step) on a thread, `depth` steps ahead; get(step) gives its tensors on the device. On CUDA they are
    pinned and copied without blocking. An error in the thread is raised by get."""

    def __init__(
        self,
        make: Callable[[int], tuple[Tensor, ...]],
        first: int,
        device: torch.device,
        depth: int = 2,
    ):
        self.device, self.wait_s, self.closed = device, 0.0, threading.Event()
        self.queue: queue.Queue = queue.Queue(depth)
        self.thread = threading.Thread(target=self._fill, args=(make, first), daemon=True)
        self.thread.start()

    def _fill(self, make: Callable, step: int) -> None:
        if (
            self.device.type == "cuda"
        ):  # per thread: without it, pinning would make a context on every node's GPU 0
            torch.cuda.set_device(self.device)
        while not self.closed.is_set():
            try:
                item = make(step)
                if self.device.type == "cuda":
                    item = tuple(t.pin_memory() for t in item)
            except Exception as error:
                item = error
            while not self.closed.is_set():
                try:
                    self.queue.put((step, item), timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            step += 1

    def get(self, step: int) -> tuple[Tensor, ...]:
        t0 = time.perf_counter()
        made, item = self.queue.get()
        self.wait_s += time.perf_counter() - t0
        if isinstance(item, Exception):
            raise item
        assert made == step, f"batch of step {made} where step {step} was asked for"
        return tuple(t.to(self.device, non_blocking=True) for t in item)

    def close(self) -> None:
        self.closed.set()
        self.thread.join()


# ----------------------------------------------------------------------------
# Pulse


@dataclass(frozen=True)
class Beat:
    """What all ranks know of one finished step."""

    step: int
    values: np.ndarray  # (W, n) what each rank sent
    signal: int  # the first stop signal that any rank has caught, 0 for none
    clock: float  # rank 0's clock, as it sent it

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.values).all())

    def culprit(self, names: Sequence[str]) -> str:
        """Names the first rank and the first of `names`, one per value, that are not finite."""
        bad = ~np.isfinite(self.values)
        rank = int(bad.any(axis=1).argmax())
        words = [name for name, wrong in zip(names, bad.any(axis=0), strict=True) if wrong]
        first = next((word for word in words if word != "loss"), "none")
        return f"loss {self.values[rank, 0]:g} on rank {rank}, first bad gradient {first}"


class Pulse:
    """One small all-gather a step. The host reads a step's pulse only after it has queued the next step, so it never
    waits for work that it has just queued, and all ranks take every decision to stop from the same numbers.

    `ok` is a device flag that falls with the first non-finite value and stays down: updates gated by it are never
    applied from that step on, although the host hears of it a step later.
    """

    def __init__(self, w: World, watchdog_s: float = 1800):
        self.w, self.watchdog_s = w, watchdog_s
        self.ok = torch.ones((), dtype=torch.bool, device=w.device)
        self.waiting: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def send(self, step: int, values_n: Tensor, clock: float) -> Tensor:
        """Queue the exchange of (n,) fp32 device values of `step`; returns `ok` (a device bool)."""
        if (
            self.watchdog_s
            and hasattr(faulthandler, "dump_traceback_later")
            and sys.stderr is sys.__stderr__
        ):
            faulthandler.dump_traceback_later(self.watchdog_s)  # a hang prints every thread's stack
        own = torch.tensor([self.w.signals[0] if self.w.signals else 0, clock], dtype=torch.float32)
        own = torch.cat([own.to(self.w.device, non_blocking=True), values_n])
        copy, event = self.w.all_rows(own.repeat(self.w.size, 1)), None
        self.ok = self.ok & copy.isfinite().all()
        if self.w.device.type == "cuda":
            copy = torch.empty_like(copy, device="cpu", pin_memory=True).copy_(
                copy, non_blocking=True
            )
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((step, copy, event))
        return self.ok

    def read(self, keep: int = 1) -> list[Beat]:
        """The beats sent so far but for the newest `keep`; 0 waits for all of them."""
        beats = []
        while len(self.waiting) > keep:
            step, copy, event = self.waiting.pop(0)
            if event is not None:
                event.synchronize()
            table = copy.numpy()
            beats.append(Beat(step, table[:, 2:], int(table[:, 0].max()), float(table[0, 1])))
        return beats


# ----------------------------------------------------------------------------
# Clock


class Clock:
    """Training time: stops for validation and saving, and leaves out the first ten steps of each start, as the
    speedrun records do (compilation, autotuning). step_avg is the mean over the timed steps, and train_s(step) is
    step_avg times (step - 10): the time measured, for a run in one piece, and comparable for a resumed one."""

    SKIP = 10

    def __init__(self, w: World, timed_s: float = 0.0, timed_steps: int = 0):
        self.w, self.timed_s, self.timed_steps, self.seen, self.t0 = (
            w,
            timed_s,
            timed_steps,
            0,
            None,
        )
        self.step_s = self.ticked_at = math.nan

    def start(self) -> None:
        self.w.sync()
        self.t0 = self.ticked_at = time.perf_counter()

    def stop(self) -> None:
        self.w.sync()
        if self.seen > self.SKIP:
            self.timed_s += time.perf_counter() - self.t0
        self.t0 = None

    def tick(self) -> None:
        """One more step is queued; the host is at most one step ahead, so step_s is the time a step takes."""
        self.step_s, self.ticked_at = time.perf_counter() - self.ticked_at, time.perf_counter()
        self.seen += 1
        if self.seen > self.SKIP:
            self.timed_steps += 1
        elif self.seen == self.SKIP:
            self.start()

    @property
    def step_avg_s(self) -> float:
        running = time.perf_counter() - self.t0 if self.t0 and self.seen > self.SKIP else 0.0
        return (self.timed_s + running) / self.timed_steps if self.timed_steps else math.nan

    def train_s(self, step: int) -> float:
        return self.step_avg_s * max(step - self.SKIP, 0) if self.timed_steps else 0.0

    def times(self, step: int) -> str:
        return (
            f"train_time:{1000 * self.train_s(step):.0f}ms step_avg:{1000 * self.step_avg_s:.2f}ms"
        )


# ----------------------------------------------------------------------------
# Run log

RULE = "=" * 100
METRICS = "step train_loss val_loss lr train_time_s tokens tokens_per_s mfu grad_norm peak_memory_mib".split()
DONE = ("finished", "early_stop")  # a run in one of these states has nothing left to do


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=HERE, capture_output=True, text=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _blank(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def new_run_id(w: World) -> str:
    """UTC start time and 6 hex digits, one for all ranks, the same again when torchrun restarts the workers: it is
    derived from the launching agent, which outlives them."""
    stamp, seed = time.time(), uuid.uuid4().hex
    if "TORCHELASTIC_RUN_ID" in os.environ:
        agent = os.getppid()
        try:
            started = Path(f"/proc/{agent}/stat").read_text().rsplit(")", 1)[1].split()[19]
            stamp = Path(f"/proc/{agent}").stat().st_ctime
        except OSError:  # no /proc: the agent's pid alone has to do
            started, stamp = "", 0.0
        seed = f"{socket.gethostname()} {agent} {started} {os.environ['TORCHELASTIC_RUN_ID']}"
    when = datetime.fromtimestamp(stamp, timezone.utc).strftime("%Y%m%d-%H%M%S")
    return w.gather(f"{when}-{hashlib.sha256(seed.encode()).hexdigest()[:6]}")[0]


class RunLog:
    """One run's record: logs/<id>.txt for eyes, logs/<id>/metrics.csv for programs, logs/<id>/status.json for others to
    watch. Rank 0 writes. Lines reach the file at once and are forced to disk by sync(), not at every step. `extra` are
    a trainer's own columns of metrics.csv, behind the common ones; `unit` is what it calls a token; `named_by` is the
    knob that the user named this run with.

    Raises UserError before training when the id is that of a finished run, or of one that is being trained now.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        w: World,
        total_steps: int,
        extra: Sequence[str] = (),
        unit: str = "tokens",
        named_by: str = "RUN_ID",
    ):
        self.named_by = named_by
        self.w, self.id, self.total, self.folder = w, run_id, total_steps, folder / run_id
        self.path, self.status_path = folder / f"{run_id}.txt", folder / run_id / "status.json"
        self.columns, self.unit, self.tracker = [*METRICS, *extra], unit, None
        self.bar, self.told, self.pending, self.facts = None, 0.0, {}, {}
        problem = None
        if w.main:
            try:
                self._open()
            except UserError as error:
                problem = str(error)
            except (OSError, json.JSONDecodeError) as error:
                problem = f"{self.folder}: cannot be used ({error}); set LOGS_FOLDER or {self.named_by} to another"
        w.agree(problem)

    def _open(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,120}", self.id):
            raise UserError(f"RUN_ID={self.id!r}: use letters, digits, '.', '_', '+' and '-' only")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            words = (
                f"run {self.id} is being trained by another process; choose another {self.named_by}"
            )
            raise UserError(words) from None
        if self.status_path.exists():
            status = json.loads(self.status_path.read_text())["status"]
            if status in DONE:
                raise UserError(
                    f"run {self.id} is complete ({status}, {self.path}); choose another {self.named_by}"
                )
        self.log, self.csv = self._append(self.path), self._append(self.folder / "metrics.csv")
        if self.csv.tell() == 0:
            self.csv.write(",".join(self.columns) + "\n")

    @staticmethod
    def _append(path: Path) -> io.TextIOWrapper:
        """Open for appending; a last line that a crash tore is cut off, so that the next one starts clean."""
        if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
        return open(path, "a", newline="")

    def header(self, k, sources: Sequence[str | Path], facts: Mapping[str, object]) -> None:
        """The program, the machine and the knobs, at each start of the run."""
        texts = [Path(p).read_text() for p in sources]
        self.code_sha256 = hashlib.sha256("".join(texts).encode()).hexdigest()
        self.commit, self.dirty = (
            _output("git", "rev-parse", "HEAD"),
            bool(_output("git", "status", "-s", "-uno")),
        )
        self.commit, self.started = (
            self.commit or "unknown",
            f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}",
        )
        if not self.w.main:
            return
        lines = [RULE, *(line for text in texts for line in (text.rstrip("\n"), RULE))]
        lines += [
            f"git_commit: {self.commit}{' (dirty)' * self.dirty}",
            f"code_sha256: {self.code_sha256}",
        ]
        lines += [f"command: {shlex.join(sys.orig_argv)}", "hyperparameters:", knobs_json(k)]
        lines += [
            f"Running pytorch {torch.__version__} compiled for CUDA {torch.version.cuda}",
            "nvidia-smi:",
        ]
        lines += [_output("nvidia-smi") or "not found", RULE]
        self.log.write("\n".join(lines) + "\n")
        for name, value in (
            facts | dict(device=f"{self.w.size} x {self.w.name()}", log=self.path)
        ).items():
            self.say(f"{name}: {value}")
        self.sync()

    def rates(self, tokens_per_step: int, flops_per_token: float) -> None:
        """What throughput and MFU are computed from; an unknown device's MFU is not claimed."""
        self.tokens, self.flops, self.peak = tokens_per_step, flops_per_token, peak_flops(self.w)
        peak = (
            f"of {self.peak / 1e12:.0f} TFLOP/s dense bf16, attention counted causal"
            if self.peak
            else "n/a"
        )
        self.say(f"mfu: {peak}")

    def say(self, line: str, quiet: bool = False) -> None:
        """One line in the log and on stdout; `quiet` ones stay off a terminal, where the bar shows them."""
        if not self.w.main:
            return
        self.log.write(line + "\n")
        self.log.flush()
        if not (quiet and sys.stderr.isatty()):
            tqdm.write(line)  # above the bar, if there is one
            sys.stdout.flush()

    def step(
        self,
        step: int,
        train_loss: float,
        lr: float,
        grad_norm: float,
        clock: Clock,
        line: str | None = None,
        **extra: float,
    ) -> None:
        """One finished optimizer step: a line, a row, the bar, and (every two seconds) the status. `line` is the
        trainer's own text instead of the usual one, or '' for none; `extra` are values of its own columns."""
        if not self.w.main:
            return
        self._flush_row()
        speed = self.tokens / clock.step_s
        self.pending = dict(
            step=step, train_loss=f"{train_loss:.6f}", lr=f"{lr:.6g}", grad_norm=f"{grad_norm:.6g}"
        )
        self.pending |= dict(train_time_s=f"{clock.train_s(step):.3f}", tokens=step * self.tokens)
        self.pending |= dict(
            tokens_per_s=_blank(speed, ".0f"), peak_memory_mib=self.w.peak_memory_mib()
        )
        self.pending |= dict(
            mfu=_blank(speed * self.flops / self.peak / self.w.size, ".4f") if self.peak else ""
        )
        self.pending |= {name: _blank(value, ".6g") for name, value in extra.items()}
        own = "".join(f" {name}:{value:.4g}" for name, value in extra.items())
        usual = f"step:{step}/{self.total} train_loss:{train_loss:.4f}{own} {clock.times(step)}"
        if line is None or line:
            self.say(line or usual, quiet=True)
        if self.tracker:
            self.tracker.send(
                step,
                dict(train_loss=train_loss, lr=lr, grad_norm=grad_norm, tokens_per_s=speed) | extra,
            )
        self.facts |= dict(train_loss=round(train_loss, 6), tokens_per_s=_blank(speed, ".0f"))
        self.facts |= dict(eta_s=_blank((self.total - step) * self.tokens / speed, ".0f"))
        if time.monotonic() - self.told > 2:
            self.status("running", step)
        if self.bar is None and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.total, initial=step - 1, unit="step", dynamic_ncols=True, smoothing=0.05
            )
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {train_loss:.3f}, {_blank(speed, ',.0f') or '-'} {self.unit}/s",
                refresh=False,
            )
            self.bar.update(step - self.bar.n)

    def validation(
        self, step: int, val_loss: float, clock: Clock, mark: str = "", **extra: float
    ) -> None:
        """One validation: a line, and the val_loss of the step's row, which is then on disk. `mark` ends the line."""
        if not self.w.main:
            return
        self.say(f"step:{step}/{self.total} val_loss:{val_loss:.4f} {clock.times(step)}{mark}")
        self.pending = self.pending or dict(step=step, tokens=step * self.tokens)
        self.pending |= dict(
            val_loss=f"{val_loss:.6f}", **{n: _blank(v, ".6g") for n, v in extra.items()}
        )
        if self.tracker:
            self.tracker.send(step, dict(val_loss=val_loss) | extra)
        self.facts |= dict(val_loss=round(val_loss, 6))
        self.sync()
        self.status("running", step)

    def _flush_row(self) -> None:
        if self.pending:
            csv.DictWriter(self.csv, self.columns, lineterminator="\n").writerow(self.pending)
            self.csv.flush()
        self.pending = {}

    def sync(self) -> None:
        """Force what was written so far to disk."""
        if self.w.main:
            self._flush_row()
            for f in (self.log, self.csv):
                f.flush()
                os.fsync(f.fileno())

    def track(self, kind: str, project: str, name: str, k) -> None:
        """Also send every step and validation to a tracker, 'wandb' or 'trackio'; '' for none."""
        if self.w.main and kind:
            self.tracker = Tracker(kind, project, name, dataclasses.asdict(k), self.say)

    def status(self, status: str, step: int) -> None:
        """Replace status.json."""
        if self.w.main:
            self.told = time.monotonic()
            facts = dict(
                run_id=self.id, status=status, step=step, num_iterations=self.total, **self.facts
            )
            facts |= dict(
                pid=os.getpid(),
                host=socket.gethostname(),
                started=self.started,
                updated=time.time(),
            )
            part = self.status_path.with_suffix(".part")
            part.write_text(json.dumps(facts, indent=1) + "\n")
            os.replace(part, self.status_path)

    def close(self, status: str, step: int) -> None:
        """The run has ended, with `status`."""
        if self.w.main:
            self.status(status, step)
            if self.tracker:
                self.tracker.close()
            if self.bar is not None:
                self.bar.close()
                self.bar = None
            self.say(
                f"{status}: step:{step}/{self.total} peak_memory:{self.w.peak_memory_mib()}MiB log:{self.path}"
            )
            self.sync()
            self.log.close()
            self.csv.close()
            self.lock.release()


class Tracker:
    """W&B or trackio behind a daemon thread and a queue: a missing package, an error or a service that hangs is one
    line in the log, and the run goes on."""

    def __init__(
        self, kind: str, project: str, name: str, config: dict, say: Callable[[str], None]
    ):
        self.kind, self.say, self.closed = kind, say, False
        self.queue: queue.Queue = queue.Queue(10_000)
        self.thread = threading.Thread(target=self._work, args=(project, name, config), daemon=True)
        self.thread.start()

    def _work(self, project: str, name: str, config: dict) -> None:
        try:
            service = importlib.import_module(self.kind)
            run = service.init(project=project, name=name, config=config)
            while (item := self.queue.get()) is not None:
                step, values = item
                run.log({key: v for key, v in values.items() if math.isfinite(v)}, step=step)
            run.finish()
        except BaseException as error:  # whatever it is, it is not worth a run
            what = f"{self.kind} failed, nothing more is sent: {type(error).__name__}: {error}"
            if isinstance(error, ImportError):
                what = f"the package {self.kind} is not installed, so nothing is sent; pip install {self.kind}"
            if not self.closed:
                self.say(f"tracker: {what}")

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
                f"tracker: {self.kind} has not finished in {wait_s:.0f} s; its last values may be missing"
            )


def notes(k, presets: Mapping[str, Mapping], hidden: Sequence[str]) -> list[str]:
    """NAME=value of the knobs that are not as their preset has them; `hidden` ones have a column or change no loss."""
    usual = dataclasses.asdict(type(k)(**presets[k.preset])) | dict(preset=next(iter(presets)))
    rest = [f for f in dataclasses.fields(k) if f.name not in hidden or f.name == "preset"]
    return [
        f"{f.name.upper()}={show(f, v)}" for f in rest if (v := getattr(k, f.name)) != usual[f.name]
    ]


def check_results(path: Path, columns: Sequence[str], w: World) -> None:
    """Raise UserError, before training, when `path` has other columns than ours or cannot be written."""
    problem = None
    if w.main:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a+", newline="") as f:
                f.seek(0)
                found = f.readline().strip().split(",")
            if found not in ([""], list(columns)):
                wrong = sorted(set(found) ^ set(columns)) or "their order"
                problem = f"{path}: other columns than ours ({wrong}); move it away, or set RESULTS_FILE to another"
        except OSError as error:
            problem = f"{path}: cannot be written ({error.strerror}); set RESULTS_FILE to another"
    w.agree(problem)


def append_result(path: Path, columns: Sequence[str], row: Mapping[str, object], w: World) -> None:
    """Append one row in one write under a file lock, so that many runs may end at once; the header comes first in a
    new file, and a last line that somebody's crash tore is closed, never continued."""
    if not w.main:
        return
    with FileLock(f"{path}.lock"):
        text = io.StringIO()
        with open(path, "ab+") as f:
            size = f.tell()
            if size:
                f.seek(size - 1)
                text.write("" if f.read(1) == b"\n" else "\n")
            else:
                text.write(",".join(columns) + "\n")
            row = {
                name: "" if value != value else value for name, value in row.items()
            }  # nan: nothing to report
            csv.DictWriter(text, columns, lineterminator="\n").writerow(row)
            os.write(f.fileno(), text.getvalue().encode())
            os.fsync(f.fileno())


# Dense bf16 (T4: fp16) tensor-core peaks in FLOP/s, from the vendors' data sheets; first match in the device name wins.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}
PEAK_FLOPS |= {
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
}
PEAK_FLOPS |= {"RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(w: World) -> float | None:
    """What the device could do at best, in FLOP/s; None when it is not in the table, and MFU is then not claimed."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in w.name()), None)


def check_compiler(compile: bool, device: str) -> None:
    """Raise UserError when torch.compile is asked for and what it generates code with is not installed."""
    if (
        compile
        and device == "cpu"
        and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))
    ):
        raise UserError(
            "COMPILE=1 on a CPU needs a C++ compiler (g++, clang++ or CXX); install one, or set COMPILE=0"
        )
    if compile and device == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("COMPILE=1 on a GPU needs the package triton; install it, or set COMPILE=0")


def largest_that_fits(
    n: int, attempt: Callable[[int], None], estimate_mib: Callable[[int], int], w: World
) -> int:
    """The largest divisor of n whose step fits on every rank, at least 1: on CUDA tried out, from where a third of the
    estimate would fit; on a CPU estimated to need no more than half of the free memory."""
    fits = 1
    for size in (d for d in range(n, 0, -1) if n % d == 0):
        if w.device.type == "cpu":
            free = next(
                line
                for line in Path("/proc/meminfo").read_text().splitlines()
                if "MemAvailable" in line
            )
            if (
                estimate_mib(size) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
                > int(free.split()[1]) // 2048
            ):
                continue
        elif (
            estimate_mib(size) // 3 * 2**20
            > torch.cuda.get_device_properties(w.device).total_memory
        ):
            continue
        else:
            try:
                attempt(size)
            except torch.OutOfMemoryError:
                continue
            finally:
                torch.cuda.empty_cache()
        fits = size
        break
    return min(w.gather(fits))


# ----------------------------------------------------------------------------
# Checkpoints


def resume_facts(k, shards: TokenShards, log: RunLog) -> dict:
    """What a checkpoint says of its run, for check_resume."""
    facts = dict(knobs=dataclasses.asdict(k), content=shards.content, code_sha256=log.code_sha256)
    program = getattr(sys.modules[type(k).__module__], "__file__", None) or "?"
    return facts | dict(world_size=log.w.size, trainer=Path(program).stem)


def check_resume(state: dict, k, free: Sequence[str], shards: TokenShards, log: RunLog) -> None:
    """Raise UserError when a run is resumed with other knobs (the `free` ones may change) or other data."""
    was = state["knobs"]
    changed = [
        f
        for f in dataclasses.fields(k)
        if f.name not in free and was.get(f.name) != getattr(k, f.name)
    ]
    if changed:
        words = ", ".join(
            f"{f.name.upper()}={show(f, was.get(f.name))}, not {show(f, getattr(k, f.name))}"
            for f in changed
        )
        raise UserError(
            f"run {log.id} was started with {words}; resume it with the same, or choose another {log.named_by}"
        )
    if state["content"] != shards.content[: len(state["content"])]:
        raise UserError(
            f"run {log.id} was trained on other data than {shards.pattern} is now; put it back, or choose another "
            f"{log.named_by}"
        )
    log.say(
        f"resumed step:{state['step']} from a checkpoint written by {state['world_size']} rank(s)"
    )
    if state["code_sha256"] != log.code_sha256:
        log.say(
            f"the code is not that of the checkpoint: {log.code_sha256[:12]}, was {state['code_sha256'][:12]}"
        )


def save_checkpoint(folder: Path, step: int, state: dict | None, w: World, keep: int = 2) -> None:
    """Write rank 0's `state` (tensors and plain values, complete for any number of ranks) as folder/step_NNNNNN, which
    appears by one rename after all of it is on disk. Killed at any point, the newest whole checkpoint is still the one
    that load_checkpoint finds. The `keep` newest stay. Raises UserError on every rank when the disk is full."""
    problem = None
    if w.main:
        done, part = folder / f"step_{step:06d}", folder / f"step_{step:06d}.part"
        try:
            for stale in folder.glob("step_*.part"):
                shutil.rmtree(stale)
            part.mkdir(parents=True)
            with open(part / "state.pt", "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            facts = {
                "state.pt": dict(
                    bytes=(part / "state.pt").stat().st_size, sha256=_sha256(part / "state.pt")
                )
            }
            _write_whole(
                part / "manifest.json", json.dumps(dict(step=step, files=facts), indent=1).encode()
            )
            if done.exists():  # a bad one of the same step, or one written again after a resume
                done.rename(done.with_suffix(".old.part"))
            part.rename(done)
            _fsync_folder(folder)
            for old in sorted(folder.glob("step_??????"))[:-keep]:
                old.rename(old.with_suffix(".old.part"))
            for stale in folder.glob("step_*.part"):
                shutil.rmtree(stale)
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            shutil.rmtree(part, ignore_errors=True)
            problem = f"checkpoint {done} could not be written ({error}); earlier ones are whole; free space and resume"
    w.agree(problem)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return (
            hashlib.file_digest(f, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(f.read()).hexdigest()
        )


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def checkpoint_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Sizes and SHA-256 are compared with its manifest: torch.load
    itself does not notice a flipped byte."""
    try:
        for name, facts in json.loads((path / "manifest.json").read_text())["files"].items():
            if (size := (path / name).stat().st_size) != facts["bytes"]:
                return f"{name} has {size:,} bytes, its manifest says {facts['bytes']:,}"
            if _sha256(path / name) != facts["sha256"]:
                return f"{name} does not have the SHA-256 of its manifest"
    except (OSError, ValueError, KeyError) as error:
        return f"its manifest or a file of it cannot be read ({error})"
    return None


def load_checkpoint(folder: Path, w: World, say: Callable[[str], None] = print) -> dict | None:
    """The state of the newest checkpoint whose manifest verifies, on every rank (only rank 0 reads the disk), tensors
    on CPU; None if there is none. A bad one is named and skipped."""
    state = None
    if w.main:
        for path in sorted(folder.glob("step_??????"), reverse=True):
            if problem := checkpoint_problem(path):
                say(f"checkpoint {path} is skipped: {problem}")
                continue
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            break
    return _broadcast(state, w)


def _broadcast(state, w: World):
    """Rank 0's nested dicts and lists on every rank, tensor by tensor (an object broadcast would pickle gigabytes)."""
    tensors: list[Tensor] = []

    def strip(x):
        if isinstance(x, Tensor):
            tensors.append(x)
            return ("tensor", tuple(x.shape), x.dtype)
        return (
            {key: strip(v) for key, v in x.items()}
            if isinstance(x, dict)
            else [strip(v) for v in x]
            if isinstance(x, list)
            else x
        )

    def fill(x):
        if isinstance(x, tuple) and x and x[0] == "tensor":
            t = (tensors.pop(0) if w.main else torch.empty(x[1], dtype=x[2])).to(w.device)
            dist.broadcast(t, 0)
            return t.cpu()
        return (
            {key: fill(v) for key, v in x.items()}
            if isinstance(x, dict)
            else [fill(v) for v in x]
            if isinstance(x, list)
            else x
        )

    shape = [strip(state)]
    if w.size == 1:
        return state
    dist.broadcast_object_list(shape, 0)
    return fill(shape[0])
