"""Window attention against the dense mask."""

import pytest
import torch
from plain_scaled import dense_window

from train_scaled import window_attention, window_mask


@pytest.mark.parametrize(
    ("w", "N", "known"),
    [(4, 16, 0), (4, 18, 0), (4, 18, 3), (4, 18, 2), (4, 1, 3), (4, 1, 0), (8, 5, 0), (8, 5, 7)],
)
def test_windows_equal_the_dense_mask_whatever_is_known_of_the_past(w, N, known):
    g = torch.Generator().manual_seed(0)
    sizes = (N, w - 1 + N, w - 1 + N)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g).requires_grad_() for n in sizes)
    found = window_attention(q, k, v, w, window_mask(N, w, torch.tensor(known)))
    first = w - 1 - known  # keys before it do not exist
    wanted = dense_window(q, k[:, :, first:], v[:, :, first:], w)
    assert torch.allclose(found, wanted, atol=2e-6)
    grads = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (found, wanted)]
    for mine, theirs in zip(*grads, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_a_fresh_row_that_fits_the_window_is_causal_attention():
    q, k, v = torch.randn(3, 2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(window_attention(q, k, v, 8, None), dense_window(q, k, v, 8), atol=2e-6)


def test_window_attention_never_makes_all_pairs():
    """Its largest tensor grows with N, not with its square."""
    largest = []
    for N in (512, 2048):
        q, k = torch.randn(1, 1, N, 8), torch.randn(1, 1, 15 + N, 8)
        with torch.profiler.profile(profile_memory=True) as profile:
            window_attention(q, k, k, 16, window_mask(N, 16, torch.tensor(0)))
        events = profile.profiler.kineto_results.events()
        largest.append(max(e.nbytes() for e in events if e.name() == "[memory]"))
    assert largest[1] < 5 * largest[0]
