"""data.py -- token shards as one stream, and batches made ahead of their use.

Promises that what a trainer reads is what the files hold: a shard of another format or a cut one is
refused by name before training, and a file of a known foreign format is told with how to convert
it. Position n of a stream is the same token on any number of ranks. An error while batches are made
reaches the training loop, which never waits for a thread that has gone.

A shard is 256 int32 (magic, version, number of tokens, zeros), then the tokens as uint16, both
little-endian: the format of llm.c and modded-nanogpt for GPT-2 tokens.
Shapes: N tokens.
"""

import glob
import hashlib
import os
import queue
import re
import threading
import time
import types
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plumbing.checkpoints import write_whole
from plumbing.knobs import UserError
from plumbing.world import World

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
LLAMA_MAGIC = 20240801  # llm.c's shards of uint32 tokens, version 7
SAMPLE_BYTES = (
    2**16
)  # of the head, the middle and the tail of a file, by which content is told apart

# ----------------------------------------------------------------------------
# Shards


def _foreign_format(path: str | Path, size: int) -> str:
    """What a file that is no shard of ours looks like and what to do about it; '' for no idea."""
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    own_text = "scripts/make_shards.py makes shards of text"
    convert = (
        'python -c "import numpy as np; from plumbing import write_shard; '
        "write_shard('NEW.bin', np.{}.astype(np.uint16))\""
    )
    if head.startswith(b"\x93NUMPY"):
        load = convert.format(f"load('{path}').reshape(-1)")
        return f"a NumPy array (.npy). If its values are token ids below 65,536, convert it: {load}"
    if head.startswith(b"PK\x03\x04"):
        return (
            f"a zip archive, such as .npz or .pt. Convert its arrays with write_shard; {own_text}"
        )
    if head.startswith(b"PAR1"):
        return f"a parquet file. Write its text to .txt files; {own_text}"
    if head[:2] == b"\x1f\x8b":
        return "compressed with gzip; decompress it with gunzip"
    little = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    big = np.frombuffer(head[:12].ljust(12, b"\0"), ">i4").tolist()
    if big[0] in (MAGIC, LLAMA_MAGIC):
        load = convert.format(f"fromfile('{path}', '>u2', offset={HEADER_BYTES})")
        return f"a shard written with big-endian numbers. Convert it: {load}"
    if little[0] == LLAMA_MAGIC or (little[0] == MAGIC and little[1] == 7):
        return (
            "a shard of uint32 tokens (llm.c version 7, for Llama's tokenizer). Its ids do not fit "
            f"into the 65,536 of this format; tokenize the text again: {own_text}"
        )
    if little[0] == MAGIC and little[1] != VERSION:
        return (
            f"a shard of version {little[1]}, which is not the version {VERSION} read here; "
            f"delete it and make or download it again ({own_text})"
        )
    if _is_text(head):
        return f"text, not tokens; {own_text}"
    if size >= 64 and size % 2 == 0 and _looks_like_bare_tokens(path, size):
        load = convert.format(f"fromfile('{path}', '<u2')")
        return f"uint16 tokens without a header, as nanoGPT writes them. Convert it: {load}"
    return ""


def _is_text(head: bytes) -> bool:
    """Whether the bytes are printable UTF-8 (a character may be cut at their end)."""
    for cut in range(4):
        try:
            text = head[: len(head) - cut].decode()
        except UnicodeDecodeError:
            continue
        return bool(text) and all(c.isprintable() or c in "\t\r\n" for c in text)
    return False


def _looks_like_bare_tokens(path: str | Path, size: int) -> bool:
    """Whether a file without a header could be GPT-2's tokens: ids in its vocabulary, and of many
    sizes. A damaged header fails this, because it is mostly zeros."""
    first_N = np.fromfile(path, "<u2", min(size // 2, 512))
    return int(first_N.max()) < 50304 and np.count_nonzero(first_N == 0) < len(first_N) // 4


def read_shard(path: str | Path) -> np.ndarray:
    """Map one shard's uint16 tokens.

    Raises UserError, naming the file, when the magic, the version, the count or the length is
    wrong; a known foreign format is named, with how to convert it.
    """
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", 3)
    redo = "delete it and make or download it again"
    if len(header) < 3 or header[0] != MAGIC or header[1] != VERSION:
        if found := _foreign_format(path, size):
            raise UserError(f"{path}: not a token shard of this program but {found}")
        raise UserError(
            f"{path}: not a token shard (its first ints are {header.tolist()}, not "
            f"[{MAGIC}, {VERSION}, count]); {redo}"
        )
    promised = HEADER_BYTES + 2 * int(header[2])
    if promised != size or header[2] < 1:
        raise UserError(
            f"{path}: its header promises {header[2]:,} tokens, {promised:,} bytes; the file has "
            f"{size:,}; {redo}"
        )
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES)


def read_bytes(path: str | Path) -> np.ndarray:
    """Map a file as uint8 tokens, its bytes. Raises UserError, naming the file, if it is empty."""
    if not os.path.getsize(path):
        raise UserError(f"{path}: is empty; leave it out, or put text into it")
    return np.memmap(path, np.uint8, "r")


def write_shard(path: str | Path, tokens_N: np.ndarray) -> None:
    """Write tokens, each below 65,536, as one shard; the file exists whole or not at all."""
    if len(tokens_N) and tokens_N.dtype != np.uint16:
        low, high = int(tokens_N.min()), int(tokens_N.max())
        if low < 0 or high >= 2**16:
            raise UserError(f"{path}: token ids from {low} to {high}; a shard holds 0 to 65535")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens_N)
    write_whole(Path(path), header, tokens_N.astype("<u2", copy=False))


# ----------------------------------------------------------------------------
# The stream of tokens


def find_files(pattern: str) -> list[str]:
    """The files that match, in name order. Folders that exist are taken by their names, and
    brackets behind them as they stand before they are taken as a pattern: a checkout may lie at
    `a [v2]`, where a plain glob would find nothing."""
    folder = Path(pattern)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    rest = os.path.relpath(pattern, folder) if folder.name else pattern
    for literal in (rest.replace("[", "[[]"), rest):
        found = glob.glob(literal, root_dir=folder)
        if found:
            return sorted(os.path.join(folder, name) if folder.name else name for name in found)
    return []


class TokenShards:
    """All tokens of some shards, in name order, as one stream.

    `pattern` is a glob pattern or a list of files. `open_file` maps one file: read_shard for uint16
    tokens, read_bytes for text as bytes. Raises UserError if there are no files.
    """

    def __init__(
        self,
        pattern: str | Sequence[str],
        hint: str = "python cached_fineweb10B.py 27 downloads an epoch; PRESET=demo needs none",
        open_file: Callable[[str], np.ndarray] = read_shard,
    ):
        if isinstance(pattern, str):
            self.paths = find_files(pattern)
            self.pattern = pattern
        else:
            self.paths = [str(path) for path in pattern]
            self.pattern = ", ".join(self.paths[:3])
            if len(self.paths) > 3:
                self.pattern += ", ..."
        if not self.paths:
            raise UserError(f"no token shards match {pattern}; {hint}")
        self.shards = [self._open(path, open_file) for path in self.paths]
        self.lengths = [len(shard) for shard in self.shards]
        # Where each shard begins in the stream, and at last where the stream ends.
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)]).tolist()

    @staticmethod
    def _open(path: str, open_file: Callable[[str], np.ndarray]) -> np.ndarray:
        """Map a file, and see that it was not cut while that was done: reading beyond the end of a
        mapped file ends the process. What is cut later can only be told by faulthandler."""
        try:
            shard = open_file(path)
            mapped = getattr(shard, "offset", 0) + shard.nbytes
            if os.path.getsize(path) < mapped:
                raise UserError(f"{path}: became shorter while it was opened; is it being written?")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        return shard

    @property
    def total(self) -> int:
        return self.starts[-1]

    @cached_property
    def content(self) -> list[list]:
        """[name, tokens, SHA-256 of samples] of each shard: enough to notice that data are not what
        they were, wherever the files are.

        The samples are the first, the middle and the last 64 KiB, so that this costs milliseconds
        per shard. A change of the same length that lies elsewhere in a longer file is not seen.
        """
        triples = zip(self.paths, self.lengths, self.shards, strict=True)
        return [[Path(path).name, n, _sample_hash(shard)] for path, n, shard in triples]

    def read(self, start: int, n: int) -> np.ndarray:
        """(n,) tokens, uint16 (of text files uint8), from stream position `start`, running over
        the edges of shards."""
        assert 0 <= start and start + n <= self.total, (
            f"tokens {start} to {start + n} of {self.total}"
        )
        parts = []
        shard = int(np.searchsorted(self.starts, start, "right")) - 1
        while n > 0:
            part = self.shards[shard][start - self.starts[shard] :][:n]
            parts.append(part)
            start += len(part)
            n -= len(part)
            shard += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def gaps(self) -> list[int]:
        """Numbers missing from the shards' own numbering, such as 2 when there are ..._000001 and
        ..._000003."""
        found = [re.search(r"(\d+)\.bin$", path) for path in self.paths]
        numbers = {int(match[1]) for match in found if match}
        if not numbers:
            return []
        return sorted(set(range(min(numbers), max(numbers))) - numbers)

    def check_length(self, num_tokens: int, knob_name: str) -> None:
        """Refuse shards with fewer than `num_tokens` tokens, which `knob_name` asks for."""
        if self.total < num_tokens:
            raise UserError(
                f"{self.pattern}: {self.total:,} tokens, {knob_name} needs {num_tokens:,}, one "
                f"more than it says; lower it, or get more"
            )

    def check_ids(self, vocab_size: int, world: World, last: int | None = None) -> None:
        """Refuse, by name, a shard with ids beyond the vocabulary, looking at the stream up to
        position `last`. The ranks share the reading, which also warms the page cache."""
        problem = None
        used = [i for i in range(len(self.paths)) if last is None or self.starts[i] < last]
        for i in used[world.rank :: world.size]:
            if problem or (self.shards[i].dtype == np.uint8 and vocab_size >= 256):
                continue
            top = int(self.shards[i].max())
            if top >= vocab_size:
                problem = (
                    f"{self.paths[i]}: holds token id {top}, VOCAB_SIZE={vocab_size} ends at "
                    f"{vocab_size - 1}; raise VOCAB_SIZE or use shards made with another tokenizer"
                )
        world.agree(problem)


def _sample_hash(shard: np.ndarray) -> str:
    """The SHA-256 of the shard's length in bytes and of its head, middle and tail."""
    whole = shard.view(np.uint8)
    digest = hashlib.sha256(str(len(whole)).encode())
    if len(whole) <= 3 * SAMPLE_BYTES:
        digest.update(whole.tobytes())
    else:
        middle = (len(whole) - SAMPLE_BYTES) // 2
        for start in (0, middle, len(whole) - SAMPLE_BYTES):
            digest.update(whole[start : start + SAMPLE_BYTES].tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------
# Batches ahead of use


class Prefetch:
    """make(step) on a thread, `depth` steps ahead; get(step) gives its tensors on the device.

    On CUDA the tensors are pinned and copied without blocking. An error in the thread is raised by
    get. close() ends the thread; it may be called twice, and leaving a `with` block calls it.
    """

    def __init__(
        self,
        make: Callable[[int], tuple[Tensor, ...]],
        first_step: int,
        device: torch.device,
        depth: int = 2,
    ):
        self.device = device
        self.wait_s = 0.0  # time that get has spent waiting, in all
        self.closed = threading.Event()
        self.queue: queue.Queue = queue.Queue(depth)
        self.thread = threading.Thread(target=self._fill, args=(make, first_step), daemon=True)
        self.thread.start()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    def _make_on_host(self, make: Callable, step: int) -> tuple[Tensor, ...] | BaseException:
        try:
            tensors = make(step)
            if self.device.type == "cuda":
                tensors = tuple(t.pin_memory() for t in tensors)
            return tensors
        except BaseException as error:  # whatever it is, the training loop is to raise it
            return error

    def _fill(self, make: Callable, step: int) -> None:
        if self.device.type == "cuda":
            # Per thread: without it, pinning would make a context on the first GPU for every rank.
            torch.cuda.set_device(self.device)
        while not self.closed.is_set():
            item = self._make_on_host(make, step)
            while not self.closed.is_set():
                try:
                    self.queue.put((step, item), timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def get(self, step: int) -> tuple[Tensor, ...]:
        """The tensors of `step`; steps are asked for in order."""
        started = time.perf_counter()
        made, item = self._next()
        self.wait_s += time.perf_counter() - started
        if isinstance(item, BaseException):
            self.close()
            raise item
        assert made == step, f"batch of step {made} where step {step} was asked for"
        return tuple(t.to(self.device, non_blocking=True) for t in item)

    def _next(self) -> tuple[int, tuple[Tensor, ...] | BaseException]:
        """What the thread has made next. Looks up from waiting, so that Ctrl-C is heard, and so
        that a thread that has gone is noticed."""
        while True:
            try:
                return self.queue.get(timeout=0.2)
            except queue.Empty:
                pass
            if self.closed.is_set():
                raise RuntimeError("the batches were closed; make a new Prefetch to go on")
            if not self.thread.is_alive() and self.queue.empty():
                raise RuntimeError("the thread that makes batches has ended without a word")

    def close(self) -> None:
        self.closed.set()
        if self.thread is not threading.current_thread():
            self.thread.join(timeout=5)  # a read from a dead disk must not keep the process
