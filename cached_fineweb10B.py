"""cached_fineweb10B.py -- FineWeb as GPT-2 tokens, from the hub into data/fineweb10B, checked.

    python cached_fineweb10B.py            all 103 training shards and the validation shard, 20.8 GB
    python cached_fineweb10B.py 9          the first 9 of them and the validation shard, 2.0 GB
    python cached_fineweb10B.py --small    the start of a training and a validation shard, 41 MB
    HF_ENDPOINT=... python cached_fineweb10B.py 9      from a mirror of the hub

Safe to rerun, to interrupt and to start twice: a shard gets its final name only when its header,
its length and its SHA-256 agree with the hub's, checked.json remembers which did, and a lock lets
one process at a time into the folder. A shard cut short by --small has the name of the whole one,
so a later run replaces it.
Raises   UserError naming the shard: no hub, no such shard, no room, or bytes that stay wrong
Source   dataset kjj0/fineweb10B-gpt2; the command line of modded-nanogpt's script of the same name
"""

import argparse
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

# Plain HTTP, the way whose faults tests/hub_server.py acts out. The library reads this when it is
# imported.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

import numpy as np
from filelock import FileLock, Timeout
from huggingface_hub import HfFileMetadata
from huggingface_hub.utils import get_session, hf_raise_for_status
from tqdm import tqdm

from plumbing.data import HEADER_BYTES, MAGIC, VERSION, read_shard, write_shard
from plumbing.hub import hub_facts, hub_fetch, hub_persist, hub_problem
from plumbing.knobs import ROOT, UserError
from plumbing.world import launch

REPO = "kjj0/fineweb10B-gpt2"
NUM_TRAIN = 103
VAL = "fineweb_val_000000.bin"
OTHERWISE = (
    "copy fineweb_*.bin files into the folder by hand (trainers read what is there), or train "
    "with PRESET=demo, which "
    "needs no download"
)
persist = partial(hub_persist, REPO, otherwise=OTHERWISE)


def problem(path: Path, meta: HfFileMetadata | None = None) -> str:
    """What keeps `path` from being a shard and, given `meta`, the hub's shard; empty if nothing
    does.
    """
    try:
        num_tokens, size = len(read_shard(path)), path.stat().st_size
    except FileNotFoundError:
        return "missing"
    except UserError as error:
        return str(error)
    if meta and size != meta.size:
        return (
            f"{path}: {num_tokens:,} tokens in {size:,} bytes, but the hub's shard has "
            f"{meta.size:,} bytes"
        )
    return hub_problem(path, meta) if meta else ""


def fetch_start(path: Path, meta: HfFileMetadata, size: int) -> None:
    """Download the first `size` bytes of a shard, by a range request, and write them as a shard
    that long.
    """

    def attempt() -> bytes:
        data = bytearray()
        headers = {"Range": f"bytes=0-{size - 1}", "Accept-Encoding": "identity"}
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None)
        with (
            bar,
            get_session().stream("GET", meta.location, headers=headers, timeout=30) as response,
        ):
            hf_raise_for_status(response)
            for chunk in response.iter_bytes(1 << 16):
                data += chunk
                bar.update(len(chunk))
                if len(data) >= size:  # a server that ignores Range goes on to the end of the file
                    break
        head = np.frombuffer(data[:12], "<i4").tolist() if len(data) >= size else []
        if head[:2] != [MAGIC, VERSION] or HEADER_BYTES + 2 * head[2] != meta.size:
            raise UserError(
                f"{path.name}: {len(data):,} of {size:,} bytes came, first ints {head}: not it"
            )
        return bytes(data[:size])

    write_shard(path, np.frombuffer(persist(path.name, attempt), "<u2", offset=HEADER_BYTES))


def bring(folder: Path, goal: dict[str, int], verify: bool) -> None:
    """Make `folder` hold the shards named in `goal`: whole for 0, else at least that many tokens of
    them.
    """
    record = folder / "checked.json"  # name -> bytes of each shard once found equal to the hub's
    try:
        checked = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        checked = {}

    def remember(path: Path) -> None:
        checked[path.name] = path.stat().st_size
        record.with_suffix(".part").write_text(json.dumps(checked, indent=1, sort_keys=True) + "\n")
        os.replace(record.with_suffix(".part"), record)

    todo: list[tuple[Path, HfFileMetadata, int]] = []  # with the bytes to fetch
    for name, least in tqdm(goal.items(), desc="checking", leave=False, disable=None):
        path, fault = folder / name, problem(folder / name)
        held = 0 if fault else path.stat().st_size
        if held and (
            held >= HEADER_BYTES + 2 * least if least else held == checked.get(name) and not verify
        ):
            continue
        meta = hub_facts(REPO, name, OTHERWISE)
        size = min(HEADER_BYTES + 2 * least, meta.size) if least else meta.size
        if held and least:
            fault = (
                "" if held >= size else f"{path}: {held:,} bytes, fewer than the {size:,} asked for"
            )
        elif held:
            fault = problem(path, meta)
        if fault:
            todo.append((path, meta, size))
            if path.exists():
                tqdm.write(f"{name}: will be fetched again: {fault}")
        elif not least:
            remember(path)

    need, free = sum(size for _, _, size in todo), shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{folder}: the {len(todo)} shards to fetch take {need:,} bytes, {free:,} are free; "
            f"make room, ask for fewer, use --small, or choose another disk with --dir"
        )
    for k, (path, meta, size) in enumerate(todo, 1):
        print(f"[{k}/{len(todo)}] {path.name}, {size:,} bytes", flush=True)
        if problem(path) or path.stat().st_size >= meta.size:
            path.unlink(missing_ok=True)  # bad; a good short one stays in use until the rename
        if goal[path.name]:
            fetch_start(path, meta, size)
        else:
            hub_fetch(REPO, path.name, path, problem, OTHERWISE, meta)
            remember(path)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "n", nargs="?", type=int, metavar="N", help=f"training shards, 1 to {NUM_TRAIN} (all)"
    )
    p.add_argument("--dir", type=Path, default=ROOT / "data" / "fineweb10B")
    p.add_argument(
        "--verify", action="store_true", help="compare the SHA-256 of shards already there, too"
    )
    p.add_argument(
        "--small", action="store_true", help="only the start of one training shard and of val"
    )
    p.add_argument("--small-train-tokens", type=int, default=10_000_000, metavar="TOKENS")
    p.add_argument("--small-val-tokens", type=int, default=10_485_761, metavar="TOKENS")
    a = p.parse_args(argv)
    num_train = NUM_TRAIN if a.n is None else a.n
    if not 1 <= num_train <= NUM_TRAIN:
        raise UserError(
            f"N={a.n}: the dataset has 1 to {NUM_TRAIN} training shards of 100M tokens; try 9"
        )
    if a.small and a.n is not None:
        raise UserError(
            f"--small fetches the start of one training shard; leave out N={a.n} or --small"
        )
    if min(a.small_train_tokens, a.small_val_tokens) < 1:
        raise UserError("--small-train-tokens and --small-val-tokens: expected 1 token or more")
    if a.small:
        goal = {VAL: a.small_val_tokens, "fineweb_train_000001.bin": a.small_train_tokens}
    else:
        goal = {VAL: 0} | {f"fineweb_train_{k:06d}.bin": 0 for k in range(1, num_train + 1)}

    lock = FileLock(a.dir / ".lock")
    try:
        a.dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{a.dir}: another download is at work here; waiting for it", flush=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"{a.dir}: cannot be written: {error}; choose another folder with --dir"
        ) from None
    try:
        shutil.rmtree(a.dir / ".part", ignore_errors=True)  # of a run that was killed
        bring(a.dir, goal, a.verify)
    finally:
        shutil.rmtree(a.dir / ".part", ignore_errors=True)
        lock.release()
    num_val, *num_train = (len(read_shard(a.dir / name)) for name in goal)
    print(f"{a.dir}: {sum(num_train):,} training and {num_val:,} validation tokens, checked")
    print(
        f"INPUT_BIN='{a.dir}/fineweb_train_*.bin' INPUT_VAL_BIN='{a.dir}/fineweb_val_*.bin' "
        f"trains on them"
    )


if __name__ == "__main__":
    try:
        launch(main)
    except KeyboardInterrupt:
        print(
            "stopped; finished shards are kept, the same command goes on from here", file=sys.stderr
        )
        sys.exit(130)
