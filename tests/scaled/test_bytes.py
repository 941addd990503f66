"""The byte decoder, its tables of n-grams, and the memory by bytes."""

import math

import pytest
import torch
import torch.nn.functional as F
from lib.byte_stream import Stream
from plain_scaled import byte_memory
from scaled_support import fresh, repeats, text

from train_scaled import ByteMemory


@pytest.mark.parametrize("decoder", ["original", "scaled"])
def test_the_byte_decoder_is_torchs_gru_over_what_it_reads_and_its_own_patch(decoder):
    ours = fresh(decoder=decoder, ngram_rows=0).decoder
    gru = torch.nn.GRU(512, 256, batch_first=True)
    gru.load_state_dict({f"{name}_l0": t for name, t in ours.gru.state_dict().items()})
    z, x, y = torch.randn(2, 3, 32), text(2, 3, 8), text(2, 3, 4, seed=1)
    seen = x[..., 4:] if decoder == "scaled" else torch.zeros(2, 3, 1, dtype=torch.long)
    before = torch.cat([seen, y[..., :3]], -1).flatten(0, 1)
    latent = ours.latent(z).view(6, 1, 256).expand(-1, before.size(1), -1)
    hidden, _ = gru(torch.cat([ours.embed(before), latent], -1))
    wanted = ours.out(hidden[:, -4:]).view(2, 3, 4, 256)
    assert torch.allclose(ours(z, x, y)[0], wanted, atol=1e-5)


def test_the_n_gram_tables_are_read_by_the_last_3_to_6_bytes_alone():
    """By what each byte moves, at every place of a text; the tables are the only thing that says
    anything here.
    """
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
        for parameter in (memory.escape_by_count, memory.escape_by_age, memory.log_rank_weight):
            torch.nn.init.normal_(parameter, std=0.3)
        torch.nn.init.normal_(memory.escape_by_state.weight, std=0.05)
        wanted = byte_memory(memory, s, logits[0], h[0])
        (wanted * logits[0]).sum().backward()
        gradients = [p.grad.clone() for p in memory.parameters()]
        memory.zero_grad()
        state, at, out = memory.tables.empty(1), 0, []
        for n in sizes:
            given = torch.tensor([s[at : at + n + 24]])
            part = logits[:, at : at + n], h[:, at : at + n]
            log_p, state = memory(*part, given, torch.tensor(at + 1), state)
            out.append(log_p)
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
    """An untrained model: words met once, 0 to 4,000 bytes ago, at each of the four places in a
    patch.
    """
    model, once = fresh(mem_rows=1 << 16), "Parola: kırk bir çınar ".encode()
    for gap in (0, 1, 2, 3, 4000):
        s = torch.cat([torch.tensor([list(once)]), text(1, gap), torch.tensor([list(once)])], 1)
        stream, right = Stream(model), 0
        stream.feed(s[:, : -len(once) + 9])
        for byte in once[9:]:
            right += int(stream.logits().argmax(-1)) == byte
            stream.feed(torch.tensor([[byte]]))
        assert right == len(once) - 9, gap


def test_an_escape_is_that_of_ppm_at_first_and_is_learned_by_count_and_by_age():
    memory, logits = ByteMemory(8), torch.zeros(1, 256)
    followers = torch.zeros(1, 9, 8, dtype=torch.int16)
    followers[0, 4, :4] = torch.tensor([8, 9, 8, 8])  # behind 6 bytes: 7, before it 8, 7 and 7
    age = torch.full((1, 9), 5)
    mixed = lambda: memory.mix(logits, logits, followers, age)[0].exp()
    others = lambda: 256 * mixed()[0].item()  # the share that escapes to the model
    assert others() == pytest.approx(1 / (1 + 4 / 2)), "two different ones among four"
    p = mixed() - mixed()[0]
    assert p[7].item() == pytest.approx(3 / 4 * 2 / 3) and p[8].item() == pytest.approx(1 / 6)
    with torch.no_grad():
        memory.escape_by_count[(4 * 9 + 4) * 9 + 2] += 1
        memory.escape_by_age[4 * 20 + 2] += 1  # of an age from 4 to 7
        memory.escape_by_age[4 * 20 + 3] += 1
    assert others() == pytest.approx(1 / (1 + 2 * math.exp(-2)))


@pytest.mark.parametrize("mem_rows", [0, 64])
def test_the_latent_learns_the_next_patch_by_itself_and_no_prediction_or_loss_shows_it(mem_rows):
    knobs = dict(mem_rows=mem_rows, thinking_steps=0)
    model, x, y = fresh(**knobs).train(), repeats(2, 64), repeats(2, 64, seed=1)
    # With its products with the latent at zero, the decoder teaches the trunk nothing.
    torch.nn.init.zeros_(model.decoder.latent.weight)
    y[0, 5] = -1  # teaches nothing, either
    z_BND, _ = model.trunk(x, model.empty_state(2), at_start=True)
    known = torch.where(y < 0, x.roll(-4, 1), y)
    alone = model.decoder.ahead(z_BND).unflatten(2, (4, 256)).flatten(1, 2)
    wanted = 0.3 * F.cross_entropy(alone.mT, y, ignore_index=-1, reduction="sum")
    weight = model.blocks[0].qkv.weight
    (gradient,) = torch.autograd.grad(wanted, weight)
    loss, _ = model(x, y)
    loss.sum().backward()
    torch.testing.assert_close(weight.grad, gradient)
    assert gradient.abs().max() > 1e-3
    assert torch.equal(loss.detach(), model.eval()(x, y)[0].detach())
    before = model.logits(x, known)[0]
    torch.nn.init.normal_(model.decoder.ahead.weight)
    assert torch.equal(model.logits(x, known)[0], before)


def test_a_decoder_learns_as_if_its_memory_by_bytes_were_not_there_and_the_loss_is_the_mixed_one():
    model, x, y = fresh(mem_rows=64).train(), repeats(2, 64), repeats(2, 64, seed=1)
    alone = fresh(mem_rows=0).train()  # equal weights: each part draws from a seed of its own
    loss, _ = model(x, y)
    loss_alone, _ = alone(x, y)
    loss.sum().backward()
    loss_alone.sum().backward()
    assert (loss.detach() - loss_alone.detach()).abs().max() > 0.1
    assert torch.equal(loss.detach(), model.eval()(x, y)[0].detach())
    for name, p in model.named_parameters():
        if name.startswith("byte_memory."):
            assert p.grad.abs().max() > 0, name
        else:
            torch.testing.assert_close(p.grad, alone.get_parameter(name).grad)
