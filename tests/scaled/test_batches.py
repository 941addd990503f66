"""Schedules, batches and validation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scaled_support import fresh, small
from support import ONE

import train_scaled
from plumbing import TokenShards, World, read_bytes
from plumbing.byte_batches import ByteBatches, ScoredBytes
from plumbing.byte_scores import evaluate

CPU = torch.device("cpu")


def shards(folder: Path, data: bytes, name: str = "t.txt") -> TokenShards:
    (folder / name).write_bytes(data)
    return TokenShards([str(folder / name)], open_file=read_bytes)


class Part(World):
    """One of several ranks, by itself: what it would sum with the others is kept in `signals`."""

    def all_reduce(self, x):
        self.signals.append(x)
        return x


def test_the_schedules_are_what_their_names_say():
    k = lambda s: small(schedule=s, num_iterations=10, warmup_iters=2)
    rates = {
        s: [round(train_scaled.lr_scale(i, k(s)), 3) for i in (0, 1, 2, 6, 10)]
        for s in ("constant", "linear")
    }
    assert rates == dict(constant=[0.5, 1, 1, 1, 1], linear=[0.5, 1, 1, 0.5, 0])
    seed = train_scaled.Knobs(preset="phase8", **train_scaled.PRESETS["phase8"])
    assert [seed.lr * train_scaled.lr_scale(s, seed) for s in (0, 499, 49999)] == pytest.approx(
        [4e-7, 2e-4, 2e-4]
    )
    stages = [
        train_scaled.plasticity(s, small(curriculum=True, num_iterations=100))
        for s in (0, 14, 15, 39, 40, 99)
    ]
    assert stages == [0.1, 0.1, 0.5, 0.5, 0.99, 0.99] and train_scaled.plasticity(0, small()) == 1


def test_carried_rows_read_their_strips_window_after_window(tmp_path):
    data = bytes(range(256)) * 5
    cfg = small(batch_size=4, sequence_length=64)
    batches = ByteBatches(shards(tmp_path, data), cfg, ONE, 4)
    strip = (1280 - 4) // 4
    assert batches.num_windows == strip // 64 and [batches.starts_over(s) for s in range(5)] == [
        True,
        False,
        False,
        False,
        True,
    ]
    for step in range(10):
        x, y = batches.make(step)
        for row in range(4):
            at = row * strip + step % batches.num_windows * 64
            assert (
                bytes(x[row].tolist()) == data[at : at + 64]
                and bytes(y[row].tolist()) == data[at + 4 : at + 68]
            )


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("carry", [True, False])
def test_any_number_of_ranks_reads_the_same_windows(tmp_path, carry, ranks):
    s, k = shards(tmp_path, bytes(range(256)) * 5), small(carry_state=carry)
    whole = ByteBatches(s, k, ONE, 4)
    parts = [ByteBatches(s, k, World(r, ranks, CPU), 4) for r in range(ranks)]
    seen = set()
    for step in range(6):
        for i in range(2):
            assert torch.equal(whole.make(step)[i], torch.cat([p.make(step)[i] for p in parts]))
        seen.add(tuple(whole.starts(step)))
    assert len(seen) == (whole.num_windows if carry else 6)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(("size", "limit"), [(1003, None), (1511, None), (1511, 800), (40, None)])
def test_validation_is_every_byte_once_and_weighted_by_bytes(tmp_path, carry, size, limit):
    data = ("ağaç kıyı " * 400).encode()[:size]
    val, model = shards(tmp_path, data, "v.txt"), fresh(carry_state=carry)
    total = min(size, (limit or size) + 4) - 4
    strip, nats, count = -(-total // 32) * 4, 0.0, 0
    # By hand: a strip at once if its state is carried, else window by window.
    for start in range(0, total, strip):
        end = min(start + strip, total)
        for at in range(start, end, strip if carry else 64):
            n = min(end - at, strip if carry else 64)
            x = np.frombuffer(data + b"\0" * 8, np.uint8)[at : at + -(-n // 4) * 4]
            y = np.full(len(x), -1)
            y[:n] = np.frombuffer(data, np.uint8)[at + 4 : at + 4 + n]
            nll = model(*(torch.tensor(t.astype(np.int64))[None] for t in (x, y)))[0]
            nats, count = nats + nll.sum().item(), count + n
    assert count == total
    characters = len(data[4 : 4 + total].decode(errors="ignore"))
    scored = ScoredBytes(val, 4, limit)
    assert scored.num_bytes == total
    assert abs(scored.characters_per_byte * total - characters) <= 1
    for micro, ranks in ((2, 1), (3, 1), (8, 2)):
        sums: list[torch.Tensor] = []
        for rank in range(ranks):
            evaluate(model, scored, micro, Part(rank, ranks, CPU, sums))
        assert abs(sum(sums).item() - nats) < 1e-5 * total
