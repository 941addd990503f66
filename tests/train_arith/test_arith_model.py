"""The model against one that is written out here, its dropout, optimizers, schedule and scores."""

import math

import pytest
import torch
import torch.nn.functional as F
from arith_support import EXPRS, ONE, ROOT, ids_of, model_of, settings

import train_arith
from arithmetic import EOS, evaluate_expr, problems_of
from plumbing import World
from plumbing.problem_scores import SCORES, summary
from train_arith import CompactTransformer, Knobs, lr_scale


def plain_forward(model: CompactTransformer, ids: torch.Tensor) -> torch.Tensor:
    """The architecture of the fact sheet, written out head by head and position by position."""
    w, k = dict(model.named_parameters()), model.cfg
    D, x = k.n_embd // k.n_head, w["embed.weight"][ids]
    T, C = x.shape[1:]
    for i in range(k.n_layer):
        at = lambda name, i=i: w[f"blocks.{i}.{name}"]
        h = F.layer_norm(x, (C,), at("ln1.weight"), at("ln1.bias"), 1e-5)
        q, key, v = (h @ at("attn.qkv.weight")[j * C : (j + 1) * C].T for j in range(3))
        heads = []
        for n in range(k.n_head):
            part = slice(n * D, (n + 1) * D)
            turned = []
            for t in (q[..., part], key[..., part]):
                rows = []
                for pos in range(T):
                    angle = pos / 10000 ** (torch.arange(0, D, 2) / D)
                    a, b = t[:, pos, : D // 2], t[:, pos, D // 2 :]
                    rows.append(
                        torch.cat(
                            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()],
                            -1,
                        )
                    )
                turned.append(torch.stack(rows, 1))
            scores = turned[0] @ turned[1].transpose(1, 2) / math.sqrt(D)
            mask = torch.tensor([[j > t for j in range(T)] for t in range(T)])
            heads.append(scores.masked_fill(mask, -math.inf).softmax(-1) @ v[..., part])
        x = x + torch.cat(heads, -1) @ at("attn.out.weight").T
        h = F.layer_norm(x, (C,), at("ln2.weight"), at("ln2.bias"), 1e-5)
        z = h @ at("mlp.fc1.weight").T + at("mlp.fc1.bias")
        z = (
            z * torch.sigmoid(z)
            if k.ffn_type == "swiglu"
            else z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        )
        if k.ffn_type != "gelu":
            z = z * (h @ at("mlp.value.weight").T + at("mlp.value.bias"))
        x = x + z @ at("mlp.fc2.weight").T + at("mlp.fc2.bias")
    return (
        F.layer_norm(x, (C,), w["ln_final.weight"], w["ln_final.bias"], 1e-5) @ w["embed.weight"].T
    )


@pytest.mark.parametrize("pattern", ["by hand, as under dropout", "fused"])
@pytest.mark.parametrize("ffn_type", ["gelu", "geglu", "swiglu"])
def test_values_and_gradients_are_those_of_the_architecture_written_out(
    monkeypatch, ffn_type, pattern
):
    monkeypatch.setattr(train_arith.SharedDropout, "forward", lambda self, x: x)
    model = model_of(ffn_type=ffn_type, dropout=0.5).train(pattern != "fused")
    grads = []
    for forward in (model, lambda ids: plain_forward(model, ids)):
        model.zero_grad()
        logits = forward(ids_of())
        F.cross_entropy(logits.flatten(0, 1), ids_of().flatten()).backward()
        grads.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def count_parameters(cfg: Knobs) -> int:
    return sum(p.numel() for p in CompactTransformer(cfg).parameters())


def test_parameter_counts_are_the_documented_ones():
    for name, count in (("pilot", 664_192), ("scale_10m", 10_651_776)):
        k = settings(f"--config={ROOT}/configs/{name}.yaml")
        assert count_parameters(k) == count
    pilot = CompactTransformer(Knobs())
    pilot.init_weights(0)
    assert sum(p.numel() for p in pilot.parameters()) == 664_192
    assert abs(float(pilot.blocks[0].attn.qkv.weight.detach().std()) - 0.02) < 0.001
    assert not pilot.blocks[0].mlp.fc1.bias.any() and bool((pilot.ln_final.weight == 1).all())
    assert bool((pilot.blocks[1].ln1.weight == 1).all()) and not pilot.blocks[1].ln1.bias.any()


def test_untied_weights_and_a_learned_position_table_are_trained_parameters():
    k = dict(tie_weights=False, use_rope=False)
    extra = count_parameters(Knobs(**k)) - count_parameters(Knobs())
    assert extra == 35 * 128 + 32 * 128
    model = model_of(**k)
    assert not torch.equal(model(ids_of(["1+2"]))[0, -1], model(ids_of(["2+1"]))[0, -1])


def test_padding_on_the_right_changes_nothing():
    model = model_of()
    ids = ids_of()
    alone = model(ids_of(["1+2"]))
    torch.testing.assert_close(model(ids)[:1, : alone.size(1)], alone, rtol=1e-5, atol=1e-6)


def test_dropout_masks_depend_on_the_row_and_not_on_the_number_of_ranks():
    knobs = dict(dropout=0.5, batch_size=8)
    model, ids = model_of(**knobs).train(), ids_of()
    torch.manual_seed(3)
    whole = model(ids)
    parts = []
    for rows in (slice(0, 3), slice(3, 8)):  # uneven shares
        model.drop.first_row = rows.start
        torch.manual_seed(3)
        parts.append(model(ids[rows]))
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(whole[0], model.eval()(ids)[0])


class AlwaysEnds(torch.nn.Module):
    def forward(self, ids):
        return F.one_hot(torch.full_like(ids, EOS), 35).float()


def test_a_model_that_always_ends_has_all_of_the_legacy_metric_and_nothing_else():
    problems = problems_of(EXPRS, [evaluate_expr(e) for e in EXPRS], Knobs())
    s = summary(train_arith.score(AlwaysEnds(), problems, Knobs(), ONE))
    assert (s["eos_after_gold"], s["exact_match"], s["digit_accuracy"]) == (1.0, 0.0, 0.0)


class Knows(torch.nn.Module):
    """Says the gold text, but for one token of one problem."""

    def __init__(self, problems, wrong: tuple[int, int] | None = None):
        super().__init__()
        self.tokens, self.wrong = torch.from_numpy(problems.tokens_NT).long(), wrong

    def forward(self, ids):
        following = self.tokens[:, 1 : ids.size(1) + 1].clone()
        if self.wrong:
            following[self.wrong] = 3
        return F.one_hot(following, 35).float()


@pytest.mark.parametrize("place", ["first", "end", "expression"])
def test_exact_match_asks_for_every_token_of_the_answer_and_its_end_and_for_no_other(place):
    problems = problems_of(EXPRS, [evaluate_expr(e) for e in EXPRS], Knobs())
    start, length = int(problems.starts_N[2]), int(problems.lengths_N[2])
    at = dict(first=start, end=length - 1, expression=start - 4)[place]
    full = train_arith.score(Knows(problems), problems, Knobs(), ONE)
    part = train_arith.score(Knows(problems, (2, at - 1)), problems, Knobs(), ONE)
    exact = SCORES.index("exact")
    assert full[:, exact].tolist() == [1.0] * 8
    wanted = [1.0] * 8
    wanted[2] = float(place == "expression")
    assert part[:, exact].tolist() == wanted


def test_ranks_share_the_scoring_unevenly_and_sum_to_the_whole():
    model = model_of()
    problems = problems_of(EXPRS[:7], [evaluate_expr(e) for e in EXPRS[:7]], Knobs())
    whole = train_arith.score(model, problems, Knobs(), ONE)

    class Alone(World):
        def all_reduce(self, x):
            return x

    parts = [
        train_arith.score(model, problems, Knobs(), Alone(rank, 3, ONE.device)) for rank in range(3)
    ]
    assert sum(parts) == pytest.approx(whole, abs=1e-5)


def test_the_schedule_starts_at_zero_and_falls_straight_to_zero():
    k = Knobs(warmup_iters=100)
    assert [lr_scale(s, k, 3150) for s in (0, 50, 99, 100, 1625, 3149, 3150)] == pytest.approx(
        [0, 0.5, 0.99, 1, 0.5, 1 / 3050, 0]
    )
    trapezoid = Knobs(schedule="trapezoid", warmup_iters=10, warmdown_frac=0.4)
    assert [lr_scale(s, trapezoid, 100) for s in (0, 5, 10, 60, 80, 100)] == pytest.approx(
        [0, 0.5, 1, 1, 0.5, 0]
    )


def test_adamw_decays_everything_with_the_betas_of_the_file():
    cfg = Knobs(betas="0.8,0.99")
    adam, *none = train_arith.make_optimizers(CompactTransformer(cfg), cfg)
    (group,) = adam.param_groups
    assert not none and len(group["params"]) == 43
    assert group["betas"] == (0.8, 0.99) and group["weight_decay"] == 0.01


def test_muon_takes_the_blocks_matrices_and_makes_orthogonal_updates_of_adamws_size():
    model = model_of()
    cfg = Knobs(optimizer="muon", weight_decay=0.0, muon_lr=1.0)
    adam, muon = train_arith.make_optimizers(model, cfg)
    assert sum(len(stack) for stack in muon.stacks.values()) == 12
    assert len(adam.param_groups[0]["params"]) == len(list(model.parameters())) - 12
    p, generator = model.blocks[0].attn.qkv.weight, torch.Generator().manual_seed(0)
    for q in model.parameters():
        q.grad = torch.randn(q.shape, generator=generator)
    before = p.detach().clone()
    muon.step(1.0, torch.tensor(True))
    update = before - p.detach()
    spectrum = torch.linalg.svdvals(update / (0.2 * 48**0.5))
    assert 0.6 < float(spectrum.min()) and float(spectrum.max()) < 1.3
    assert float((update * p.grad).sum()) > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_whose_flag_is_down_moves_nothing(optimizer):
    model = model_of()
    optimizers = train_arith.make_optimizers(model, Knobs(optimizer=optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    for value, moves in ((math.nan, False), (1.0, True)):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        for one in optimizers:
            one.step(0.01, torch.tensor(moves))
        pairs = zip(before, model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is not moves
    assert all(p.isfinite().all() for p in model.parameters())


def test_clipping_is_torchs():
    gradients = torch.randn(500)
    parts = gradients.clone().split([100, 400])
    norms = torch.stack([part.norm() for part in parts])
    total = torch.nn.utils.get_total_norm(parts)
    for limit, scale in ((1.0, 1 / total), (1000.0, 1.0), (0.0, 1.0)):
        clipped = gradients.clone()
        train_arith.clip_gradients(clipped, norms, limit)
        torch.testing.assert_close(clipped, gradients * scale, rtol=1e-4, atol=1e-6)
