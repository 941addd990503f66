"""gated_linear_attention: its definition at every length, precision, causality, compilation."""

import importlib.util

import pytest
import torch
from hamt_support import knobs, lively, stream, tokens

import train_gpu
from plumbing.kernels import check_kernel, fla_attention
from train_gpu import gated_linear_attention, recurrent_step


def inputs(T: int, B: int = 2, H: int = 2, S: int = 5, E: int = 6) -> list:
    """q, k, v, log_decay, state."""
    rng = torch.Generator().manual_seed(T)
    draw = lambda *shape: torch.rand(*shape, generator=rng, dtype=torch.float64)
    q, k, log_decay = draw(B, H, T, S), draw(B, H, T, S), -draw(B, H, T, S)
    v, state = draw(B, H, T, E) - 0.5, draw(B, H, S, E) - 0.5
    return [q, k, v, log_decay, state]


def recurrence(q, k, v, log_decay, state) -> tuple[torch.Tensor, torch.Tensor]:
    reads = []
    for t in range(q.size(2)):
        step = [x[:, :, t : t + 1] for x in (q, k, v, log_decay)]
        read, state = recurrent_step(*step, state)
        reads.append(read)
    return torch.cat(reads, dim=2), state


@pytest.mark.parametrize(("T", "L"), [(29, 1), (29, 4), (29, 29), (29, 128), (300, 64), (600, 2)])
def test_every_chunk_length_gives_the_recurrence(T, L):
    """600 tokens in chunks of 2 are 300 chunks, which need the second level."""
    given = inputs(T)
    found, state = gated_linear_attention(*given, L)
    expected, expected_state = recurrence(*given)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-12
    assert (state - expected_state).abs().max() < 1e-12


def test_gradients_are_the_recurrences():
    given = inputs(40)
    leaves = [x.requires_grad_() for x in given]
    ours = torch.autograd.grad(gated_linear_attention(*given, 8)[0].square().sum(), leaves)
    theirs = torch.autograd.grad(recurrence(*given)[0].square().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-6 and torch.allclose(a, b, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("L", [2, 64])
def test_a_change_at_t_moves_nothing_before_t(L):
    given = inputs(600)
    before, _ = gated_linear_attention(*given, L)
    for t in (0, 1, 63, 64, 511, 599):
        changed = [x.clone() for x in given]
        for x in changed[:4]:
            x[:, :, t] *= 0.5
        after, _ = gated_linear_attention(*changed, L)
        assert torch.equal(before[:, :, :t], after[:, :, :t])
        assert not torch.equal(before[:, :, t], after[:, :, t])


def test_the_strongest_decay_over_the_longest_chunk_stays_finite_and_exact():
    given = inputs(256)
    given[3] = torch.full_like(given[3], -train_gpu.MAX_DECAY)
    exact, _ = gated_linear_attention(*given, 128)
    single = [x.float().requires_grad_() for x in given]
    found, _ = gated_linear_attention(*single, 128)
    assert found.isfinite().all() and (found - exact).abs().max() < 1e-4
    found.sum().backward()
    assert all(x.grad.isfinite().all() for x in single)


def test_what_a_slow_slot_keeps_survives_a_fast_stretch_before_it():
    """Sums of decays are formed between two places, never as differences of long sums, in which
    fp32 would lose what is small."""
    given = inputs(4096, B=1, H=1, S=2, E=2)
    given[3][:, :, :3000] = -1.0
    given[3][:, :, 3000:] = -1e-4
    exact, _ = gated_linear_attention(*given, 16)
    single = [x.float() for x in given]
    found, _ = gated_linear_attention(*single, 16)
    assert ((found - exact).abs().max() / exact.abs().max()) < 1e-5


def captured_operations(T: int, **values: object) -> list[int]:
    """Operations in the graph of each block that the compiler is given."""
    model = lively(double=False, num_slots=16, chunk_length=64, dropout=0.1, **values)
    counts = []

    def backend(graph, example_inputs):
        nodes = graph.graph.nodes
        counts.append(sum(node.op in ("call_function", "call_method") for node in nodes))
        return graph.forward

    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False, fullgraph=True)
    x_BT = tokens(1, T)
    model(x_BT, x_BT)
    return counts


def test_the_compiler_captures_the_same_operations_whatever_the_length_once_for_all_blocks():
    assert [captured_operations(T) for T in (128, 1024, 8192)] == [[186]] * 3
    [long] = captured_operations(32768)  # with a second level of chunks
    assert long <= 210


def test_a_compiled_block_gives_what_the_block_gives():
    x_BT = tokens(2, 64)
    plain = lively(double=False)
    compiled = lively(double=False)
    torch._dynamo.reset()
    for block in compiled.blocks:
        block.compile(backend="aot_eager", dynamic=False)
    results = []
    for model in (plain, compiled):
        loss, _, _ = model(x_BT, x_BT)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_phases_are_as_precise_at_position_a_million_as_at_the_start():
    at = torch.tensor(10**6)
    found = train_gpu.angles_at(knobs(hcm_dim=128, n_head=1), at, 8, torch.float64)[:, 0]
    positions = torch.arange(10**6, 10**6 + 8)
    for i in range(64):
        exact = [(int(t) * float(1e4 ** -(i / 32)) if i < 32 else 0.0) for t in positions]
        turned = torch.tensor(exact, dtype=torch.float64)
        assert torch.allclose(found[:, i].cos(), turned.cos(), atol=1e-8)
    model = lively(num_slots=4)
    x_BT, far = tokens(1, 30), lively(num_slots=4).empty_state(1)
    far.position.fill_(10**6)  # addressing is relative: where a text stands does not matter
    near, _ = stream(model, x_BT, model.empty_state(1))
    there, _ = stream(model, x_BT, far)
    assert (near - there).abs().max() < 1e-6


@pytest.mark.gpu
def test_the_kernels_of_fla_give_what_the_plain_form_gives():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("fla", reason="needs the package fla-core")
    given = inputs(256, B=2, H=4, S=16, E=64)
    results = []
    for attend, dtype in ((gated_linear_attention, torch.float32), (fla_attention, torch.bfloat16)):
        leaves = [x.float().cuda().requires_grad_() for x in given]
        values = leaves[2].to(dtype)
        read, _ = attend(*leaves[:2], values, *leaves[3:], 64)
        read.float().square().sum().backward()
        results.append([read.float(), *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() / a.norm() < 3e-3


def test_the_kernels_are_off_by_default_and_refused_on_a_cpu():
    assert train_gpu.Knobs().kernel == "plain"
    with pytest.raises(ValueError, match="KERNEL=fla needs a GPU"):
        knobs(kernel="fla")


def test_kernels_that_are_not_installed_are_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package fla-core: pip install fla-core"):
        check_kernel("fla", "cuda")
