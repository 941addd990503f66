"""The model, its optimizers, its token order and its schedule, each against something written out independently."""

import ast
import dataclasses
import itertools
import re

import numpy as np
import plain_gpt
import pytest
import torch
import torch.nn.functional as F
from plain_gpt import PlainGPT
from support import (
    ONE,
    ROOT,
    SHARED,
    copy_to_plain,
    knobs,
    losses,
    metrics,
    rows,
    run_here,
    write_data,
)

import train_gpt
from plumbing import Pulse, TokenShards, UserError, World, write_shard
from train_gpt import GPT, AdamW, Batches, Knobs, MicroStep, Muon, lr_scale, matrices, newton_schulz

CPU = torch.device("cpu")


def loss(model: GPT, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy by autograd through all logits."""
    return F.cross_entropy(
        model.logits(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten()
    )


def fresh(seed: int = 1, **values) -> GPT:
    model = GPT(knobs(**values))
    model.init_weights(seed)
    return model


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """No zero-initialised weights: everything contributes."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.2)
    return model


# ---------------------------------------------------------------- model


@pytest.mark.parametrize(
    ("gate", "count"),
    [
        ("none", 123_568_128),
        ("headwise", 123_623_424),
        ("elementwise", 130_646_016),
        ("const", 123_577_344),
    ],
)
@pytest.mark.parametrize("opt", ["muon", "adam"])
def test_parameter_counts_at_the_default_size_are_exact(gate, count, opt):
    with torch.device("meta"):
        model = GPT(Knobs(attngate=gate, gateopt=opt))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_mlp_match_gives_a_gated_model_the_ungated_parameter_count(gate):
    with torch.device("meta"):
        model = GPT(Knobs(attngate=gate, mlp_match=True))
    assert sum(p.numel() for p in model.parameters()) == 123_568_128


def test_loss_at_step_0_is_about_16_at_the_record_width():
    k = Knobs(n_layer=2, sequence_length=128)
    model = GPT(k)
    model.init_weights(1337)
    x = torch.randint(50257, (2, 129), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(model, x)
    assert found.dtype == torch.float32 and 15.8 < found < 16.3
    assert abs(MicroStep(model, k, ONE).loss_sum(x[:, :-1], x[:, 1:]) / 256 - found) < 1e-3


GATED = [g for g in itertools.product(train_gpt.GATES[1:], train_gpt.OPTIMIZERS)]


@pytest.mark.parametrize(("gate", "opt"), GATED)
def test_a_seed_gives_the_same_weights_to_everything_but_the_gate(gate, opt):
    plain, gated = fresh(), fresh(attngate=gate, gateopt=opt)
    C = plain.k.n_embd
    theirs = dict(gated.named_parameters())
    for name, p in plain.named_parameters():
        assert torch.equal(p, theirs[name][: 3 * C] if name.endswith("qkvg") else theirs[name]), (
            name
        )
    other = dict(fresh(seed=2).named_parameters())
    assert not torch.equal(plain.wte, other["wte"])


def test_a_gate_starts_alike_whichever_optimizer_trains_it():
    stacked, own = (
        dict(fresh(attngate="elementwise", gateopt=o).named_parameters())
        for o in train_gpt.OPTIMIZERS
    )
    for i in range(2):
        assert torch.equal(stacked[f"blocks.{i}.attn.qkvg"][96:], own[f"blocks.{i}.attn.gate"])


def test_weights_start_within_their_bounds_and_output_projections_at_zero():
    for name, p in fresh(attngate="elementwise").named_parameters():
        bound = 0 if name.endswith(("proj", "down")) else p.size(1) ** -0.5
        assert p.abs().max() <= bound and p.abs().max() >= 0.99 * bound, name


CASES = [
    ("none", "sdpa", "sigmoid"),
    *itertools.product(train_gpt.GATES[1:], train_gpt.POSITIONS, train_gpt.ACTIVATIONS),
]


@pytest.mark.parametrize(("gate", "position", "activation"), [("none", "sdpa", "sigmoid"), *CASES])
def test_model_and_gates_match_the_formulas_written_out(gate, position, activation):
    for opt in train_gpt.OPTIMIZERS:
        ours = lively(fresh(attngate=gate, gatepos=position, gateact=activation, gateopt=opt))
        plain = PlainGPT(64, 2, 2, 32, gate, position, activation)
        copy_to_plain(ours, plain)
        x = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(3))
        mine, theirs = loss(ours, x), plain(x[:, :-1], x[:, 1:])
        assert abs(mine - theirs) < 1e-5 * theirs
        assert torch.allclose(ours.logits(x[:, :-1]), plain.logits(x[:, :-1]), atol=2e-5, rtol=1e-4)
        mine.backward()
        theirs.backward()
        qkvg = ours.blocks[0].attn.qkvg.grad
        assert torch.allclose(qkvg[:32], plain.blocks[0].q.grad, atol=1e-6, rtol=1e-3)
        assert torch.allclose(ours.wte.grad, plain.wte.grad, atol=1e-6, rtol=1e-3)
        if gate != "none":
            grad = qkvg[96:] if ours.k.gate_stacked else ours.blocks[0].attn.gate.grad
            assert (
                torch.allclose(grad, plain.blocks[0].gate.grad, atol=1e-6, rtol=1e-3)
                and grad.abs().max() > 1e-6
            )


@pytest.mark.parametrize("position", train_gpt.POSITIONS)
def test_the_model_is_causal(position):
    model = lively(fresh(attngate="elementwise", gatepos=position))
    x = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(3))
    before = model.logits(x)
    for t in range(16):
        y = x.clone()
        y[0, t] = (y[0, t] + 1) % 64
        after = model.logits(y)
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(
            before[:, t], after[:, t]
        )


@pytest.mark.parametrize(
    ("gate", "position"), [("none", "sdpa"), ("headwise", "key"), ("elementwise", "value")]
)
def test_generation_with_a_cache_equals_the_whole_forward(gate, position):
    model = lively(fresh(attngate=gate, gatepos=position))
    x = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(3))
    cache = [[] for _ in model.blocks]
    parts = [model.logits(part, cache) for part in x.split([5, 1, 1, 5 - 4, 4], dim=1)[:4]]
    assert torch.allclose(torch.cat(parts, 1), model.logits(x[:, :8]), atol=1e-5)


@pytest.mark.parametrize("rows", [7, 33, 64, 1000])
@pytest.mark.parametrize("confident", [False, True])
def test_the_chunked_head_gives_autograds_loss_and_gradients(monkeypatch, rows, confident):
    monkeypatch.setitem(train_gpt.LOSS_ROWS, "cpu", rows)
    model = lively(fresh(attngate="elementwise"))
    if confident:  # a target with almost all of the probability: its gradient is a small difference of large numbers
        with torch.no_grad():
            model.wte.mul_(6)
    x = torch.randint(64, (5, 17), generator=torch.Generator().manual_seed(3))
    loss(model, x).mul(0.25).backward()
    theirs = {n: p.grad.clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad.fill_(1.0)  # it adds to what is there
    step = MicroStep(model, model.k, ONE, dtype=torch.float32)
    found = step.backward(x[:, :-1], x[:, 1:], 0.25)
    assert found.dtype == torch.float32 and torch.allclose(found, loss(model, x), rtol=1e-6)
    assert torch.allclose(
        step.loss_sum(x[:, :-1], x[:, 1:]), 80 * loss(model, x).double(), rtol=1e-6
    )
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad - 1, theirs[name], atol=2e-6, rtol=1e-4), name


def test_the_chunked_head_adds_up_in_fp32():
    """In bf16 a sum over thousands of rows would stall; the reference is fp64 on the same bf16 matrices."""
    k = knobs(vocab_size=8192, n_embd=64, n_layer=1)
    model = GPT(k)
    model.init_weights(0)
    step = MicroStep(model, k, ONE)
    model.wte.grad = torch.zeros_like(model.wte)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randint(8192, (128, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, h = step.hidden(x[:, :-1])
    logits = (h @ step.wte.T).double()
    exact = F.cross_entropy(logits, x[:, 1:].flatten())
    found = step.backward(x[:, :-1], x[:, 1:], 1.0)
    assert abs(found - exact) < 1e-6 * exact
    probabilities = logits.softmax(1)
    probabilities[torch.arange(len(h)), x[:, 1:].flatten()] -= 1
    dw = probabilities.T @ h.double() / len(h)
    seen = torch.ones(8192, dtype=torch.bool)
    seen[x[:, :-1].flatten()] = False  # rows that were embedded have the trunk's gradient too
    assert (model.wte.grad[seen] - dw[seen]).norm() < 5e-3 * dw[seen].norm()


# ---------------------------------------------------------------- optimizers


def test_newton_schulz_in_batches_equals_one_at_a_time_and_is_nearly_orthogonal():
    g = torch.randn(5, 24, 40, generator=torch.Generator().manual_seed(0))
    batch = newton_schulz(g)
    assert all(torch.equal(batch[i], newton_schulz(g[i : i + 1])[0]) for i in range(5))
    assert torch.equal(newton_schulz(g.mT), batch.mT)
    values = torch.linalg.svdvals(batch.float())
    assert 0.6 < values.min() and values.max() < 1.3
    plain = torch.stack([plain_gpt.newton_schulz(m) for m in g]).float()
    assert (batch.float() - plain).norm() < 0.05 * plain.norm()


def small_optimizers(**values) -> tuple[GPT, AdamW, Muon]:
    model = lively(fresh(**values))
    return model, *train_gpt.make_optimizers(model, model.k, ONE)


def backward(model: GPT, seed: int = 0) -> None:
    x = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    loss(model, x).backward()


@pytest.mark.parametrize("gate", train_gpt.GATES)
def test_muon_agrees_with_torch_optim_muon(gate):
    model, adam, muon = small_optimizers(attngate=gate)
    names = [(n, i) for n, p in muon.params.items() for i in range(len(matrices(n, p, model.k)))]
    twins = [
        torch.nn.Parameter(matrices(n, muon.params[n], model.k)[i].detach().clone())
        for n, i in names
    ]
    oracle = torch.optim.Muon(
        twins,
        lr=5 * 0.01,
        weight_decay=0.0,
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        adjust_lr_fn="match_rms_adamw",
    )
    before = [t.detach().clone() for t in twins]
    for step in range(3):
        adam.grads.zero_()
        muon.grads.zero_()
        backward(model, step)
        for (n, i), twin in zip(names, twins, strict=True):
            twin.grad = matrices(n, muon.params[n].grad, model.k)[i].clone()
        muon.step(0.01, torch.tensor(True))
        oracle.step()
    for (n, i), twin, old in zip(names, twins, before, strict=True):
        mine, theirs = matrices(n, muon.params[n], model.k)[i] - old, twin - old
        assert (mine - theirs).norm() < 0.06 * theirs.norm(), (n, i)


def test_adamw_equals_torch_optim_adamw():
    model, adam, _ = small_optimizers(attngate="elementwise", gateopt="adam")
    twins = {n: torch.nn.Parameter(p.detach().clone()) for n, p in adam.params.items()}
    assert set(twins) == {"wte", "blocks.0.attn.gate", "blocks.1.attn.gate"}
    oracle = torch.optim.AdamW(
        twins.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    for step in range(3):
        adam.grads.zero_()
        backward(model, step)
        for n, twin in twins.items():
            twin.grad = adam.params[n].grad.clone()
        adam.step(0.01, torch.tensor(True))
        oracle.step()
    assert all(torch.allclose(adam.params[n], t, atol=1e-7) for n, t in twins.items())


def test_nothing_moves_when_the_step_is_not_finite():
    model, adam, muon = small_optimizers()
    backward(model)
    muon.grads[0, 5] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    for optimizer in (adam, muon):
        optimizer.step(0.01, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_no_weight_moves_from_the_first_step_on_that_is_not_finite(monkeypatch, tmp_path):
    """The host hears of it a step later, when the update of the next, healthy step is queued already."""
    send, close, seen = Pulse.send, train_gpt.Run.close, {}

    def bad_loss(self, step, values_n, clock):
        if step == 7:
            seen["before"] = [p.detach().clone() for p in seen["model"].parameters()]
            values_n = values_n * float("nan")
        return send(self, step, values_n, clock)

    def watched(self, status):
        seen["after"] = [p.detach().clone() for p in self.model.parameters()]
        close(self, status)

    init = train_gpt.MicroStep.__init__
    monkeypatch.setattr(
        train_gpt.MicroStep,
        "__init__",
        lambda s, m, *rest: (seen.update(model=m), init(s, m, *rest))[1],
    )
    monkeypatch.setattr(Pulse, "send", bad_loss)
    monkeypatch.setattr(train_gpt.Run, "close", watched)
    assert run_here(monkeypatch, tmp_path)[0] == 1
    assert all(torch.equal(a, b) for a, b in zip(seen["before"], seen["after"], strict=True))


def test_muon_work_is_shared_out_evenly_at_full_size():
    with torch.device("meta"):
        model = GPT(Knobs())
        w = World(0, 8, torch.device("meta"))
        muon = Muon({n: p for n, p in model.named_parameters() if n != "wte"}, model.k, w)
    loads = np.zeros(8)
    for name, p in muon.params.items():
        shapes = [sorted(m.shape) for m in matrices(name, p, model.k)]
        loads[muon.places[name][0]] += sum(4 * m * m * n + 2 * m**3 for m, n in shapes)
    assert loads.max() / loads.mean() < 1.02
    spans = sorted((*muon.places[n], p.numel()) for n, p in muon.params.items())
    assert all(a[0] != b[0] or a[1] + a[2] <= b[1] for a, b in itertools.pairwise(spans)), (
        "no two share a place"
    )


@pytest.mark.parametrize(
    ("gate", "opt"), [("none", "muon"), ("elementwise", "muon"), ("headwise", "adam")]
)
def test_twenty_steps_follow_the_plain_implementation(monkeypatch, tmp_path, gate, opt):
    """All levers at once (stacked QKV, chunked loss, batched gram Newton-Schulz, prefetch) against none of them."""
    values = dict(
        num_iterations=20, warmup_iters=0, warmdown_iters=0, val_every=0, attngate=gate, gateopt=opt
    )
    run_here(monkeypatch, tmp_path, run_id="a", data_order="stream", **values)
    ours = [float(t) for t, _ in losses(tmp_path, "a")]
    k = knobs(**values)
    model = GPT(k)
    model.init_weights(k.seed)
    plain = PlainGPT(64, 2, 2, 32, gate)
    copy_to_plain(model, plain)
    optimizers = plain_gpt.plain_optimizers(plain, k.lr)
    if opt == "adam":  # the gate moves from Muon to AdamW
        gates = [p for n, p in plain.named_parameters() if n.endswith("gate")]
        rest = [p for n, p in plain.blocks.named_parameters() if not n.endswith("gate")]
        optimizers = [
            torch.optim.AdamW([plain.wte, *gates], lr=k.lr, betas=(0.9, 0.95), weight_decay=0.0),
            plain_gpt.PlainMuon(rest, lr=0.1 * k.lr),
        ]
    shards, theirs = TokenShards(str(tmp_path / "t_*.bin")), []
    for step in range(20):
        tokens = torch.from_numpy(shards.read(step * 256, 257).astype(np.int64))
        x, y = tokens[:-1].view(16, 16), tokens[1:].view(16, 16)
        theirs.append(plain_gpt.train_step(plain, optimizers, x, y, 4).item())
    assert theirs[-1] < theirs[0] - 0.5, "it learns"
    rms = np.sqrt(np.mean(np.square(np.subtract(ours, theirs))))
    assert rms <= 1e-3, rms


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("n", "up", "down", "expected"),
    [
        (6, 0, 0, [1, 1, 1, 1, 1, 1, 1]),
        (6, 2, 2, [0.5, 1, 1, 1, 1, 0.5, 0]),
        (4, 0, 4, [1, 0.75, 0.5, 0.25, 0]),
        (4, 4, 0, [0.25, 0.5, 0.75, 1, 1]),
        (4, 2, 2, [0.5, 1, 1, 0.5, 0]),
        (0, 0, 0, [1]),
        (0, 0, 3, [0]),
    ],
)
def test_the_schedule_is_a_trapezoid_with_every_edge_defined(n, up, down, expected):
    k = knobs(num_iterations=n, warmup_iters=up, warmdown_iters=down)
    assert [lr_scale(s, k) for s in range(n + 1)] == expected


def test_no_iterations_is_one_validation_and_a_row(monkeypatch, tmp_path):
    code, out = run_here(monkeypatch, tmp_path, num_iterations=0, warmup_iters=0, warmdown_iters=0)
    assert code == 0 and out.count("val_loss:") == 1 and rows(tmp_path)[0]["steps_done"] == "0"


def test_a_time_budget_ends_the_run_and_decays_the_rate_on_time(monkeypatch, tmp_path):
    code, _ = run_here(
        monkeypatch,
        tmp_path,
        run_id="a",
        time_budget_s=1.0,
        num_iterations=30,
        warmup_iters=0,
        warmdown_iters=15,
        val_every=0,
        save_every=0,
        epochs_ok=1,
    )
    row, rates = rows(tmp_path)[0], [float(r["lr"]) for r in metrics(tmp_path, "a").values()]
    assert code == 0 and row["status"] == "finished" and 1000 <= float(row["train_time_ms"]) < 1500
    assert row["notes"].startswith("N_LAYER=2") and "TIME_BUDGET_S=1.0" in row["notes"]
    assert rates[0] == 0.01 and min(rates) < 0.001 and rates == sorted(rates, reverse=True)


# ---------------------------------------------------------------- token order


class RecordLoader:
    """An independent simulation of the record's loader, one per rank: it strides through a shard, and moves to the next
    when the next whole batch of all ranks, seen from its own position, would not fit."""

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
    batches = Batches(shards, knobs(batch_size=8 * B, sequence_length=T, val_tokens=T), ONE)
    loaders, parted = [RecordLoader(shards.shards, r, B, T) for r in range(8)], False
    for loader in loaders:
        loader.next_batch()  # fetched before the loop; the reset rewinds without fetching again
    current = [RecordLoader(shards.shards, r, B, T).next_batch() for r in range(8)]
    for loader in loaders:
        loader.reset()
    for step in range(3 * batches.steps):  # and on into further epochs
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
    batches = Batches(shards, Knobs(), ONE)
    assert batches.counts[:, 1].tolist() == [190] * 6 + [189] * 2
    assert batches.steps == 2 * 189 + 1


@pytest.mark.parametrize("order", ["record", "stream"])
@pytest.mark.parametrize("data_seed", [None, 7])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_any_number_of_ranks_reads_the_same_stream(tmp_path, order, data_seed, size):
    write_data(tmp_path, train=(1500, 1400))
    shards, k = TokenShards(str(tmp_path / "t_*.bin")), knobs(data_order=order, data_seed=data_seed)
    whole, parts = (
        Batches(shards, k, ONE),
        [Batches(shards, k, World(r, size, CPU)) for r in range(size)],
    )
    for step in range(2 * whole.steps):
        for i in range(2):
            assert torch.equal(whole.make(step)[i], torch.cat([p.make(step)[i] for p in parts]))


def test_stream_order_repeats_nothing_and_skips_nothing_but_the_tail(tmp_path):
    for i, n in enumerate((700, 300, 1111)):
        write_shard(tmp_path / f"s_{i}.bin", (np.arange(n) + 3000 * i).astype(np.uint16))
    shards = TokenShards(str(tmp_path / "s_*.bin"))
    batches = Batches(shards, knobs(data_order="stream"), ONE)
    seen = np.concatenate([batches.make(s)[0].flatten() for s in range(batches.steps)])
    assert batches.steps == 2110 // 256 and np.array_equal(
        seen, shards.read(0, batches.steps * 256)
    )
    assert (
        torch.equal(batches.make(0)[1], batches.make(0)[0].flatten().roll(-1).view(16, 16)) is False
    )
    assert np.array_equal(batches.make(2)[1].flatten(), shards.read(2 * 256 + 1, 256))


def test_data_seed_moves_the_data_and_not_the_weights(monkeypatch, tmp_path):
    write_data(tmp_path)
    shards = TokenShards(str(tmp_path / "t_*.bin"))
    plain, a, b = (
        Batches(shards, knobs(data_order="stream", data_seed=s), ONE) for s in (None, 1, 2)
    )
    key = lambda batches, steps: [batches.starts(s)[0] for s in steps]
    one = range(plain.steps)
    assert (
        sorted(key(a, one)) == key(plain, one)
        and len({*map(tuple, (key(x, one) for x in (plain, a, b)))}) == 3
    )
    assert key(a, one) != key(a, range(plain.steps, 2 * plain.steps)), (
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


# ---------------------------------------------------------------- batch shape, evaluation


@pytest.mark.parametrize("micro", [1, 2, 8, 16, "auto"])
def test_the_micro_batch_changes_rounding_only(monkeypatch, tmp_path, micro):
    run_here(monkeypatch, tmp_path, run_id="a")
    run_here(monkeypatch, tmp_path, run_id="b", device_batch_size=micro)
    a, b = (np.array([float(t) for t, _ in losses(tmp_path, r)[1:]]) for r in "ab")
    assert np.sqrt(np.mean((a - b) ** 2)) <= 1e-3
    assert micro != "auto" or rows(tmp_path)[1]["device_batch_size"] == "16"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            dict(device_batch_size=3),
            "DEVICE_BATCH_SIZE=3 does not divide a rank's 16 of BATCH_SIZE=16",
        ),
        (dict(val_tokens=1008), "1,000 tokens, VAL_TOKENS=1,008 needs one more"),
        (
            dict(vocab_size=200, input_bin="embedded", input_val_bin="embedded"),
            "VOCAB_SIZE=200 must be at least 256",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_data_or_the_ranks_are_refused(
    monkeypatch, tmp_path, values, words
):
    with pytest.raises(UserError, match=words):
        run_here(monkeypatch, tmp_path, **values)


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused():
    with pytest.raises(UserError, match="BATCH_SIZE=16 does not divide among 3 ranks"):
        train_gpt.micro_batch(MicroStep(fresh(), knobs(), ONE), knobs(), World(0, 3, CPU))


def test_validation_does_not_depend_on_the_micro_batch(tmp_path):
    write_data(tmp_path)
    model, val = lively(fresh()), TokenShards(str(tmp_path / "v_*.bin"))
    k = knobs(val_tokens=16 * 37)
    found = [
        train_gpt.evaluate(MicroStep(model, k, ONE), val, micro, k, ONE)
        for micro in (1, 4, 16, 37, 64)
    ]
    assert max(found) - min(found) < 1e-4 * found[0]
    x = torch.from_numpy(val.read(0, 16 * 37 + 1).astype(np.int64))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.logits(x[:-1].view(37, 16))
    assert abs(F.cross_entropy(logits.flatten(0, 1), x[1:]) - found[0]) < 1e-3


def test_dry_run_shows_sizes_and_trains_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        "sys.argv",
        ["train_gpt.py", "--dry_run", "--attngate", "elementwise", "--input_bin", "none_*.bin"],
    )
    assert train_gpt.main() == 0
    out = capsys.readouterr().out
    assert (
        "parameters:      130,646,016" in out
        and "tokens per step: 524,288" in out
        and "no token shards match" in out
    )
    assert '"attngate": "elementwise"' in out


def test_target_loss_is_logged_once_with_step_and_time(monkeypatch, tmp_path):
    code, out = run_here(monkeypatch, tmp_path, target_loss=3.5, num_iterations=30, val_every=3)
    assert (
        code == 0
        and out.count("target_loss:3.5 reached_step=") == 1
        and "step:30/30 val_loss" in out
    )
    assert "reached_step=" in rows(tmp_path)[0]["notes"]


# ---------------------------------------------------------------- on real tokens, and on a GPU


@pytest.mark.skipif(
    not (SHARED / "data/fineweb_like").exists(), reason="needs ../shared/data/fineweb_like"
)
def test_real_gpt2_tokens_fit_the_default_vocabulary_and_feed_the_record_order():
    shards = TokenShards(str(SHARED / "data/fineweb_like/fineweb_train_*.bin"))
    shards.check_ids(50304, ONE)
    assert Batches(shards, Knobs(), ONE).steps == 3 + 1 and shards.total == 3_300_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_twenty_compiled_steps_follow_the_cpu(monkeypatch, tmp_path):
    values = dict(num_iterations=20, warmup_iters=0, warmdown_iters=0, val_every=0)
    run_here(monkeypatch, tmp_path, run_id="cpu", **values)
    run_here(monkeypatch, tmp_path, run_id="gpu", **values, device="cuda", compile=1)
    a, b = (np.array([float(t) for t, _ in losses(tmp_path, r)]) for r in ("cpu", "gpu"))
    assert np.sqrt(np.mean((a - b) ** 2)) <= 1e-2


# ---------------------------------------------------------------- the file itself


def functions(path):
    tree = ast.parse(path.read_text())
    return {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def test_the_trainer_can_be_read_in_one_sitting():
    found = functions(ROOT / "train_gpt.py")
    lines = {name: n.end_lineno - n.lineno + 1 for name, n in found.items()}
    assert lines["train"] <= 60 and max(lines.values()) <= 60, max(
        lines.items(), key=lambda kv: kv[1]
    )
    assert len((ROOT / "train_gpt.py").read_text().splitlines()) <= 940


def test_the_trainer_imports_nothing_of_ours_but_plumbing():
    tree = ast.parse((ROOT / "train_gpt.py").read_text())
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {p.stem for p in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]}
    assert found & ours == {"plumbing"}


def test_plumbing_knows_no_trainer():
    assert not re.search(r"train_(gpt|scaled|gpu|arith)", (ROOT / "plumbing.py").read_text())
