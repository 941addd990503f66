"""Which tokens a step trains on: against the record's loader, and for any number of ranks."""

import dataclasses

import numpy as np
import pytest
import torch
from support import ONE, SHARED, knobs, rows, run_here, write_data

from plumbing import TokenShards, UserError, World, write_shard
from plumbing.batches import TokenBatches, padded_batches
from train_gpt import Knobs

CPU = torch.device("cpu")


class RecordLoader:
    """An independent simulation of the record's loader, one per rank: it strides through a shard,
    and moves to the next when the next whole batch of all ranks, seen from its own position, would
    not fit.
    """

    def __init__(self, shards, rank, B, T, W=8):
        self.shards, self.rank, self.B, self.T, self.W = shards, rank, B, T, W
        self.reset()

    def reset(self):
        self.shard, self.position = 0, self.rank * self.B * self.T

    def next_batch(self):
        tokens, n = self.shards[self.shard], self.B * self.T
        buf = tokens[self.position : self.position + n + 1]
        self.position += n * self.W
        if self.position + n * self.W + 1 > len(tokens):
            self.shard, self.position = (self.shard + 1) % len(self.shards), self.rank * n
        return buf[:-1].reshape(self.B, self.T), buf[1:].reshape(self.B, self.T)


def test_record_order_is_what_the_records_loader_reads_with_8_ranks(tmp_path):
    B, T = 2, 16
    lengths = [
        n + 8 * B * T * 5 for n in (1, 100, 130, 255, 31)
    ]  # from "just fits" to "ranks part company"
    for i, n in enumerate(lengths):
        write_shard(tmp_path / f"s_{i}.bin", np.arange(n, dtype=np.uint16) + 5000 * i)
    shards = TokenShards(str(tmp_path / "s_*.bin"))
    batches = TokenBatches(shards, knobs(batch_size=8 * B, sequence_length=T, val_tokens=T), ONE)
    loaders, parted = [RecordLoader(shards.shards, r, B, T) for r in range(8)], False
    for loader in loaders:
        loader.next_batch()  # fetched before the loop; the reset rewinds without fetching again
    current = [RecordLoader(shards.shards, r, B, T).next_batch() for r in range(8)]
    for loader in loaders:
        loader.reset()
    for step in range(3 * batches.num_steps):  # and on into further epochs
        x, y = batches.make(step)
        assert np.array_equal(x, np.concatenate([c[0] for c in current])), step
        assert np.array_equal(y, np.concatenate([c[1] for c in current])), step
        current = [loader.next_batch() for loader in loaders]
        parted |= len({loader.shard for loader in loaders}) > 1
    assert parted, "the shards' lengths make some ranks leave a shard a batch early"
    assert torch.equal(batches.make(0)[0], batches.make(1)[0]), "the first batch is used twice"


def test_in_record_order_ranks_6_and_7_leave_a_full_shard_one_batch_early():
    shards = object.__new__(TokenShards)
    shards.paths, shards.lengths, shards.starts = (
        ["a", "b"],
        [100_000_000] * 2,
        [0, 100_000_000, 200_000_000],
    )
    batches = TokenBatches(shards, Knobs(), ONE)
    assert [np.sum(p < 100_000_000) for p in batches.positions] == [190] * 6 + [189] * 2
    assert batches.num_steps == 2 * 189 + 1


@pytest.mark.parametrize("order", ["record", "stream"])
@pytest.mark.parametrize("data_seed", [None, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_any_number_of_ranks_reads_the_same_stream(tmp_path, order, data_seed, size):
    write_data(tmp_path, train=(1500, 1400))
    shards = TokenShards(str(tmp_path / "t_*.bin"))
    cfg = knobs(data_order=order, data_seed=data_seed)
    whole = TokenBatches(shards, cfg, ONE)
    parts = [TokenBatches(shards, cfg, World(rank, size, CPU)) for rank in range(size)]
    for step in range(2 * whole.num_steps):
        made = [part.make(step) for part in parts]
        for i in range(2):
            assert torch.equal(whole.make(step)[i], torch.cat([tensors[i] for tensors in made]))


def test_stream_order_repeats_nothing_and_skips_nothing_but_the_tail(tmp_path):
    for i, n in enumerate((700, 300, 1111)):
        write_shard(tmp_path / f"s_{i}.bin", (np.arange(n) + 3000 * i).astype(np.uint16))
    shards = TokenShards(str(tmp_path / "s_*.bin"))
    batches = TokenBatches(shards, knobs(data_order="stream"), ONE)
    seen = np.concatenate([batches.make(s)[0].flatten() for s in range(batches.num_steps)])
    assert batches.num_steps == 2110 // 256 and np.array_equal(
        seen, shards.read(0, batches.num_steps * 256)
    )
    assert (
        torch.equal(batches.make(0)[1], batches.make(0)[0].flatten().roll(-1).view(16, 16)) is False
    )
    assert np.array_equal(batches.make(2)[1].flatten(), shards.read(2 * 256 + 1, 256))


def test_data_seed_moves_the_data_and_not_the_weights(monkeypatch, tmp_path):
    write_data(tmp_path)
    shards = TokenShards(str(tmp_path / "t_*.bin"))
    plain, a, b = (
        TokenBatches(shards, knobs(data_order="stream", data_seed=s), ONE) for s in (None, 1, 2)
    )
    key = lambda batches, steps: [batches.starts(s)[0] for s in steps]
    one = range(plain.num_steps)
    assert (
        sorted(key(a, one)) == key(plain, one)
        and len({*map(tuple, (key(x, one) for x in (plain, a, b)))}) == 3
    )
    assert key(a, one) != key(a, range(plain.num_steps, 2 * plain.num_steps)), (
        "another epoch, another order"
    )
    assert dataclasses.replace(knobs(), seed=5).data_seed is None, (
        "off by default, whatever the seed"
    )


def test_running_out_of_data_is_refused_with_the_number_of_steps_it_can_feed(monkeypatch, tmp_path):
    long = dict(num_iterations=40, warmup_iters=0, warmdown_iters=0, val_every=0)
    with pytest.raises(
        UserError, match=r"9,000 tokens feed 33 steps, NUM_ITERATIONS=40; .*EPOCHS_OK=1"
    ):
        run_here(monkeypatch, tmp_path, **long)
    assert not (tmp_path / "results.csv").exists()
    assert run_here(monkeypatch, tmp_path, **long, epochs_ok=1)[0] == 0
    assert float(rows(tmp_path)[0]["epochs"]) == round(40 / 32, 4)


def test_a_shard_too_small_for_record_order_is_refused(monkeypatch, tmp_path):
    write_data(tmp_path, train=(5000, 256))
    with pytest.raises(
        UserError, match=r"t_000002.bin: 256 tokens, a batch in record order takes 257; .*stream"
    ):
        run_here(monkeypatch, tmp_path)


@pytest.mark.skipif(
    not (SHARED / "data/fineweb_like").exists(), reason="needs ../shared/data/fineweb_like"
)
def test_real_gpt2_tokens_fit_the_default_vocabulary_and_feed_the_record_order():
    shards = TokenShards(str(SHARED / "data/fineweb_like/fineweb_train_*.bin"))
    shards.check_ids(50304, ONE)
    assert TokenBatches(shards, Knobs(), ONE).num_steps == 3 + 1 and shards.total == 3_300_000


@pytest.mark.parametrize("num_rows", [1, 4, 16, 37, 64])
def test_padded_batches_have_one_shape_and_each_token_once(tmp_path, num_rows):
    write_data(tmp_path)
    shards = TokenShards(str(tmp_path / "v_*.bin"))
    shares = [World(rank, 3, CPU).share(37) for rank in range(3)]
    batches = [b for share in shares for b in padded_batches(shards, share, 16, num_rows)]
    assert {tuple(x.shape) for x, _ in batches} == {(num_rows, 16)}
    scored = torch.cat([y[y >= 0] for _, y in batches])
    assert np.array_equal(scored, shards.read(1, 37 * 16))
