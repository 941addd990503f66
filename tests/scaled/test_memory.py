"""The blocks' memory against its recurrence and against the original's cumulative sum."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_scaled import cumsum_memory, step_recurrence

from train_scaled import decaying_memory


def memory_inputs(
    N: int, retention: float | str, B: int = 2, H: int = 3, E: int = 8, width: int = 9
) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(N)
    q, k = (F.normalize(torch.randn(B, H, N, E, generator=g), dim=-1) for _ in range(2))
    v, S = torch.randn(B, H, N, width, generator=g), torch.randn(B, H, E, width, generator=g)
    data = retention == "data"
    a = (
        F.logsigmoid(4 * torch.randn(B, H, N, generator=g))
        if data
        else torch.full((1, H, N), float(retention)).log()
    )
    return [t.requires_grad_() for t in (q, k, v, a, S)]


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("retention", [1e-6, 0.1, 0.5, 0.9, 0.995, 0.9999983, 1.0, "data"])
def test_chunkwise_memory_is_the_step_recurrence_with_its_gradients(retention, delta):
    lengths = [1, 5, 64, 150]  # one patch, less than a chunk, one, some and a rest
    if retention in (0.9999983, "data"):  # they remember beyond a group of chunks
        lengths.append(1100)
    for N in lengths:
        ins = memory_inputs(N, retention)
        exact = [t.detach().double().requires_grad_() for t in ins]
        found, wanted = decaying_memory(*ins, delta), step_recurrence(*exact, delta)
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for t in found]
        score = lambda out: sum((o * w).sum() for o, w in zip(out, weights, strict=True))  # noqa: B023
        grads = torch.autograd.grad(score(found), ins), torch.autograd.grad(score(wanted), exact)
        for mine, theirs in zip((*found, *grads[0]), (*wanted, *grads[1]), strict=True):
            assert (mine - theirs).abs().max() < 1e-5 * max(1, theirs.abs().max()), (N, delta)


@pytest.mark.parametrize("retention", [1e-6, 0.995, 0.9999983, "data"])
def test_memory_is_exact_over_65536_patches(retention):
    ins = memory_inputs(65536, retention, B=1, H=1, E=2, width=3)
    found = decaying_memory(*ins)
    found[0].square().sum().backward()
    q, k, v, a, S = (t.detach().double().numpy() for t in ins)
    a, S, wanted = np.exp(a).reshape(-1), S[0, 0], np.empty((65536, 3))
    for t in range(65536):
        S = a[t] * S + np.outer(k[0, 0, t], v[0, 0, t])
        wanted[t] = q[0, 0, t] @ S
    assert np.abs(found[0][0, 0].detach().numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert all(t.grad.isfinite().all() for t in ins)


@pytest.mark.parametrize("delta", [False, True])
def test_memory_in_parts_or_one_patch_at_a_time_equals_memory_at_once(delta):
    q, k, v, a, S = memory_inputs(300, "data")
    whole = decaying_memory(q, k, v, a, S, delta)
    for sizes in ([300], [64, 236], [1] * 130 + [170], [37, 1, 262]):
        state, out = S, []
        for part in zip(*(t.split(sizes, 2) for t in (q, k, v, a)), strict=True):
            o, state = decaying_memory(*part, state, delta)
            out.append(o)
        assert torch.allclose(torch.cat(out, 2), whole[0], atol=1e-5) and torch.allclose(
            state, whole[1], atol=1e-5
        )


def test_memory_equals_the_originals_cumulative_sum_where_that_is_accurate():
    g = torch.Generator().manual_seed(0)
    q, k = (F.elu(torch.randn(2, 3, 400, 8, generator=g)) + 1 for _ in range(2))
    v = torch.randn(2, 3, 400, 8, generator=g)
    for retention in (0.995, 0.9999983):
        a = torch.full((3,), retention).log()
        decay = a[None, :, None].expand(1, 3, 400)
        o, _ = decaying_memory(q, k, F.pad(v, (0, 1), value=1.0), decay, torch.zeros(2, 3, 8, 9))
        assert torch.allclose(
            o[..., :-1] / (o[..., -1:] + 1e-6), cumsum_memory(q, k, v, a), atol=1e-5
        )


def test_the_originals_clamp_ends_its_decay_and_ours_goes_on():
    """0.1 to the 59th is nothing; the clamped form still holds a write of 59 patches before at full
    weight.
    """
    q = k = torch.ones(1, 1, 100, 1)
    v = F.pad(torch.ones(1, 1, 1, 1), (0, 0, 40, 59))
    a = torch.tensor([0.1]).log()
    decay = a[None, :, None].expand(1, 1, 100)
    o, _ = decaying_memory(q, k, F.pad(v, (0, 1), value=1.0), decay, torch.zeros(1, 1, 1, 2))
    assert o[0, 0, -1, 0].abs() < 1e-12 and cumsum_memory(q, k, v, a)[0, 0, -1] > 1e-3
