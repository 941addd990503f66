"""The download of FineWeb against a loopback hub with faults: a shard is the hub's, or it is not
there.
"""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hub_server import Hub, serving

import cached_fineweb10B
from plumbing import hub as plumbing_hub
from plumbing.data import HEADER_BYTES, MAGIC, read_shard
from plumbing.knobs import ROOT, UserError

PROGRAM = ROOT / "cached_fineweb10B.py"
VAL, TRAIN_1, TRAIN_2 = (
    "fineweb_val_000000.bin",
    "fineweb_train_000001.bin",
    "fineweb_train_000002.bin",
)


def shard_bytes(num_tokens: int, seed: int) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, 1, num_tokens
    tokens = np.random.default_rng(seed).integers(0, 50257, num_tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


FILES = {
    VAL: shard_bytes(30_000, 0),
    TRAIN_1: shard_bytes(50_000, 1),
    TRAIN_2: shard_bytes(7_000, 2),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(FILES, tmp_path / "hf", monkeypatch) as server:
        yield server


def download(folder: Path, *args: str) -> None:
    cached_fineweb10B.main([*args, "--dir", str(folder)])


def on_hub(folder: Path, *names: str) -> bool:
    """Exactly these shards are in the folder, byte for byte the hub's, and nothing half done beside
    them.
    """
    found = sorted(p.name for p in folder.iterdir() if p.name not in (".lock", "checked.json"))
    return found == sorted(names) and all((folder / n).read_bytes() == FILES[n] for n in names)


# ----------------------------------------------------------------------------
# The download


def test_full_download_through_the_command_line_is_the_hubs_bytes_and_rerun_fetches_nothing(
    hub: Hub, tmp_path: Path
) -> None:
    env = dict(os.environ, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    done = forked.run([PROGRAM, "2", "--dir", tmp_path / "fw"], tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert on_hub(tmp_path / "fw", VAL, TRAIN_1, TRAIN_2)
    assert sorted(hub.gets) == sorted([VAL, TRAIN_1, TRAIN_2])
    assert "57,000 training and 30,000 validation tokens" in done.stdout

    hub.files.clear()  # a hub that knows nothing: the rerun must not need it
    download(tmp_path / "fw", "2")
    assert len(hub.gets) == 3


def test_two_downloads_at_once_fetch_every_shard_once(hub: Hub, tmp_path: Path) -> None:
    words = [PROGRAM, "2", "--dir", tmp_path / "fw"]
    env = dict(os.environ, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    both = [forked.Program(words, tmp_path, env) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert on_hub(tmp_path / "fw", VAL, TRAIN_1, TRAIN_2) and len(hub.gets) == 3


def test_dropped_connection_is_survived(hub: Hub, tmp_path: Path) -> None:
    hub.faults[TRAIN_1] = ["cut"]
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(TRAIN_1) == 2


def test_connection_that_always_drops_leaves_no_shard_and_the_next_run_goes_on(
    hub: Hub, tmp_path: Path
) -> None:
    hub.faults[TRAIN_1 + "!"] = "cut"
    with pytest.raises(UserError, match=f"{TRAIN_1}.*no answer, or a broken one"):
        download(tmp_path, "1")
    assert on_hub(tmp_path, VAL)
    hub.faults.clear()
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(VAL) == 1


def test_interrupted_download_leaves_no_shard_behind(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    def ctrl_c(*args: object, **kwargs: object) -> None:
        Path(kwargs["local_dir"]).mkdir()
        (Path(kwargs["local_dir"]) / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(huggingface_hub, "hf_hub_download", ctrl_c)
        download(tmp_path, "1")
    assert on_hub(tmp_path)
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1)


def test_truncated_shard_is_named_and_fetched_again(hub: Hub, tmp_path: Path, capsys) -> None:
    download(tmp_path, "1")
    os.truncate(tmp_path / TRAIN_1, 60_000)
    download(tmp_path, "1")
    out = capsys.readouterr().out
    assert f"{TRAIN_1}: will be fetched again" in out and "60,000" in out
    assert (
        on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(TRAIN_1) == 2 and hub.gets.count(VAL) == 1
    )


def test_damaged_header_is_found_without_verify_though_name_and_length_are_right(
    hub: Hub, tmp_path: Path
) -> None:
    download(tmp_path, "1")
    with open(tmp_path / TRAIN_1, "rb+") as f:
        f.write(b"\0\0\0\0")
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(TRAIN_1) == 2


def test_file_of_another_format_is_not_trusted_by_its_name(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / TRAIN_1).write_bytes(b"<html>please log in</html>")
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1)


def test_wrong_byte_of_right_size_is_caught_by_its_hash_and_fetched_again(
    hub: Hub, tmp_path: Path, capsys
) -> None:
    hub.faults[TRAIN_1] = ["flip"]
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(TRAIN_1) == 2
    assert "right length, wrong bytes" in capsys.readouterr().out


def test_bytes_that_stay_wrong_are_one_error_after_three_downloads(
    hub: Hub, tmp_path: Path
) -> None:
    hub.faults[TRAIN_1 + "!"] = "flip"
    with pytest.raises(UserError, match=f"{TRAIN_1}: 3 downloads were all bad.*SHA-256"):
        download(tmp_path, "1")
    assert on_hub(tmp_path, VAL) and hub.gets.count(TRAIN_1) == 3


def test_verify_finds_a_byte_that_changed_on_disk(hub: Hub, tmp_path: Path) -> None:
    download(tmp_path, "1")
    with open(tmp_path / TRAIN_1, "rb+") as f:
        f.seek(5000)
        f.write(b"\xff\xff")
    download(tmp_path, "1", "--verify")
    assert on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(TRAIN_1) == 2


def test_shards_copied_by_hand_are_hashed_once_and_not_fetched(hub: Hub, tmp_path: Path) -> None:
    for name in (VAL, TRAIN_1):
        (tmp_path / name).write_bytes(FILES[name])
    (tmp_path / TRAIN_2).write_bytes(FILES[TRAIN_2][:-1] + b"\xee")
    download(tmp_path, "2")
    assert on_hub(tmp_path, VAL, TRAIN_1, TRAIN_2) and hub.gets == [TRAIN_2]


def test_shard_missing_on_the_hub_is_one_error_naming_it(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"fineweb_train_000003\.bin: the hub has no such file.*HTTP 404"
    ):
        download(tmp_path, "3")
    assert not hub.gets  # known before the first byte is fetched


def test_no_hub_is_one_line_naming_it_and_the_ways_out(tmp_path: Path) -> None:
    with Hub({}) as closed:
        url = closed.url
    env = dict(os.environ, HF_ENDPOINT=url, HF_HOME=str(tmp_path / "hf"))
    done = forked.run([PROGRAM, "1", "--dir", tmp_path / "fw"], tmp_path, env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cached_fineweb10B.py: error: ") and url in last and VAL in last
    assert all(way in last for way in ("HF_ENDPOINT", "by hand", "PRESET=demo"))


def test_no_hub_deletes_no_shard(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    download(tmp_path, "1")
    os.truncate(tmp_path / TRAIN_1, 60_000)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="OfflineModeIsEnabled"):
        download(tmp_path, "1")
    assert (tmp_path / TRAIN_1).stat().st_size == 60_000


def test_full_disk_is_refused_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch
) -> None:
    need = sum(len(FILES[n]) for n in (VAL, TRAIN_1))
    usage = lambda path: shutil._ntuple_diskusage(10**12, 10**12, need - 1)
    monkeypatch.setattr(cached_fineweb10B.shutil, "disk_usage", usage)
    with pytest.raises(
        UserError, match=f"2 shards to fetch take {need:,} bytes, {need - 1:,} are free"
    ):
        download(tmp_path, "1")
    assert not hub.gets


def test_disk_full_half_way_is_one_error_without_a_second_attempt(
    hub: Hub, tmp_path: Path, monkeypatch
) -> None:
    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_space)
    monkeypatch.setattr(plumbing_hub, "ATTEMPTS", 10**9)
    with pytest.raises(UserError, match=r"cannot be written.*No space left"):
        download(tmp_path, "1")


@pytest.mark.parametrize("n", ["0", "104", "-1"])
def test_number_of_shards_out_of_range_is_refused(hub: Hub, tmp_path: Path, n: str) -> None:
    with pytest.raises(UserError, match=f"N={n}: the dataset has 1 to 103"):
        download(tmp_path / "fw", n)
    assert not (tmp_path / "fw").exists()


# ----------------------------------------------------------------------------
# --small

SMALL = ("--small", "--small-train-tokens", "4000", "--small-val-tokens", "2001")
SMALL_BYTES = 2 * HEADER_BYTES + 2 * (4000 + 2001)


def test_small_fetches_the_start_of_two_shards_and_no_more(hub: Hub, tmp_path: Path) -> None:
    download(tmp_path, *SMALL)
    for name, num_tokens in ((TRAIN_1, 4000), (VAL, 2001)):
        whole = np.frombuffer(FILES[name], "<u2", offset=HEADER_BYTES)
        assert np.array_equal(read_shard(tmp_path / name), whole[:num_tokens])
    assert hub.sent == SMALL_BYTES
    download(tmp_path, *SMALL)
    assert hub.sent == SMALL_BYTES  # nothing fetched twice


def test_full_download_replaces_small_shards(hub: Hub, tmp_path: Path, capsys) -> None:
    download(tmp_path, *SMALL)
    download(tmp_path, "2")
    assert on_hub(tmp_path, VAL, TRAIN_1, TRAIN_2)
    assert f"{TRAIN_1}: will be fetched again" in capsys.readouterr().out
    hub.gets.clear()
    download(tmp_path, *SMALL)
    assert (
        on_hub(tmp_path, VAL, TRAIN_1, TRAIN_2) and not hub.gets
    )  # and small never cuts a whole one


def test_small_shards_stay_usable_until_the_full_ones_are_there(hub: Hub, tmp_path: Path) -> None:
    download(tmp_path, *SMALL)
    hub.faults[TRAIN_1 + "!"] = "flip"
    with pytest.raises(UserError):
        download(tmp_path, "1")
    assert len(read_shard(tmp_path / TRAIN_1)) == 4000


def test_small_survives_a_cut_and_a_server_that_ignores_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {VAL: ["cut"], TRAIN_1: ["no_range"]}
    download(tmp_path, *SMALL)
    assert len(read_shard(tmp_path / VAL)) == 2001 and len(read_shard(tmp_path / TRAIN_1)) == 4000


def test_small_asking_for_more_than_a_shard_has_gets_all_of_it_once(
    hub: Hub, tmp_path: Path
) -> None:
    for _ in range(2):
        download(tmp_path, "--small", "--small-train-tokens", "999999")
    assert on_hub(tmp_path, VAL, TRAIN_1) and len(hub.gets) == 2
