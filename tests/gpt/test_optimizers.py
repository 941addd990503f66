"""The optimizers against torch's own, and twenty steps against the plain implementation."""

import numpy as np
import plain_gpt
import pytest
import torch
from plain_gpt import PlainGPT
from support import ONE, copy_to_plain, knobs, losses, run_here, same_tensors

import train_gpt
from plumbing import TokenShards
from plumbing.exchange import StepExchange
from plumbing.world import World, flat_gradients
from train_gpt import GPT, Muon, make_optimizers, matrices, orthogonalize

YES, NO = torch.tensor(True), torch.tensor(False)


def test_newton_schulz_in_batches_equals_one_at_a_time_and_is_nearly_orthogonal():
    g = torch.randn(5, 24, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    batch = orthogonalize(g)
    assert all(torch.equal(batch[i], orthogonalize(g[i : i + 1])[0]) for i in range(5))
    values = torch.linalg.svdvals(batch.float())
    assert 0.6 < values.min() and values.max() < 1.3
    plain = torch.stack([plain_gpt.newton_schulz(m) for m in g.float()]).float()
    assert (batch.float() - plain).norm() < 0.05 * plain.norm()


def small_model(**values) -> tuple[GPT, torch.Tensor, torch.optim.Optimizer, Muon]:
    cfg = knobs(**values)
    model = GPT(cfg, torch.float32)
    model.init_weights(1)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.2)
    gradients = flat_gradients(model)
    return model, gradients, *make_optimizers(model, cfg, ONE)


def backward(model: GPT, seed: int = 0) -> None:
    x = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    (model(x[:, :-1], x[:, 1:]) / 64).backward()


@pytest.mark.parametrize("gate", train_gpt.GATES)
def test_muon_agrees_with_torch_optim_muon(gate):
    model, gradients, _, muon = small_model(attngate=gate)
    names = [n for n, _ in model.named_parameters() if n != "wte"]
    params = dict(model.named_parameters())
    mine = [matrix.detach() for n in names for matrix in matrices(n, params[n])]
    twins = [torch.nn.Parameter(matrix.clone()) for matrix in mine]
    oracle = torch.optim.Muon(
        twins,
        lr=5 * 0.01,
        weight_decay=0.0,
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        adjust_lr_fn="match_rms_adamw",
    )
    before = [twin.detach().clone() for twin in twins]
    for step in range(3):
        gradients.zero_()
        backward(model, step)
        grads = [grad for n in names for grad in matrices(n, params[n].grad)]
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad.clone()
        muon.step(0.01, YES)
        oracle.step()
    for matrix, twin, old in zip(mine, twins, before, strict=True):
        assert (matrix - twin).norm() < 0.06 * (twin - old).norm()


def test_adamw_equals_torch_optim_adamw():
    model, gradients, adam, _ = small_model(attngate="elementwise", gateopt="adam")
    params = adam.param_groups[0]["params"]
    gates = [block.attn.gate for block in model.blocks]
    assert {id(p) for p in params} == {id(p) for p in [model.wte, *gates]}
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    oracle = torch.optim.AdamW(twins, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(3):
        gradients.zero_()
        backward(model, step)
        for p, twin in zip(params, twins, strict=True):
            twin.grad = p.grad.clone()
        adam.step(0.01, YES)
        oracle.step()
    assert all(torch.allclose(p, twin, atol=1e-7) for p, twin in zip(params, twins, strict=True))


def test_nothing_moves_when_the_step_is_not_finite():
    """Neither weights nor moments nor momentum: a bad gradient leaves no trace anywhere."""
    model, gradients, adam, muon = small_model(attngate="headwise")
    backward(model)
    adam.step(0.01, YES)
    muon.step(0.01, YES)
    gradients[5] = float("nan")
    gradients[-5] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    moments = {k: v.clone() for k, v in adam.state[model.wte].items()}
    momentum = {shape: buffer.clone() for shape, buffer in muon.momentum.items()}
    adam.step(0.01, NO)
    muon.step(0.01, NO)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert same_tensors(moments, adam.state[model.wte]) and same_tensors(momentum, muon.momentum)


def test_no_weight_moves_from_the_first_step_on_that_is_not_finite(monkeypatch, tmp_path):
    """The host hears of it a step later, when the next, healthy step is queued already."""
    send, seen = StepExchange.send, {}

    def bad_loss(self, step, loss, *rest):
        if step == 7:
            seen["before"] = [p.detach().clone() for p in seen["model"].parameters()]
            loss = loss * float("nan")
        return send(self, step, loss, *rest)

    init_weights = GPT.init_weights

    def watched(self, seed):
        seen["model"] = self
        init_weights(self, seed)

    monkeypatch.setattr(GPT, "init_weights", watched)
    monkeypatch.setattr(StepExchange, "send", bad_loss)
    assert run_here(monkeypatch, tmp_path)[0] == 1
    after = seen["model"].parameters()
    assert all(torch.equal(a, b) for a, b in zip(seen["before"], after, strict=True))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_share_the_orthogonalization_and_get_one_ranks_update(size):
    """Every rank's part, gathered, is what one rank computes; no rank has over one matrix more."""
    x = torch.randn(7, 6, 9, generator=torch.Generator().manual_seed(0))
    parts: list[torch.Tensor] = []

    class Gathering(World):
        def all_gather(self, mine):
            parts.append(mine)
            return torch.stack([mine] * self.size)

    for rank in range(size):
        model, *_ = small_model()
        params = {n: p for n, p in model.named_parameters() if n != "wte"}
        Muon(params, Gathering(rank, size, ONE.device), torch.float32).orthogonalize_shared(x)
    together = torch.cat(parts)[:7]
    assert torch.allclose(together, orthogonalize(x), atol=1e-5)
    assert {len(part) for part in parts} == {-(-7 // size)}


@pytest.mark.parametrize(
    ("gate", "opt"), [("none", "muon"), ("elementwise", "muon"), ("headwise", "adam")]
)
def test_twenty_steps_follow_the_plain_implementation(monkeypatch, tmp_path, gate, opt):
    values = dict(num_iterations=20, warmup_iters=0, warmdown_iters=0, val_every=0)
    values |= dict(attngate=gate, gateopt=opt, data_order="stream", precision="bf16")
    run_here(monkeypatch, tmp_path, run_id="a", **values)
    ours = [float(loss) for loss, _ in losses(tmp_path, "a")]
    cfg = knobs(**values)
    model = GPT(cfg)
    model.init_weights(cfg.seed)
    plain = PlainGPT(64, 2, 2, 32, gate)
    copy_to_plain(model, plain)
    optimizers = plain_gpt.plain_optimizers(plain, cfg.lr)
    if opt == "adam":  # the gate moves from Muon to AdamW
        gates = [p for n, p in plain.named_parameters() if n.endswith("gate")]
        rest = [p for n, p in plain.blocks.named_parameters() if not n.endswith("gate")]
        optimizers = [
            torch.optim.AdamW([plain.wte, *gates], lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0),
            plain_gpt.PlainMuon(rest, lr=0.1 * cfg.lr),
        ]
    shards, theirs = TokenShards(str(tmp_path / "t_*.bin")), []
    for step in range(20):
        tokens = torch.from_numpy(shards.read(step * 256, 257).astype(np.int64))
        x, y = tokens[:-1].view(16, 16), tokens[1:].view(16, 16)
        theirs.append(plain_gpt.train_step(plain, optimizers, x, y, 4).item())
    assert theirs[-1] < theirs[0] - 0.5, "it learns"
    rms = np.sqrt(np.mean(np.square(np.subtract(ours, theirs))))
    assert rms <= 1e-3, rms
