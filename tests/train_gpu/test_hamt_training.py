"""Loss, optimizer, schedule, carried rows, the order of the text, and evaluation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hamt_support import MODELS, ONE, knobs, lively, same, tokens

import train_gpu
from plumbing import TokenShards, UserError, World, write_shard
from plumbing.row_states import RowStates
from plumbing.splits import Split
from plumbing.text_batches import TextBatches
from plumbing.text_scores import Score, evaluate, evaluate_stream, window_batches, window_starts
from train_gpu import AdamW, LinearCrossEntropy

TRUE, FALSE = torch.tensor(True), torch.tensor(False)

# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("rows_at_once", [16, 33, 1000])
@pytest.mark.parametrize("name", ["plain", "attention"])
def test_the_chunked_head_gives_autograds_loss_and_gradients(monkeypatch, rows_at_once, name):
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK_ROWS", rows_at_once)
    x, y = tokens(3, 20), tokens(3, 20, seed=1)
    y[0, 7:] = -1
    ours, theirs = lively(double=False, **MODELS[name]), lively(double=False, **MODELS[name])
    logits = theirs.logits(x).flatten(0, 1)
    expected = F.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction="sum")
    expected.mul(0.25).backward()
    for p in ours.parameters():
        p.grad = torch.ones_like(p)  # it adds to what is there
    loss, _, _ = ours(x, y)
    loss.mul(0.25).backward()
    assert torch.allclose(loss, expected, rtol=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad - 1 - b.grad).abs().max() < 3e-6 + 1e-4 * b.grad.abs().max()
    with torch.no_grad():
        assert torch.allclose(ours(x, y)[0], expected, rtol=1e-6)


# ---------------------------------------------------------------- optimizer


def test_adamw_is_torchs_with_decay_of_matrices_only_and_clipping():
    model, plain = lively(double=False, weight_decay=0.1, grad_clip=0.5), lively(double=False)
    adam = AdamW(model, model.cfg)
    params = dict(plain.named_parameters())
    decayed = {n for n, p in params.items() if p.dim() == 2 and "conv" not in n and "bias" not in n}
    assert "wte" in decayed and not any("norm" in name for name in decayed)
    groups = [
        dict(params=[params[n] for n in params if n in decayed], weight_decay=0.1),
        dict(params=[params[n] for n in params if n not in decayed], weight_decay=0.0),
    ]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    for step, size in enumerate((1.0, 1.0, 0.002)):
        for name, p in model.named_parameters():
            rng = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=rng) * size
            params[name].grad = p.grad.clone()
        norms = torch.stack([p.grad.norm() for p in model.parameters()])
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adam.step(0.01, norms, TRUE)
        theirs.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, params[name], atol=2e-5), name


def test_a_step_that_is_not_finite_moves_neither_weights_nor_moments_nor_adams_count():
    model = lively(double=False)
    adam, norms = AdamW(model, model.cfg), torch.ones(2)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    adam.step(0.01, norms, TRUE)
    weights = [p.detach().clone() for p in model.parameters()]
    state = [t.clone() for s in adam.state.values() for t in s.values()]
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    adam.step(0.01, norms * float("nan"), FALSE)
    assert same(weights, [p.detach() for p in model.parameters()])
    assert same(state, [t for s in adam.state.values() for t in s.values()])


def test_the_rate_warms_up_and_falls_to_a_tenth_along_a_cosine():
    cfg = knobs(warmup_iters=10)
    rates = [train_gpu.lr_scale(s, 110, cfg) for s in (0, 4, 9, 10, 60, 110, 500)]
    assert np.allclose(rates, [0.1, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
    assert train_gpu.lr_scale(90, 110, knobs(warmup_iters=10, use_scheduler=False)) == 1
    assert train_gpu.lr_scale(0, 1000, knobs()) == 1 / 20, "2% of the steps"
    with_budget = [
        train_gpu.lr_scale(9.9, 110, cfg),
        train_gpu.lr_scale(0.9, 110, knobs(warmup_iters=1)),
    ]
    assert with_budget == [1.0, 1.0], "a part of a step is not past the peak"
    assert train_gpu.schedule_position(3, 5.0, 100, knobs(time_budget_s=20)) == 25


# ---------------------------------------------------------------- the order of the text


def stream(folder, n: int = 1000) -> TokenShards:
    write_shard(folder / "s_000000.bin", (np.arange(n) % 256).astype(np.uint16))
    return TokenShards(str(folder / "s_*.bin"))


def test_an_epoch_uses_every_sequence_once_in_an_order_of_its_own(tmp_path):
    cfg = knobs(sequence_length=10, batch_size=9)
    batches = TextBatches(stream(tmp_path), cfg, ONE)
    assert batches.sequences == 99 and batches.epoch_steps == 11
    epochs = [[s for step in range(e, e + 11) for s in batches.starts(step)] for e in (0, 11)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 990, 10))
    assert epochs[0] != epochs[1]
    x, y, _ = batches.make(3)
    assert x.shape == (9, 10) and torch.equal(x[:, 1:], y[:, :-1])
    assert int(x[0, 0]) == batches.starts(3)[0] % 256
    fewer = dataclasses.replace(cfg, max_train_samples=18)
    assert TextBatches(stream(tmp_path), fewer, ONE).epoch_steps == 2


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("size", [12, 11])
def test_any_number_of_ranks_reads_the_same_rows_with_the_same_seeds(tmp_path, carry, size):
    cfg = knobs(sequence_length=10, batch_size=size, carry_state=carry)
    whole = TextBatches(stream(tmp_path), cfg, ONE)
    worlds = [World(rank, 3, torch.device("cpu")) for rank in range(3)]
    ranks = [TextBatches(stream(tmp_path), cfg, world) for world in worlds]
    for step in (0, 5, 13):
        assert [s for rank in ranks for s in rank.starts(step)] == whole.starts(step)
        seeds = torch.cat([rank.row_seeds(step) for rank in ranks])
        assert torch.equal(seeds, whole.row_seeds(step)) and len(set(seeds.tolist())) == size
    assert not torch.equal(whole.row_seeds(0), whole.row_seeds(1))


def test_with_a_carried_state_each_row_goes_on_where_it_stopped(tmp_path):
    cfg = knobs(sequence_length=10, batch_size=4, carry_state=True)
    batches = TextBatches(stream(tmp_path), cfg, ONE)
    assert batches.epoch_steps == 24
    for step in range(23):
        assert [a + 10 for a in batches.starts(step)] == batches.starts(step + 1)
    assert batches.starts(24) == batches.starts(0) == [0, 240, 480, 720]


def test_a_carried_state_is_used_no_gradient_flows_into_it_and_an_epoch_starts_without():
    model, x = lively(double=False, carry_state=True, batch_size=2), tokens(2, 33)
    states, everything = RowStates(model.empty_state, 2, ONE), slice(0, 2)
    states.start_step(is_new_epoch=True)
    cold, _, state = model(x[:, :16], x[:, 1:17], states.take(everything))
    states.put(everything, state)
    states.start_step(is_new_epoch=False)
    kept = states.take(everything)
    assert not any(t.requires_grad for layer in kept.layers for t in layer)
    warm, _, _ = model(x[:, 16:32], x[:, 17:33], kept)
    logits = model.logits(x[:, :32])[:, 16:].flatten(0, 1)
    whole = F.cross_entropy(logits, x[:, 17:33].flatten(), reduction="sum")
    cold, _, _ = model(x[:, 16:32], x[:, 17:33])
    assert torch.allclose(warm, whole, rtol=1e-5) and not torch.allclose(cold, whole, rtol=1e-3)
    states.start_step(is_new_epoch=True)
    again, _, _ = model(x[:, 16:32], x[:, 17:33], states.take(everything))
    assert torch.equal(again, cold)


def test_carried_states_of_a_model_with_other_layers_are_refused():
    model = lively(double=False, carry_state=True, batch_size=2)
    other = lively(double=False, carry_state=True, batch_size=2, num_slots=3)
    saved = RowStates(other.empty_state, 2, ONE).state_dict()
    with pytest.raises(UserError, match="states of another model"):
        RowStates(model.empty_state, 2, ONE).load_state_dict(saved)


# ---------------------------------------------------------------- evaluation


def split_of(folder, n: int = 101, words: int = 20, num_bytes: int = 120) -> Split:
    write_shard(folder / "v_000000.bin", tokens(1, n)[0].numpy().astype(np.uint16))
    return Split(TokenShards(str(folder / "v_*.bin")), words, num_bytes)


@pytest.mark.parametrize("T", [7, 25, 50, 300])
def test_windows_score_every_token_but_the_first_once(tmp_path, T):
    shards = split_of(tmp_path).shards
    text = shards.read(0, 101).tolist()
    scored = []
    for x_BT, y_BT in window_batches(shards, window_starts(shards, T), T, num_rows=3):
        assert x_BT.shape == y_BT.shape == (3, T)
        scored += y_BT[y_BT >= 0].tolist()
    assert scored == text[1:]


def test_perplexities_by_hand(tmp_path):
    model, split = lively(double=False, sequence_length=16), split_of(tmp_path)
    model.wte.data.zero_()  # every token has probability 1/256
    found = evaluate(model, split, 16, 3, ONE)
    assert found.tokens == 100 and math.isclose(found.nats, 100 * math.log(256), rel_tol=1e-6)
    assert math.isclose(found.ppl, 256, rel_tol=1e-5)
    # 101 tokens stand for 20 words and 120 bytes; 100 of them are scored
    assert math.isclose(found.word_ppl, 256 ** (101 / 20), rel_tol=1e-5)
    assert math.isclose(found.bits_per_byte, 8 * 101 / 120, rel_tol=1e-6)
    assert Score.of(split, 1.0, 50).words == 20 * 50 / 101


@pytest.mark.parametrize("T", [16, 200])
def test_a_token_is_scored_from_its_window_and_nothing_else(tmp_path, T):
    model, split = lively(double=False, sequence_length=T), split_of(tmp_path)
    text = torch.from_numpy(split.shards.read(0, 101).astype(np.int64))
    nats = 0.0
    for start in range(0, 100, T):
        inputs = text[start : start + T][: 100 - start]
        targets = text[start + 1 : start + T + 1]
        nats += F.cross_entropy(model.logits(inputs[None])[0], targets, reduction="sum").item()
    for rows in (1, 4):
        found = evaluate(model, split, T, rows, ONE)
        assert math.isclose(found.nats, nats, rel_tol=1e-5) and found.tokens == 100
    limited = evaluate(model, split, T, 2, ONE, limit=2)
    assert limited.tokens == min(2 * T, 100)


def test_streaming_scores_every_token_from_all_before_it(tmp_path):
    split = split_of(tmp_path)
    text = torch.from_numpy(split.shards.read(0, 101).astype(np.int64))
    for T in (7, 32, 300):
        model = lively(double=False, sequence_length=T)
        logits = model.logits(text[None, :-1])[0]
        whole = F.cross_entropy(logits, text[1:], reduction="sum").item()
        found = evaluate_stream(model, split, T, ONE)
        assert math.isclose(found.nats, whole, rel_tol=1e-5) and found.tokens == 100


def test_evaluation_has_no_dropout(tmp_path):
    model, split = lively(double=False, dropout=0.5, sequence_length=16), split_of(tmp_path)
    first, second = (evaluate(model, split, 16, 2, ONE).nats for _ in range(2))
    plain = lively(double=False, sequence_length=16)
    assert first == second == evaluate(plain, split, 16, 2, ONE).nats and model.training
