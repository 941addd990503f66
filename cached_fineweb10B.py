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
from filelock import AcquireReturnProxy, FileLock, Timeout
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


def read_checked(folder: Path) -> dict[str, int]:
    """Bytes of each shard that was once found equal to the hub's, by name."""
    try:
        return json.loads((folder / "checked.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def write_checked(folder: Path, checked: dict[str, int]) -> None:
    part = folder / "checked.part"
    part.write_text(json.dumps(checked, indent=1, sort_keys=True) + "\n")
    os.replace(part, folder / "checked.json")


def missing_part(
    path: Path, least: int, checked: dict[str, int], verify: bool
) -> tuple[HfFileMetadata, int, str] | None:
    """What must be fetched so that `path` holds at least `least` tokens of its shard (0: the whole
    shard, equal to the hub's): the hub's facts, bytes, and the reason. None when nothing is.
    A whole shard found good is entered in `checked`.
    """
    fault = problem(path)
    held = 0 if fault else path.stat().st_size
    wanted = HEADER_BYTES + 2 * least
    if held and least and held >= wanted:
        return None
    if held and not least and held == checked.get(path.name) and not verify:
        return None

    meta = hub_facts(REPO, path.name, OTHERWISE)
    if least:
        size = min(wanted, meta.size)
        if held >= size:
            return None
        return meta, size, fault or f"{held:,} bytes, fewer than the {size:,} asked for"
    fault = fault or problem(path, meta)
    if fault:
        return meta, meta.size, fault
    checked[path.name] = held
    write_checked(path.parent, checked)
    return None


def bring(folder: Path, goal: dict[str, int], verify: bool) -> None:
    """Make `folder` hold the shards named in `goal`: whole for 0, else at least that many tokens of
    them.
    """
    checked = read_checked(folder)
    todo: list[tuple[Path, HfFileMetadata, int]] = []  # with the bytes to fetch
    for name, least in tqdm(goal.items(), desc="checking", leave=False, disable=None):
        path = folder / name
        found = missing_part(path, least, checked, verify)
        if found is None:
            continue
        meta, size, reason = found
        todo.append((path, meta, size))
        if path.exists():
            tqdm.write(f"{name}: will be fetched again: {reason}")

    need = sum(size for _, _, size in todo)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{folder}: the {len(todo)} shards to fetch take {need:,} bytes, {free:,} are free; "
            f"make room, ask for fewer, use --small, or choose another disk with --dir"
        )
    for k, (path, meta, size) in enumerate(todo, start=1):
        print(f"[{k}/{len(todo)}] {path.name}, {size:,} bytes", flush=True)
        if problem(path) or path.stat().st_size >= meta.size:
            path.unlink(missing_ok=True)  # bad; a good short one stays in use until the rename
        if goal[path.name]:
            fetch_start(path, meta, size)
        else:
            hub_fetch(REPO, path.name, path, problem, OTHERWISE, meta)
            checked[path.name] = path.stat().st_size
            write_checked(folder, checked)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "n", nargs="?", type=int, metavar="N", help=f"training shards, 1 to {NUM_TRAIN} (all)"
    )
    parser.add_argument("--dir", type=Path, default=ROOT / "data" / "fineweb10B")
    parser.add_argument(
        "--verify", action="store_true", help="compare the SHA-256 of shards already there, too"
    )
    parser.add_argument(
        "--small", action="store_true", help="only the start of one training shard and of val"
    )
    parser.add_argument("--small-train-tokens", type=int, default=10_000_000, metavar="TOKENS")
    parser.add_argument("--small-val-tokens", type=int, default=10_485_761, metavar="TOKENS")
    return parser.parse_args(argv)


def wanted_shards(args: argparse.Namespace) -> dict[str, int]:
    """Names of the shards that the command line asks for, each with the tokens that are enough (0:
    the whole shard). The validation shard is the first.
    """
    if args.small and args.n is not None:
        raise UserError(
            f"--small fetches the start of one training shard; leave out N={args.n} or --small"
        )
    if args.small:
        if min(args.small_train_tokens, args.small_val_tokens) < 1:
            raise UserError("--small-train-tokens and --small-val-tokens: expected 1 token or more")
        return {VAL: args.small_val_tokens, "fineweb_train_000001.bin": args.small_train_tokens}
    num_train = NUM_TRAIN if args.n is None else args.n
    if not 1 <= num_train <= NUM_TRAIN:
        raise UserError(
            f"N={num_train}: the dataset has 1 to {NUM_TRAIN} training shards of 100M tokens; try 9"
        )
    return {VAL: 0} | {f"fineweb_train_{k:06d}.bin": 0 for k in range(1, num_train + 1)}


def lock_folder(folder: Path) -> AcquireReturnProxy:
    """Make `folder` and keep other downloads out of it until the returned context ends."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"{folder}: another download is at work here; waiting for it", flush=True)
        return lock.acquire()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error}; choose another folder with --dir"
        ) from None


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    goal = wanted_shards(args)
    folder = args.dir
    with lock_folder(folder):
        shutil.rmtree(folder / ".part", ignore_errors=True)  # of a run that was killed
        try:
            bring(folder, goal, args.verify)
        finally:
            shutil.rmtree(folder / ".part", ignore_errors=True)
    num_val, *num_train = (len(read_shard(folder / name)) for name in goal)
    print(f"{folder}: {sum(num_train):,} training and {num_val:,} validation tokens, checked")
    print(
        f"INPUT_BIN='{folder}/fineweb_train_*.bin' INPUT_VAL_BIN='{folder}/fineweb_val_*.bin' "
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
