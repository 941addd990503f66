"""Hooks: the trainer's model with its activations in reach, under TransformerLens' names."""

import re

import pytest
import torch
from arith_support import ids_of, model_of
from lib_hooks import HookedTransformer, hooked

model_with_hooks = lambda **knobs: model_of(kind=HookedTransformer, **knobs)


@pytest.mark.parametrize("ffn_type", ["gelu", "geglu", "swiglu"])
@pytest.mark.parametrize("positions", [True, False])
def test_a_model_with_hooks_computes_what_the_trainers_model_computes(ffn_type, positions):
    plain = model_of(ffn_type=ffn_type, use_rope=positions, tie_weights=positions)
    same = hooked(plain)
    assert list(same.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(same(ids_of()), plain(ids_of()), rtol=1e-5, atol=1e-5)


def test_hooks_have_transformerlens_names_and_shapes():
    model, ids = model_with_hooks(), ids_of()
    logits, cache = model.run_with_cache(ids)
    B, T = ids.shape
    shapes = {"hook_embed": (B, T, 16), "ln_final.hook_normalized": (B, T, 16)}
    for layer in range(3):
        shapes |= {
            f"blocks.{layer}.hook_{x}": (B, T, 16)
            for x in "resid_pre attn_out resid_mid mlp_out resid_post".split()
        }
        shapes |= {f"blocks.{layer}.attn.hook_{x}": (B, T, 2, 8) for x in "qkvz"}
        shapes |= {
            f"blocks.{layer}.attn.hook_{x}": (B, 2, T, T) for x in ("attn_scores", "pattern")
        }
        shapes |= {f"blocks.{layer}.mlp.hook_{x}": (B, T, 24) for x in ("pre", "post")}
    assert {name: tuple(x.shape) for name, x in cache.items()} == shapes and set(
        model.hook_names()
    ) == set(shapes)
    torch.testing.assert_close(logits, model(ids))
    assert cache["z", 2] is cache["blocks.2.attn.hook_z"] and cache["embed"] is cache["hook_embed"]
    assert cache["resid_post", 0] is cache["blocks.0.hook_resid_post"]
    torch.testing.assert_close(cache["resid_pre", 1] + cache["attn_out", 1], cache["resid_mid", 1])
    torch.testing.assert_close(cache["resid_post", 2], cache["resid_mid", 2] + cache["mlp_out", 2])
    torch.testing.assert_close(cache["pattern", 0].sum(-1), torch.ones(B, 2, T))
    with pytest.raises(KeyError, match="0 of the cached"):
        cache["nothing", 1]
    with pytest.raises(KeyError, match="3 of the cached"):
        cache["z"]


def test_a_hook_replaces_an_activation_or_writes_into_it_and_is_gone_afterwards():
    model, ids = model_with_hooks(), ids_of()
    before = model(ids)

    def zero_head(z, point):
        assert point.name == "blocks.1.attn.hook_z" and point.layer == 1
        z[:, :, 1] = 0

    with model.hooks([("blocks.1.attn.hook_z", zero_head)]):
        written = model(ids)
    replaced = model.run_with_hooks(
        ids,
        [
            (
                lambda n: n == "blocks.1.attn.hook_z",
                lambda z, point: z * torch.tensor([[1.0], [0.0]]),
            )
        ],
    )
    assert torch.equal(written, replaced) and not torch.allclose(written, before)
    with torch.no_grad():  # the same head cut out of the output projection
        model.blocks[1].attn.out.weight[:, 8:] = 0
    torch.testing.assert_close(model(ids), written, rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_after_an_error_and_leave_those_of_an_outer_with():
    model, ids = model_with_hooks(), ids_of()
    clean, seen = model(ids), []
    with model.hooks([("hook_embed", lambda x, point: seen.append(point.name))]):
        with (
            pytest.raises(ZeroDivisionError),
            model.hooks([("blocks.0.mlp.hook_post", lambda x, point: 1 / 0)]),
        ):
            model(ids)
        with pytest.raises(ValueError, match=re.escape("did you mean blocks.0.mlp.hook_post")):
            model.run_with_hooks(
                ids,
                [("hook_embed", lambda x, h: None), ("blocks.0.mlp.hook_pots", lambda x, h: None)],
            )
        seen.clear()
        model(ids)
        assert seen == ["hook_embed"]
    assert not any(point._forward_hooks for point in model.points.values())
    torch.testing.assert_close(model(ids), clean, rtol=0, atol=0)


def test_cached_activations_share_memory_with_nothing():
    model, ids = model_with_hooks(), ids_of()

    def wipe(x, point):
        x.zero_()

    with model.hooks([("blocks.0.hook_resid_mid", wipe)]):
        _, cache = model.run_with_cache(ids)
    assert not cache["resid_mid", 0].any() and cache["resid_pre", 0].any()
    torch.testing.assert_close(cache["resid_post", 0], cache["mlp_out", 0])
    kept: list[torch.Tensor] = []
    keep = lambda x, point: kept.append(x)
    model.run_with_hooks(
        ids, [("blocks.0.hook_resid_post", keep), ("blocks.1.hook_resid_pre", wipe)]
    )
    assert kept[0].any(), "a later hook wrote into what an earlier one was given"
    pointers = [x.untyped_storage().data_ptr() for x in cache.values()]
    assert len(set(pointers)) == len(pointers)
