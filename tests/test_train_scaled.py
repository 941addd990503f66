"""train_scaled.py: memory, window, model, data and runs, each against something written out independently."""

# ruff: noqa: RUF001 -- Turkish has a dotless i

import ast
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scaled_support import (
    PlainPhase8,
    byte_memory,
    copy_phase8,
    cumsum_memory,
    dense_window,
    step_recurrence,
)
from support import (
    ONE,
    ROOT,
    SHARED,
    command,
    environment,
    losses,
    metrics,
    newest_state,
    rows,
    same_tensors,
)

import plumbing
import train_scaled
from plumbing import Pulse, TokenShards, UserError, World
from train_scaled import (
    ByteLM,
    ByteMemory,
    Knobs,
    LossScale,
    Stream,
    each,
    memory,
    window_attention,
)

CPU = torch.device("cpu")
# A model and a run that take a second: every size is small, nothing is switched off.
SMALL = dict(
    device="cpu",
    compile=0,
    d_model=32,
    n_layer=2,
    n_head=2,
    window=4,
    thinking_steps=1,
    batch_size=4,
)
SMALL |= dict(
    device_batch_size=2,
    sequence_length=64,
    num_iterations=12,
    warmup_iters=2,
    val_every=4,
    val_bytes=1000,
)
SMALL |= dict(save_every=4, lr=0.01, log_every=2, ngram_rows=64, mem_rows=64)
PARTS = "mem_", "rope", "norm", "fus", "delta", "decoder", "ngram"
SEED_FORM = {n: v for n, v in train_scaled.SEED_BLOCK.items() if n.startswith(PARTS)}
VARIANTS = {
    "scaled": {},
    "delta": dict(delta_rule=True),
    "phase8": SEED_FORM | dict(mem_range=0.5, mem_init=1.0, carry_state=False),
    "delay": dict(mem_delay=True),
    "static sum": dict(mem_decay="static", fusion="sum", mem_gate=False, norm="layernorm"),
    "window only": dict(memory="off"),
}


def small(**values) -> Knobs:
    return Knobs(**(SMALL | dict(compile=False) | values))


def fresh(variant: str = "scaled", **values) -> ByteLM:
    """A model in which everything contributes: data-dependent decay and n-gram tables start at zero, and here they do
    not."""
    model = ByteLM(small(**(VARIANTS[variant] | values)))
    model.init_weights(1)
    if model.k.ngram_rows:
        torch.nn.init.normal_(model.decoder.grams.table, generator=torch.Generator().manual_seed(4))
    for block in model.blocks if model.k.memory != "off" and model.k.mem_decay == "data" else ():
        torch.nn.init.normal_(block.memory.decay.weight, generator=torch.Generator().manual_seed(3))
    return model.eval()


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def repeats(*shape: int, seed: int = 0) -> torch.Tensor:
    """Three bytes only: short histories come again all the time, and long ones at times."""
    return torch.randint(97, 100, shape, generator=torch.Generator().manual_seed(seed))


def write_text(folder: Path, train: int = 6000, val: int = 1500) -> Path:
    """Learnable text, Turkish letters included."""
    rng, words = (
        np.random.default_rng(5),
        "bir göl kıyı çok ağaç düş üzüm şey var yok ve ile".split(),
    )
    for name, n in (("train.txt", train), ("val.txt", val)):
        (folder / name).write_bytes(" ".join(rng.choice(words, n)).encode()[:n])
    return folder / "train.txt"


def flags(folder: Path, **knobs) -> list[str]:
    if not (folder / "train.txt").exists():
        write_text(folder)
    values = SMALL | dict(
        data=folder / "train.txt", logs_folder=folder / "logs", results_file=folder / "results.csv"
    )
    return [
        f"--{name}={int(v) if v is True or v is False else v}"
        for name, v in (values | knobs).items()
    ]


def run_here(monkeypatch, folder: Path, **knobs) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["train_scaled.py", *flags(folder, **knobs)])
    with redirect_stdout(StringIO()) as out:
        code = train_scaled.main()
    return code, out.getvalue()


# ---------------------------------------------------------------- memory


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
        else torch.full((H,), float(retention)).log()
    )
    return [t.requires_grad_() for t in (q, k, v, a, S)]


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("retention", [1e-6, 0.1, 0.5, 0.9, 0.995, 0.9999983, 1.0, "data"])
def test_chunkwise_memory_is_the_step_recurrence_with_its_gradients(retention, delta):
    for N in (
        1,
        5,
        64,
        150,
        1100,
    ):  # one patch, less than a chunk, one, some and a rest, more than a group
        ins = memory_inputs(N, retention)
        exact = [t.detach().double().requires_grad_() for t in ins]
        found, wanted = memory(*ins, delta), step_recurrence(*exact, delta)
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for t in found]
        score = lambda out: sum((o * w).sum() for o, w in zip(out, weights, strict=True))  # noqa: B023
        grads = torch.autograd.grad(score(found), ins), torch.autograd.grad(score(wanted), exact)
        for mine, theirs in zip((*found, *grads[0]), (*wanted, *grads[1]), strict=True):
            assert (mine - theirs).abs().max() < 1e-5 * max(1, theirs.abs().max()), (N, delta)


@pytest.mark.parametrize("retention", [1e-6, 0.995, 0.9999983, "data"])
def test_memory_is_exact_over_65536_patches(retention):
    ins = memory_inputs(65536, retention, B=1, H=1, E=2, width=3)
    found = memory(*ins)
    found[0].square().sum().backward()
    q, k, v, a, S = (t.detach().double().numpy() for t in ins)
    a, S, wanted = np.broadcast_to(np.exp(a).reshape(-1), 65536), S[0, 0], np.empty((65536, 3))
    for t in range(65536):
        S = a[t] * S + np.outer(k[0, 0, t], v[0, 0, t])
        wanted[t] = q[0, 0, t] @ S
    assert np.abs(found[0][0, 0].detach().numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert all(t.grad.isfinite().all() for t in ins)


@pytest.mark.parametrize("delta", [False, True])
def test_memory_in_parts_or_one_patch_at_a_time_equals_memory_at_once(delta):
    q, k, v, a, S = memory_inputs(300, "data")
    whole = memory(q, k, v, a, S, delta)
    for sizes in ([300], [64, 236], [1] * 130 + [170], [37, 1, 262]):
        state, out = S, []
        for part in zip(*(t.split(sizes, 2) for t in (q, k, v, a)), strict=True):
            o, state = memory(*part, state, delta)
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
        o, _ = memory(q, k, F.pad(v, (0, 1), value=1.0), a, torch.zeros(2, 3, 8, 9))
        assert torch.allclose(
            o[..., :-1] / (o[..., -1:] + 1e-6), cumsum_memory(q, k, v, a), atol=1e-5
        )


def test_the_originals_clamp_ends_its_decay_and_ours_goes_on():
    """0.1 to the 59th is nothing; the clamped form still holds a write of 59 patches before at full weight."""
    q = k = torch.ones(1, 1, 100, 1)
    v = F.pad(torch.ones(1, 1, 1, 1), (0, 0, 40, 59))
    a = torch.tensor([0.1]).log()
    o, _ = memory(q, k, F.pad(v, (0, 1), value=1.0), a, torch.zeros(1, 1, 1, 2))
    assert o[0, 0, -1, 0].abs() < 1e-12 and cumsum_memory(q, k, v, a)[0, 0, -1] > 1e-3


# ---------------------------------------------------------------- window


@pytest.mark.parametrize(
    ("w", "N", "P"),
    [(4, 16, 0), (4, 18, 0), (4, 18, 3), (4, 18, 2), (4, 1, 3), (8, 5, 0), (8, 5, 7)],
)
@pytest.mark.parametrize("full", [False, True])
def test_chunked_window_attention_equals_the_dense_mask(w, N, P, full):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g).requires_grad_() for n in (N, P + N, P + N))
    w = None if full else w
    found, wanted = window_attention(q, k, v, w), dense_window(q, k, v, w)
    assert torch.allclose(found, wanted, atol=2e-6)
    for mine, theirs in zip(
        *(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (found, wanted)), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_window_attention_never_makes_all_pairs():
    """Its largest tensor grows with N, not with its square."""
    sizes = []
    for N in (512, 2048):
        q = torch.randn(1, 1, N, 8)
        with torch.profiler.profile(profile_memory=True) as p:
            window_attention(q, q, q, 16)
        sizes.append(
            max(e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
        )
    assert sizes[1] < 5 * sizes[0]


# ---------------------------------------------------------------- model


@pytest.mark.parametrize(("preset", "count"), [("phase8", 129_302_416), ("phase7", 31_199_792)])
def test_the_seeds_parameter_counts_are_exact(preset, count):
    with torch.device("meta"):
        model = ByteLM(Knobs(preset=preset, **train_scaled.PRESETS[preset]))
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_default_is_within_3_percent_of_129m():
    with torch.device("meta"):
        count = sum(p.numel() for p in ByteLM(Knobs()).parameters())
    assert abs(count / 129_302_416 - 1) < 0.03


@pytest.mark.parametrize(("low", "logit", "half_life"), [(0.995, 8.0, 413_338), (0.99, 0.0, 138.3)])
def test_retention_starts_as_the_seed_has_it(low, logit, half_life):
    found = fresh("phase8", mem_range=low, mem_init=logit).half_lives()
    assert found.shape == (2, 2) and (found / half_life - 1).abs().max() < 0.002


def test_log_spaced_half_lives_run_from_32_to_65536_patches():
    found = fresh(d_model=64, n_head=4).half_lives()[0]
    assert torch.allclose(found, torch.logspace(5, 16, 4, base=2, dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize("form", ["steps", "cumsum"])
def test_the_phase_8_model_is_the_plain_reference(form):
    model = fresh("phase8", d_model=64, n_head=4, window=8, mem_range=0.995, thinking_steps=3)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.memory.retention.copy_(torch.linspace(-4, 8 - i, 4))
    plain = PlainPhase8(64, 2, 4, 8, 0.995, form=form)
    copy_phase8(model, plain)
    x, y = text(2, 128), text(2, 128, seed=1)
    mine, theirs = model.logits(x, y)[0], plain(x, y)
    assert torch.allclose(mine, theirs, atol=2e-5)
    nll = model.nll(x, y)[0]
    assert torch.allclose(nll, F.cross_entropy(theirs.mT, y, reduction="none"), atol=2e-5)
    nll.mean().backward()
    F.cross_entropy(theirs.mT, y).backward()
    for a, b in ((model.embed, plain.embed), (model.blocks[0].memory.qkv, plain.blocks[0].mem_qkv)):
        assert torch.allclose(a.weight.grad, b.weight.grad, atol=1e-6, rtol=1e-3)
    assert torch.allclose(
        model.blocks[0].memory.retention.grad,
        plain.blocks[0].decay_logits.grad,
        atol=1e-8,
        rtol=1e-2,
    )


@pytest.mark.parametrize("variant", ["scaled", "phase8", "delta", "delay"])
def test_a_byte_moves_no_prediction_of_itself_or_before(variant):
    """Every byte of a window, and every logit: byte p of the text is target p - 4, and stands in x from p on."""
    model, s = fresh(variant), repeats(1, 68)
    before = model.logits(s[:, :64], s[:, 4:])[0]
    with torch.no_grad():
        for p in range(68):
            t = s.clone()
            t[0, p] = 97 + (t[0, p] - 96) % 3
            after = model.logits(t[:, :64], t[:, 4:])[0]
            first = max(
                p - 3, 0
            )  # target index of byte p + 1, the first prediction that may have seen byte p
            assert torch.equal(before[:, :first], after[:, :first]), p
            assert p == 67 or not torch.equal(before[:, first:], after[:, first:]), p


@pytest.mark.parametrize("variant", VARIANTS)
def test_windows_with_carried_state_equal_one_long_forward(variant):
    model, s = fresh(variant), repeats(2, 196)
    x, y = s[:, :-4], s[:, 4:]
    whole, last = model.nll(x, y)
    for sizes in ([64, 64, 64], [4, 12, 176], [160, 4, 28]):
        state, parts = model.state(2), []
        for part_x, part_y in zip(x.split(sizes, 1), y.split(sizes, 1), strict=True):
            nll, state = model.nll(part_x, part_y, state)
            parts.append(nll)
        assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5)
    same = []
    each(
        lambda a, b: same.append(torch.allclose(a.float(), b.float(), atol=2e-5)) or a, state, last
    )
    assert all(same) and len(same) > 4
    state = model.nll(x[:, :64], y[:, :64])[1]
    once, again = (model.nll(x[:, 64:], y[:, 64:], state)[0] for _ in range(2))
    assert torch.equal(once, again), "a forward leaves the state that it is given as it is"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_fed_in_any_pieces_equals_the_full_forward(variant):
    model, s = fresh(variant), repeats(2, 60)
    s[1, :12] = 97  # what follows the first bytes is met again at once
    wanted = model.logits(s[:, :56], s[:, 4:])[0]
    for sizes in ([1] * 60, [3, 10, 1, 46], [59, 1]):
        stream, at = Stream(model, 2, prefill=16), 0
        assert torch.equal(stream.logits(), torch.zeros(2, 256))
        for part in s.split(sizes, 1):
            stream.feed(part)
            at += part.size(1)
            if 4 <= at < 60:
                assert torch.allclose(stream.logits(), wanted[:, at - 4], atol=2e-5), at


def test_what_a_stream_is_not_to_remember_is_read_but_not_repeated():
    model, once = fresh(), torch.tensor([list(b"abcdefghijkl")])
    streams = [Stream(model) for _ in range(3)]
    streams[0].feed(once)
    streams[1].feed(once, remember=False)
    streams[2].feed(once.flip(1))
    for stream in streams:
        stream.feed(once[:, :8])
    knows, heard, other = (stream.logits().softmax(-1)[0, ord("i")] for stream in streams)
    assert knows > 0.5 > heard and torch.equal(streams[1].past, streams[0].past) and heard != other


def test_a_streams_memory_does_not_grow_with_the_text():
    stream = Stream(fresh())
    sizes = []
    for n in (64, 512, 2048):
        stream.feed(text(1, n))
        sizes.append(stream.state_bytes())
    assert sizes[0] == sizes[1] == sizes[2] > 0


@pytest.mark.parametrize("reads", [0, 1, 4, 8])
def test_the_byte_decoder_is_torchs_gru_over_the_last_bytes_before_a_patch_and_its_own(reads):
    decoder = fresh(decoder_reads=reads, ngram_rows=0).decoder
    z, x, y = torch.randn(2, 3, 32), text(2, 3, 8), text(2, 3, 4, seed=1)
    seen = x[..., 8 - reads :] if reads else torch.zeros(2, 3, 1, dtype=torch.long)
    before = torch.cat([seen, y[..., :3]], -1).flatten(0, 1)
    latent = decoder.latent(z).view(6, 1, 256).expand(-1, before.size(1), -1)
    hidden, _ = decoder.gru(torch.cat([decoder.embed(before), latent], -1))
    assert torch.allclose(
        decoder(z, x, y)[0], decoder.out(hidden[:, -4:]).view(2, 3, 4, 256), atol=1e-5
    )


def test_the_n_gram_tables_are_read_by_the_last_3_to_6_bytes_alone():
    """By what each byte moves, at every place of a text; the tables are the only thing that says anything here."""
    model = fresh(ngram_rows=1 << 16, mem_rows=0)
    torch.nn.init.normal_(model.decoder.grams.table)
    for parameter in (*model.decoder.gru.parameters(), *model.decoder.out.parameters()):
        torch.nn.init.zeros_(parameter)
    torch.nn.init.eye_(model.decoder.out.weight)
    x = text(1, 36)
    with torch.no_grad():
        logits = model.logits(x[:, :-4], x[:, 4:])[0][0]  # of bytes 4 .. 35
        for at in range(36):
            other = x.clone()
            other[0, at] ^= 1
            moved = (model.logits(other[:, :-4], other[:, 4:])[0][0] != logits).any(
                -1
            ).nonzero().flatten() + 4
            assert moved.tolist() == [t for t in range(4, 36) if t - 6 <= at < t]
        rows = [model.decoder.grams.table[i << 16 : (i + 1) << 16] for i in range(4)]
        out = model.decoder.grams.out.weight.split(64, 1)
        seen = {n: {} for n in (3, 4, 5, 6)}
        for i, n in enumerate((3, 4, 5, 6)):
            for t in range(8, 36):
                key = x[:, t - 8 : t].clone()
                key[:, : 8 - n] = 7  # what lies before the n-gram moves no row of its table
                index = (
                    ((key + 1) * model.decoder.grams.hash.powers)[..., 8 - n :].sum(-1)
                    % (2**31 - 1)
                    % (1 << 16)
                )
                seen[n][t] = rows[i][index] @ out[i].T
        whole = torch.cat([sum(seen[n][t] for n in seen) for t in range(8, 36)])
    torch.testing.assert_close(logits[4:], whole)


@pytest.mark.parametrize("rows", [1, 7, 1 << 16])
def test_the_memory_by_bytes_is_its_recurrence_with_its_gradients_whatever_the_cuts(rows):
    """With one row, with histories that fall into each other's rows, and without such."""
    (s,), logits, h = repeats(1, 150).tolist(), torch.randn(1, 126, 256), torch.randn(1, 126, 256)
    for sizes in ([126], [1] * 126, [5, 70, 51]):
        memory = ByteMemory(rows)
        torch.nn.init.normal_(memory.how, std=0.3)
        torch.nn.init.normal_(memory.doubt.weight, std=0.05)
        memory.how.data.view(-1, 6)[:, 5] -= 3  # a half-life of about 14 bytes
        wanted = byte_memory(memory, s, logits[0], h[0])
        (wanted * logits[0]).sum().backward()
        gradients = [p.grad.clone() for p in memory.parameters()]
        memory.zero_grad()
        state, at, out = memory.state(1), 0, []
        for n in sizes:
            given = torch.tensor([s[at : at + n + 24]])
            byte, age, writes = memory.read(given, torch.tensor([at]), state)
            memory.write(state, writes)
            out.append(memory(logits[:, at : at + n], h[:, at : at + n], byte, age))
            at += n
        out = torch.cat(out, 1)[0]
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
        (out * logits[0]).sum().backward()
        for p, gradient in zip(memory.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient, atol=1e-3, rtol=1e-4)
        assert (wanted - logits[0].log_softmax(-1)).abs().max() > 1 and wanted.exp().sum(
            -1
        ).allclose(torch.ones(126))


def test_the_memory_by_bytes_finds_what_followed_wherever_patches_begin_and_4000_bytes_later():
    """An untrained model: words met once, 0 to 4,000 bytes ago, at each of the four places in a patch."""
    model, once = fresh(mem_rows=1 << 16), "Parola: kırk bir çınar ".encode()
    for gap in (0, 1, 2, 3, 4000):
        s = torch.cat([torch.tensor([list(once)]), text(1, gap), torch.tensor([list(once)])], 1)
        stream, right = Stream(model), 0
        stream.feed(s[:, : -len(once) + 9])
        for byte in once[9:]:
            right += int(stream.logits().argmax(-1)) == byte
            stream.feed(torch.tensor([[byte]]))
        assert right == len(once) - 9, gap


def test_histories_last_from_128_bytes_to_131072_at_first_and_decay_as_they_say():
    memory = ByteMemory(8)
    torch.testing.assert_close(memory.half_lives()[[0, -1]], torch.tensor([128.0, 131072.0]))
    logits, byte = torch.zeros(256), torch.full((5, 2), 7)
    share = lambda logp: (
        (logp[7].exp() - logp[8].exp()) / (256 * logp[8].exp())
    )  # of the memory's mass to the model's
    for i, half_life in enumerate(memory.half_lives()):  # only one history is known
        now, later = (
            torch.full((5, 2), -1.0).index_put((torch.tensor(i), torch.tensor(0)), a)
            for a in (0 * half_life, half_life)
        )
        shares = [share(memory(logits, logits, byte, age)).item() for age in (now, later)]
        assert shares[1] / shares[0] == pytest.approx(0.5, rel=1e-3)


def test_a_zeroed_memory_has_the_same_weights_and_leaves_the_window_alone():
    full, zero = fresh(), fresh(memory="zero")
    zero.load_state_dict(full.state_dict())
    x, y = text(1, 128), text(1, 128, seed=1)
    other = x.clone()
    other[:, :4] = (other[:, :4] + 1) % 256
    moved = lambda m: (m.nll(x, y)[0] - m.nll(other, y)[0]).abs()[:, 4 * (1 + 2 * 3) :].max()
    assert moved(zero) == 0 and moved(full) > 0, (
        "beyond 2 blocks x (window - 1) only memory carries"
    )
    none, s = fresh(memory="zero", mem_rows=0), repeats(1, 132)
    none.load_state_dict(
        {name: t for name, t in full.state_dict().items() if not name.startswith("byte_memory.")}
    )
    silent, without, heard = (m.logits(s[:, :-4], s[:, 4:])[0] for m in (zero, none, full))
    assert torch.equal(silent, without) and not torch.allclose(silent, heard), (
        "nor does the memory by bytes"
    )


def test_with_mem_delay_the_memory_holds_only_what_has_left_the_window():
    model = fresh("delay", n_layer=1, mem_conv=False)
    state = model.trunk(text(1, 16), model.state(1))[
        1
    ]  # 4 patches: the window is full, nothing has left
    assert state["layers"][0]["S"].abs().max() == 0
    assert model.trunk(text(1, 20), model.state(1))[1]["layers"][0]["S"].abs().max() > 0


def test_plasticity_multiplies_every_retention_and_is_saved():
    model = fresh("phase8", n_layer=1)
    model.plasticity.fill_(0.25)
    assert model.state_dict()["plasticity"] == 0.25
    block, h = (
        model.blocks[0].memory,
        torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)),
    )
    S = block(h, block.state(1), model.plasticity)[1]["S"]
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in block.qkv(h).chunk(3, -1))
    a = (0.25 * (0.5 + 0.5 * torch.sigmoid(block.retention))).log()
    _, wanted = step_recurrence(
        q, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0), a, torch.zeros(1, 2, 16, 17)
    )
    assert torch.allclose(S, wanted, atol=1e-5)


def test_another_part_moves_no_other_parts_initial_weights():
    plain, more = fresh(mem_gate=False).state_dict(), fresh(delta_rule=True).state_dict()
    assert plain.keys() < more.keys() and all(torch.equal(t, more[n]) for n, t in plain.items())


def test_recomputing_blocks_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        model = fresh(recompute=recompute).train()
        model.nll(text(2, 64), text(2, 64, seed=1))[0].mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------- precision, schedule


def test_precision_follows_the_devices_capability():
    choose = train_scaled.choose_precision
    assert choose("auto", "cpu", None)[0] == "fp32" and choose("auto", "cuda", (7, 5))[0] == "fp16"
    assert (
        choose("auto", "cuda", (8, 0))[0] == "bf16" and choose("auto", "cuda", (9, 0))[0] == "bf16"
    )
    assert choose("fp32", "cuda", (9, 0))[0] == "fp32"
    with pytest.raises(
        UserError,
        match=r"PRECISION=bf16: this GPU has compute capability 7\.5 and would emulate it",
    ):
        choose("bf16", "cuda", (7, 5))


def test_the_loss_scale_moves_as_torchs_grad_scaler_does():
    ours, theirs = LossScale(True, CPU), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    p = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([p], lr=0.0)
    for step in range(4100):
        p.grad = torch.full((1,), float("inf") if step in (3, 4, 2500) else 1.0)
        theirs.scale(torch.zeros(1))
        theirs.step(sgd)
        theirs.update()
        ours.update(ours.skip(p.grad[0]))
        assert ours.scale == theirs.get_scale(), step


def test_the_schedules_are_what_their_names_say():
    k = lambda s: small(schedule=s, num_iterations=10, warmup_iters=2)
    rates = {
        s: [round(train_scaled.lr_scale(i, k(s)), 3) for i in (0, 1, 2, 6, 10)]
        for s in ("constant", "linear", "cosine")
    }
    assert rates == dict(
        constant=[0.5, 1, 1, 1, 1], linear=[0.5, 1, 1, 0.5, 0], cosine=[0.5, 1, 1, 0.5, 0]
    )
    seed = Knobs(preset="phase8", **train_scaled.PRESETS["phase8"])
    assert [seed.lr * train_scaled.lr_scale(s, seed) for s in (0, 499, 49999)] == pytest.approx(
        [4e-7, 2e-4, 2e-4]
    )
    stages = [
        train_scaled.plasticity(s, small(curriculum=True, num_iterations=100))
        for s in (0, 14, 15, 39, 40, 99)
    ]
    assert stages == [0.1, 0.1, 0.5, 0.5, 0.99, 0.99] and train_scaled.plasticity(0, small()) == 1


# ---------------------------------------------------------------- data


def shards(folder: Path, data: bytes, name: str = "t.txt") -> TokenShards:
    (folder / name).write_bytes(data)
    return TokenShards([str(folder / name)], open_file=plumbing.read_bytes)


def test_carried_rows_read_their_strips_window_after_window(tmp_path):
    data = bytes(range(256)) * 5
    batches = train_scaled.Batches(
        shards(tmp_path, data), small(batch_size=4, sequence_length=64), ONE
    )
    strip = (1280 - 4) // 4
    assert batches.windows == strip // 64 and [batches.fresh(s) for s in range(5)] == [
        True,
        False,
        False,
        False,
        True,
    ]
    for step in range(10):
        x, y = batches.make(step)
        for row in range(4):
            at = row * strip + step % batches.windows * 64
            assert (
                bytes(x[row].tolist()) == data[at : at + 64]
                and bytes(y[row].tolist()) == data[at + 4 : at + 68]
            )


@pytest.mark.parametrize("carry", [True, False])
def test_any_number_of_ranks_reads_the_same_windows(tmp_path, carry):
    s, k = shards(tmp_path, bytes(range(256)) * 5), small(carry_state=carry)
    whole, parts = (
        train_scaled.Batches(s, k, ONE),
        [train_scaled.Batches(s, k, World(r, 2, CPU)) for r in range(2)],
    )
    seen = set()
    for step in range(6):
        for i in range(2):
            assert torch.equal(whole.make(step)[i], torch.cat([p.make(step)[i] for p in parts]))
        seen.add(tuple(whole.starts(step)))
    assert len(seen) == (whole.windows if carry else 6)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(("size", "limit"), [(1003, None), (2777, None), (2777, 1000), (40, None)])
def test_validation_is_every_byte_once_and_weighted_by_bytes(tmp_path, carry, size, limit):
    data = ("ağaç kıyı " * 400).encode()[:size]
    val, model = shards(tmp_path, data, "v.txt"), fresh()
    k = small(carry_state=carry, val_bytes=limit)
    total = min(size, (limit or size) + 4) - 4
    strip, nats, count = -(-total // 32) * 4, 0.0, 0
    for start in range(
        0, total, strip
    ):  # by hand: a strip at once if its state is carried, else window by window
        end = min(start + strip, total)
        for at in range(start, end, strip if carry else 64):
            n = min(end - at, strip if carry else 64)
            x = np.frombuffer(data + b"\0" * 8, np.uint8)[at : at + -(-n // 4) * 4]
            y = np.full(len(x), -1)
            y[:n] = np.frombuffer(data, np.uint8)[at + 4 : at + 4 + n]
            nll = model.nll(*(torch.tensor(t.astype(np.int64))[None] for t in (x, y)))[0]
            nats, count = nats + nll.sum().item(), count + n
    chars = len(data[4 : 4 + total].decode(errors="ignore"))
    for micro, ranks in ((2, 1), (3, 1), (8, 2)):
        step = train_scaled.MicroStep(model, k, ONE, torch.float32, print)
        found = [
            train_scaled.evaluate(step, val, micro, k, Part(r, ranks, CPU)) for r in range(ranks)
        ]
        assert count == total and abs(sum(f[0] for f in found) - nats / total) < 1e-5
        assert abs(sum(f[1] for f in found) * total - chars) <= 1


class Part(World):
    def sum(self, x):
        return x


def test_data_may_be_a_file_a_folder_or_a_pattern_and_finds_its_validation_file(tmp_path):
    train = write_text(tmp_path)
    (tmp_path / "test.txt").write_bytes(b"left alone")
    for data in (train, tmp_path, tmp_path / "*.txt"):
        found = train_scaled.split_files(str(data))
        assert [[Path(p).name for p in paths] for paths in found] == [["train.txt"], ["val.txt"]]


def test_text_without_a_validation_file_is_split_by_paragraphs_once(tmp_path, monkeypatch):
    monkeypatch.setattr(train_scaled, "HERE", tmp_path)
    pieces = [f"paragraph {i} \xff".encode("latin-1") + b" word" * 20 + b"\n\n" for i in range(400)]
    (tmp_path / "book.md").write_bytes(b"".join(pieces))
    train, val = train_scaled.split_files(str(tmp_path / "book.md"))
    a, b = (Path(p[0]).read_bytes() for p in (train, val))
    assert len(a) + len(b) == sum(map(len, pieces)) and 0.01 < len(b) / len(a) < 0.12
    assert all((piece in a) != (piece in b) for piece in pieces), "invalid UTF-8 is text too"
    before = os.stat(train[0]).st_mtime_ns
    assert (
        train_scaled.split_files(str(tmp_path / "book.md"))[0] == train
        and os.stat(train[0]).st_mtime_ns == before
    )


def test_articles_are_cleaned_with_their_paragraphs_kept():
    raw = "  Go\u0308l [12] ve [kaynak belirtilmeli]  <ref>x</ref> kıyı\t.\n\n\n  İkinci   satır \n"
    assert train_scaled.clean_article(raw) == "Göl ve x kıyı .\nİkinci satır"


def test_a_wikipedia_without_pyarrow_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(train_scaled, "HERE", tmp_path)
    monkeypatch.setattr(train_scaled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        train_scaled.wikipedia("tr")
    with pytest.raises(UserError, match="expected a language code"):
        train_scaled.wikipedia("../tr")


@pytest.mark.skipif(not (SHARED / "data/turkish").exists(), reason="needs ../shared/data/turkish")
def test_real_turkish_text_is_used_in_place():
    train, val, _ = train_scaled.open_data(small(data=str(SHARED / "data/turkish")))
    assert (train.total, val.total) == (9_865_239, 548_250)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(n_head=5), "D_MODEL=32 must be N_HEAD=5 times an even head width"),
        (dict(window=17), "WINDOW=17 patches do not fit SEQUENCE_LENGTH=64 bytes = 16 patches"),
        (dict(sequence_length=66), "SEQUENCE_LENGTH=66 must be a multiple of 4"),
        (dict(window=None), "WINDOW=off keeps every key"),
        (dict(warmup_iters=13), "WARMUP_ITERS=13 exceeds NUM_ITERATIONS=12"),
        (dict(delta_rule=True, mem_feature="elu"), "DELTA_RULE=1 needs keys of length 1"),
        (
            dict(mem_range=0.99),
            "MEM_INIT=log starts at a half-life of 32 patches, MEM_RANGE=0.99 allows no shorter one than 69",
        ),
    ],
)
def test_knobs_that_do_not_fit_together_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        small(**values)


def test_bad_text_and_bad_sizes_are_one_clear_error_before_training(monkeypatch, tmp_path):
    write_text(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/train.txt").touch()
    (tmp_path / "short.txt").write_bytes(b"x" * 200)
    for values, words in (
        (dict(data=tmp_path / "empty"), r"train.txt: an empty file"),
        (dict(data=tmp_path / "nothing.txt"), "no such file"),
        (dict(data=tmp_path / "short.txt"), "200 bytes|bytes of training text|validation part has"),
        (dict(sequence_length=4096, batch_size=4), "6,000 bytes of training text.*needs 16,388"),
        (dict(batch_size=4, device_batch_size=3), "DEVICE_BATCH_SIZE=3 does not divide a rank's 4"),
        (dict(init_from=tmp_path / "train.txt"), "train.txt: not weights of train_scaled.py"),
        (dict(init_from=tmp_path / "gone.pth"), "gone.pth: no such file"),
        (dict(fla=1), "FLA=1 needs the package fla-core"),
    ):
        with pytest.raises(UserError, match=words):
            run_here(monkeypatch, tmp_path, **values)
    assert not (tmp_path / "results.csv").exists() or not rows(tmp_path)


def test_the_rows_histories_are_on_the_bill_of_disk_and_memory():
    k, none = small(mem_rows=4096, memory="on", keep=3), small(mem_rows=0, keep=3)
    size = sum(t[:, :, :-1].nbytes for t in ByteMemory(4096).state(1).values())
    assert train_scaled.history_bytes(k) == size and train_scaled.history_bytes(none) == 0
    assert (
        train_scaled.disk_need(1000, k) - train_scaled.disk_need(1000, none)
        == 4 * k.batch_size * size
    )
    assert train_scaled.disk_need(
        1000, dataclasses.replace(k, carry_state=False)
    ) == train_scaled.disk_need(1000, none)
    assert train_scaled.memory_mib(1000, 64, k) > train_scaled.memory_mib(1000, 64, none)


def test_a_disk_too_small_for_the_checkpoints_is_refused(monkeypatch, tmp_path):
    usage = train_scaled.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(train_scaled.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(
        UserError, match=r"1 MiB free, KEEP=2 checkpoints need \d+ MiB; free space, lower KEEP"
    ):
        run_here(monkeypatch, tmp_path)


def test_weights_of_another_model_are_refused_and_those_of_this_one_are_taken(
    monkeypatch, tmp_path
):
    run_here(monkeypatch, tmp_path, run_id="a", num_iterations=4)
    path = tmp_path / "logs/a/best_model_scaled.pth"
    with pytest.raises(
        UserError, match=r"weights of another model \(PRESET=scaled: MEM_CONV=1, not MEM_CONV=0\)"
    ):
        run_here(monkeypatch, tmp_path, run_id="b", init_from=path, mem_conv=0)
    found = torch.load(path)
    del found["knobs"]["decoder_reads"]
    torch.save(found, tmp_path / "old.pth")
    with pytest.raises(UserError, match=r"weights of another version .*, without DECODER_READS"):
        train_scaled.load_model(tmp_path / "old.pth")
    run_here(monkeypatch, tmp_path, run_id="c", init_from=path, num_iterations=0, warmup_iters=0)
    assert losses(tmp_path, "c")[-1][1] == losses(tmp_path, "a")[-1][1]
    with pytest.raises(UserError, match="run d was started with MEM_CONV=1, not"):
        interrupt(monkeypatch, tmp_path, run_id="d")
        run_here(monkeypatch, tmp_path, run_id="d", mem_conv=0)


def interrupt(monkeypatch, folder: Path, at: int = 6, **knobs) -> None:
    """A run that is asked to stop in step `at`."""
    send = Pulse.send

    def signalled(self, step, values_n, clock):
        if step == at:
            self.w.signals.append(signal.SIGTERM)
        return send(self, step, values_n, clock)

    with monkeypatch.context() as m:
        m.setattr(Pulse, "send", signalled)
        assert run_here(m, folder, **knobs)[0] == 128 + signal.SIGTERM


# ---------------------------------------------------------------- runs


def test_a_run_learns_and_leaves_its_files(monkeypatch, tmp_path):
    code, out = run_here(
        monkeypatch, tmp_path, run_id="a", num_iterations=24, val_bytes="all", curriculum=1
    )
    folder, row = tmp_path / "logs/a", rows(tmp_path)[0]
    found = json.loads((folder / "metrics_scaled.json").read_text())
    assert code == 0 and list(found) == ["train_bpc", "val_bpc", "steps", "lr", "val_steps"]
    assert found["steps"] == list(range(2, 25, 2)) and found["val_steps"] == list(range(4, 25, 4))
    assert len(found["train_bpc"]) == len(found["lr"]) == 12 and len(found["val_bpc"]) == 6
    steps = metrics(tmp_path, "a")
    mean = np.mean([float(steps[s]["train_loss"]) for s in (11, 12)]) / math.log(2)
    assert abs(found["train_bpc"][5] - mean) < 1e-5 and found["lr"][0] == 0.01
    assert found["val_bpc"][-1] < found["val_bpc"][0] - 0.5, "it learns"
    names = sorted(p.name for p in folder.glob("*.pth"))
    assert names == [
        "best_model_scaled.pth",
        *(f"checkpoint_step_{s:04d}.pth" for s in (20, 24)),
        "last_model_scaled.pth",
    ]
    assert [steps[s]["plasticity"] for s in (1, 4, 5, 10, 11)] == [
        "0.1",
        "0.1",
        "0.5",
        "0.5",
        "0.99",
    ]
    model = train_scaled.load_model(folder / "last_model_scaled.pth")
    assert model.plasticity == torch.tensor(0.99) and not model.training and model.k.d_model == 32
    val = train_scaled.open_data(model.k)[1]
    step = train_scaled.MicroStep(model, model.k, ONE, torch.float32, print)
    loss, share = train_scaled.evaluate(step, val, 2, model.k, ONE)
    assert abs(loss - float(row["final_val_loss"])) < 1e-6 and share < 1
    assert abs(float(row["val_bits_per_char"]) - loss / math.log(2) / share) < 1e-4
    for words in (
        "precision: fp32 (auto, CPU)",
        "disk: up to",
        "half_life_patches: min:",
        "half_life_bytes_by_history:3:",
        "eta_h:",
        "val_bits_per_char:",
    ):
        assert words in out


def start_and_kill(folder: Path, run_id: str, at: int, **knobs) -> None:
    """A run of its own process, killed with SIGKILL when its log has reached step `at`."""
    p = subprocess.Popen([*command(1, "train_scaled.py"), *flags(folder, run_id=run_id, **knobs)], cwd=folder,
                         env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    end, log = time.monotonic() + 100, folder / f"logs/{run_id}.txt"
    while (
        time.monotonic() < end
        and p.poll() is None
        and not (log.exists() and f"\nstep:{at}/" in log.read_text())
    ):
        time.sleep(0.005)
    p.kill()
    assert p.wait() == -signal.SIGKILL, p.stderr.read()


@pytest.mark.parametrize("carry", [True, False])
def test_a_killed_run_resumes_bitwise(monkeypatch, tmp_path, carry):
    values = dict(num_iterations=24, carry_state=carry, dropout=0.1, sequence_length=128)
    run_here(monkeypatch, tmp_path, run_id="whole", **values)
    start_and_kill(tmp_path, "cut", 10, **values)
    assert run_here(monkeypatch, tmp_path, run_id="cut", **values)[0] == 0
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")
    a, b = (newest_state(tmp_path, r) for r in ("cut", "whole"))
    assert all(
        same_tensors(a[key], b[key])
        for key in ("model", "adam", "metrics", "best_loss", "interval")
    )
    assert (a["states"] is not None) == carry and a["step"] == 24
    same = []
    each(lambda s, t: same.append(torch.equal(s, t)) or s, a["states"] or {}, b["states"] or {})
    assert all(same) and bool(same) == carry


def test_a_window_of_one_patch_carries_no_keys_and_is_saved_and_resumed(monkeypatch, tmp_path):
    values = dict(run_id="a", window=1, memory="off")
    interrupt(monkeypatch, tmp_path, **values)
    assert run_here(monkeypatch, tmp_path, **values)[0] == 0
    assert newest_state(tmp_path, "a")["step"] == 12


def test_two_ranks_train_as_one(monkeypatch, tmp_path):
    values = dict(num_iterations=12, batch_size=4, device_batch_size=1, log_every=1)
    run_here(monkeypatch, tmp_path, run_id="one", **values)
    p = subprocess.run([*command(2, "train_scaled.py"), *flags(tmp_path, run_id="two", **values)], cwd=tmp_path,
                       env=environment(), capture_output=True, text=True, timeout=200)  # fmt: skip
    assert p.returncode == 0, p.stderr
    for i in range(2):
        a, b = (
            np.array([float(r[i] or 0) for r in losses(tmp_path, run)]) for run in ("one", "two")
        )
        assert len(a) == len(b) == 12 and np.sqrt(np.mean((a - b) ** 2)) <= 1e-3
    a, b = (newest_state(tmp_path, r)["states"] for r in ("one", "two"))
    close = []
    each(lambda s, t: close.append(torch.allclose(s.float(), t.float(), atol=1e-2)) or s, a, b)
    assert all(close), "rows' states come back in the rows' order"


def bad_loss(monkeypatch, steps: tuple[int, ...]) -> None:
    send, left = Pulse.send, list(steps)

    def sent(self, step, values_n, clock):
        if step in left:
            left.remove(step)
            values_n = values_n * float("nan")
        return send(self, step, values_n, clock)

    monkeypatch.setattr(Pulse, "send", sent)


def test_a_loss_that_is_not_finite_stops_or_rolls_back_once(monkeypatch, tmp_path):
    with monkeypatch.context() as m:
        bad_loss(m, (7,))
        code, out = run_here(m, tmp_path, run_id="stop")
    assert code == 1 and "step:7 not finite" in out and max(metrics(tmp_path, "stop")) == 6
    with monkeypatch.context() as m:
        bad_loss(m, (7,))
        code, out = run_here(m, tmp_path, run_id="back", on_nan="rollback")
    assert (
        code == 0
        and "rolled back to step:4" in out
        and "rolled_back=1" in rows(tmp_path)[1]["notes"]
    )
    rates = {s: float(r["lr"]) for s, r in metrics(tmp_path, "back").items()}
    k = small()
    assert all(
        math.isclose(
            rates[s], (1 if s <= 4 else 0.5) * k.lr * train_scaled.lr_scale(s - 1, k), rel_tol=1e-4
        )
        for s in rates
    )
    found = json.loads((tmp_path / "logs/back/metrics_scaled.json").read_text())
    assert found["steps"] == [2, 4, 6, 8, 10, 12], "what was undone is not counted twice"
    with monkeypatch.context() as m:
        bad_loss(m, (7, 9))
        assert run_here(m, tmp_path, run_id="twice", on_nan="rollback")[0] == 1


def test_an_fp16_overflow_skips_the_update_and_halves_the_scale(monkeypatch, tmp_path):
    """On a CPU the same code runs in fp16; the first factor, 65,536, overflows."""
    code, out = run_here(monkeypatch, tmp_path, run_id="a", precision="fp16", num_iterations=6)
    state = newest_state(tmp_path, "a")
    assert code == 0 and "fp16 with loss scaling" in out
    assert state["skipped"] == math.log2(2.0**16 / state["scaler"][0].item())


def test_a_compiler_that_fails_is_one_line_and_training_goes_on(monkeypatch, tmp_path):
    def broken(*args, **rest):
        raise RuntimeError("no such backend")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(plumbing, "check_compiler", lambda *args: None)
    code, out = run_here(monkeypatch, tmp_path, run_id="a", compile=1, num_iterations=2)
    assert (
        code == 0
        and "compile: failed, training goes on without it (RuntimeError: no such backend)" in out
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_memory_by_bytes_is_the_plain_one():
    memory, text_BS, (logits, h) = ByteMemory(7), repeats(2, 64), torch.randn(2, 2, 40, 256)

    def run(text_BS, logits, h, state):
        byte, age, writes = memory.read(text_BS, torch.zeros(2, dtype=torch.long), state)
        state = each(torch.clone, state)
        memory.write(state, writes)
        return memory(logits, h, byte, age), state

    state, compiled = memory.state(2), torch.compile(run, dynamic=False)
    for _ in range(2):
        (ours, state), (theirs, other) = (f(text_BS, logits, h, state) for f in (compiled, run))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(state[name], other[name]) for name in state)


def test_dry_run_shows_sizes_and_trains_nothing(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["train_scaled.py", "--dry_run", "--preset", "phase8", "--data", "nothing.txt"]
    )
    assert train_scaled.main() == 0
    out = capsys.readouterr().out
    assert "parameters:      129,302,416" in out and "tokens per step: 8,192 bytes" in out
    assert "training tokens: 409,600,000 in 50000 steps" in out and "no such file" in out
    flops = float(out.split("compute:")[1].split()[0])
    assert abs(flops / 8.7e16 - 1) < 0.05, "the fact sheet's count"


def test_rows_that_are_looked_up_cost_no_flops_and_bytes_that_are_read_do():
    flops = lambda **values: train_scaled.flops_per_byte(fresh(**values), small(**values))
    assert flops(ngram_rows=64) == flops(ngram_rows=4096) > flops(ngram_rows=0)
    more = 4 * 6 * 3 * 256 * 256 / 4  # four more steps of the GRU for each patch of four bytes
    assert flops(decoder_reads=8) - flops(decoder_reads=4) == pytest.approx(more)


# ---------------------------------------------------------------- the file itself


def test_the_trainer_can_be_read_in_one_sitting():
    tree = ast.parse((ROOT / "train_scaled.py").read_text())
    lines = {
        n.name: n.end_lineno - n.lineno + 1
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef)
    }
    assert max(lines.values()) <= 60, max(lines.items(), key=lambda kv: kv[1])


def test_every_lever_is_one_knob_between_the_seeds_block_and_the_default():
    """Each step of the way is a model that trains; so a study can change one at a time."""
    values, x = dict(VARIANTS["phase8"]), text(1, 64)
    for name, v in itertools.chain(
        dict(mem_conv=True, norm="rmsnorm", rope="window", fusion="concat").items(),
        [
            ("mem_feature mem_norm", ("l2", "rmsnorm")),
            ("mem_gate", True),
            ("mem_decay", "data"),
            ("delta_rule", True),
        ],
    ):
        values |= dict(zip(name.split(), v, strict=True)) if " " in name else {name: v}
        model = ByteLM(small(**values))
        model.init_weights(0)
        model.nll(x, x)[0].mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), name
    assert {f.name for f in dataclasses.fields(Knobs)} >= set(train_scaled.MODEL.split())
