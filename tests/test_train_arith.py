"""train_arith.py: the model against one written out here, hooks, generation, knobs and files, and runs that survive."""

import csv
import dataclasses
import importlib
import json
import math
import os
import re
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
from support import ONE, ROOT, command, environment, newest_state, same_tensors

import train_arith
from plumbing import UserError
from train_arith import (
    EOS,
    CompactTransformer,
    Data,
    Knobs,
    encode,
    generate,
    load_model,
    lr_scale,
    problems_of,
)

sys.path.insert(0, str(ROOT / "scripts"))
TINY = dict(
    d_model=16,
    num_layers=2,
    num_heads=2,
    d_ff=24,
    batch_size=16,
    num_epochs=4,
    eval_interval=1,
    warmup_steps=3,
)
TINY |= dict(save_interval=2, lr=0.01, device="cpu", log_interval=1)
EXPRS = ["1+2", "(12-34)*5", "9*(8+7)", "((6-50))", "77-8+9*10", "3*3*3", "(4+4)*(11-2)", "60-1"]


def model_of(seed: int = 1, **knobs) -> CompactTransformer:
    model = CompactTransformer(
        Knobs(**(dict(d_model=16, num_layers=3, num_heads=2, d_ff=24, dropout=0.0) | knobs))
    )
    model.init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():  # larger than the init, so that attention and norms matter
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    return model.eval()


def ids_of(exprs=tuple(EXPRS)) -> torch.Tensor:
    rows = [torch.tensor(encode(f"{e} = 7")) for e in exprs]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def write_records(folder: Path) -> dict[str, str]:
    k, rng, paths = Knobs(operators="+-"), np.random.default_rng(1), {}
    for name, count in (("train", 70), ("val", 12), ("test", 9)):
        problems, _ = train_arith.draw(k, rng, count, 4, 4)
        rows = zip(problems.exprs(k), problems.values_N.tolist(), strict=True)
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(dict(expr=e, result=v)) + "\n" for e, v in rows)
        )
        paths[f"{name}_path"] = str(folder / f"{name}.jsonl")
    return paths


def flags(folder: Path, **knobs) -> list[str]:
    files = write_records(folder) | dict(
        results_file=str(folder / "results.csv"), logs_folder=str(folder / "logs")
    )
    return [f"--{name}={value}" for name, value in (TINY | files | knobs).items()]


def run_here(monkeypatch, folder: Path, *extra: str, **knobs) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["train_arith.py", *flags(folder, **knobs), *extra])
    with redirect_stdout(StringIO()) as out:
        code = train_arith.main()
    return code, out.getvalue()


def run(nproc: int, folder: Path, **knobs) -> subprocess.CompletedProcess:
    line = [*command(nproc, "train_arith.py"), *flags(folder, **knobs)]
    return subprocess.run(
        line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200
    )


def curve(folder: Path, run_id: str) -> list[tuple[str, ...]]:
    with open(folder / "logs" / run_id / "metrics.csv") as f:
        found = {int(row["step"]): row for row in csv.DictReader(f)}
    return [
        tuple(row[c] for c in ("train_loss", "val_loss", "lr", "exact_match"))
        for _, row in sorted(found.items())
    ]


# ----------------------------------------------------------------------------
# The model


def plain_forward(model: CompactTransformer, ids: torch.Tensor) -> torch.Tensor:
    """The architecture of the fact sheet, written out head by head and position by position."""
    w, k = dict(model.named_parameters()), model.k
    D, x = k.d_model // k.num_heads, w["embed.weight"][ids]
    T, C = x.shape[1:]
    for i in range(k.num_layers):
        at = lambda name, i=i: w[f"blocks.{i}.{name}"]
        h = F.layer_norm(x, (C,), at("ln1.weight"), at("ln1.bias"), 1e-5)
        q, key, v = (h @ at("attn.qkv.weight")[j * C : (j + 1) * C].T for j in range(3))
        heads = []
        for n in range(k.num_heads):
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


@pytest.mark.parametrize("attention", ["manual", "sdpa"])
@pytest.mark.parametrize("ffn_type", ["gelu", "geglu", "swiglu"])
def test_values_and_gradients_are_those_of_the_architecture_written_out(ffn_type, attention):
    model = model_of(ffn_type=ffn_type, attention=attention)
    grads = []
    for forward in (model, lambda ids: plain_forward(model, ids)):
        model.zero_grad()
        logits = forward(ids_of())
        F.cross_entropy(logits.flatten(0, 1), ids_of().flatten()).backward()
        grads.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_parameter_counts_are_the_documented_ones():
    for name, count in (("pilot", 664_192), ("scale_10m", 10_651_776)):
        k = train_arith.read_all([], {}, str(ROOT / f"configs/{name}.yaml"), [])
        assert train_arith.count_parameters(k) == count
    pilot = CompactTransformer(Knobs())
    pilot.init_weights(0)
    assert sum(p.numel() for p in pilot.parameters()) == 664_192
    assert abs(float(pilot.blocks[0].attn.qkv.weight.detach().std()) - 0.02) < 0.001
    assert not pilot.blocks[0].mlp.fc1.bias.any() and bool((pilot.ln_final.weight == 1).all())
    assert bool((pilot.blocks[1].ln1.weight == 1).all()) and not pilot.blocks[1].ln1.bias.any()


def test_untied_weights_and_a_learned_position_table_are_trained_parameters():
    k = dict(tie_weights=False, use_rope=False)
    extra = train_arith.count_parameters(Knobs(**k)) - train_arith.count_parameters(Knobs())
    assert extra == 35 * 128 + 32 * 128
    model = model_of(**k)
    assert not torch.equal(model(ids_of(["1+2"]))[0, -1], model(ids_of(["2+1"]))[0, -1])


def test_padding_on_the_right_changes_nothing():
    model = model_of()
    ids = ids_of()
    alone = model(ids_of(["1+2"]))
    torch.testing.assert_close(model(ids)[:1, : alone.size(1)], alone, rtol=1e-5, atol=1e-6)


def test_cached_batched_generation_is_the_argmax_loop_without_a_cache():
    model = model_of()
    prompts = [encode(f"{e} = ")[:-1] for e in EXPRS]
    found = generate(model, prompts, 9, batch=3)
    for prompt, ours in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(9):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        assert ours == ids[len(prompt) :]
    assert len({len(row) for row in found}) > 1 or len(found[0]) == 9


def test_generation_stops_at_the_end_of_sequence():
    class AlwaysEnds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.p, self.calls = [], torch.nn.Parameter(torch.zeros(1)), 0

        def forward(self, ids, cache=None):
            self.calls += 1
            return F.one_hot(torch.full_like(ids, EOS), 35).float()

    model = AlwaysEnds()
    assert generate(model, [[1, 5], [1, 5, 6]], 9) == [[EOS], [EOS]] and model.calls == 2
    problems = problems_of(EXPRS, [train_arith.evaluate_expr(e) for e in EXPRS], Knobs(), 4)
    s = train_arith.summary(train_arith.score(AlwaysEnds(), problems, Knobs(), ONE))
    assert (
        s["eos_after_gold"] == 1.0
        and s["exact_match"] == 0.0
        and s["digit_accuracy"] == 0.0
        and s["ended"] == 1.0
    )


# ----------------------------------------------------------------------------
# Hooks


def test_hooks_have_transformerlens_names_and_shapes():
    model, ids = model_of(), ids_of()
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
    model, ids = model_of(), ids_of()
    before = model(ids)

    def zero_head(z, hook):
        assert hook.name == "blocks.1.attn.hook_z" and hook.layer == 1
        z[:, :, 1] = 0

    with model.hooks([("blocks.1.attn.hook_z", zero_head)]):
        written = model(ids)
    replaced = model.run_with_hooks(
        ids,
        [(lambda n: n == "blocks.1.attn.hook_z", lambda z, hook: z * torch.tensor([[1.0], [0.0]]))],
    )
    assert torch.equal(written, replaced) and not torch.allclose(written, before)
    with torch.no_grad():  # the same head cut out of the output projection
        model.blocks[1].attn.out.weight[:, 8:] = 0
    torch.testing.assert_close(model(ids), written, rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_after_an_error_and_leave_those_of_an_outer_with():
    model, ids = model_of(), ids_of()
    clean, seen = model(ids), []
    with model.hooks([("hook_embed", lambda x, hook: seen.append(hook.name))]):
        with (
            pytest.raises(ZeroDivisionError),
            model.hooks([("blocks.0.mlp.hook_post", lambda x, hook: 1 / 0)]),
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
    assert not model.taps.fns
    torch.testing.assert_close(model(ids), clean, rtol=0, atol=0)


def test_cached_activations_share_memory_with_nothing():
    model, ids = model_of(), ids_of()

    def wipe(x, hook):
        x.zero_()

    with model.hooks([("blocks.0.hook_resid_mid", wipe)]):
        _, cache = model.run_with_cache(ids)
    assert not cache["resid_mid", 0].any() and cache["resid_pre", 0].any()
    torch.testing.assert_close(cache["resid_post", 0], cache["mlp_out", 0])
    kept: list[torch.Tensor] = []
    keep = lambda x, hook: kept.append(x)
    model.run_with_hooks(
        ids, [("blocks.0.hook_resid_post", keep), ("blocks.1.hook_resid_pre", wipe)]
    )
    assert kept[0].any(), "a later hook wrote into what an earlier one was given"
    pointers = [x.untyped_storage().data_ptr() for x in cache.values()]
    assert len(set(pointers)) == len(pointers)


def test_dropout_masks_depend_on_the_row_and_not_on_the_number_of_ranks():
    model = model_of(dropout=0.5).train()
    ids = ids_of()
    torch.manual_seed(3)
    whole = model(ids, None, (0, 8))
    parts = []
    for first in (0, 4):
        torch.manual_seed(3)
        parts.append(model(ids[first : first + 4], None, (first, 8)))
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(whole[0], model.eval()(ids)[0])


# ----------------------------------------------------------------------------
# Schedules and optimizers


def test_the_schedule_starts_at_zero_and_falls_straight_to_zero():
    k = Knobs(warmup_steps=100)
    assert [lr_scale(s, k, 3150) for s in (0, 50, 99, 100, 1625, 3149, 3150)] == pytest.approx(
        [0, 0.5, 0.99, 1, 0.5, 1 / 3050, 0]
    )
    trapezoid = Knobs(schedule="trapezoid", warmup_steps=10, warmdown_frac=0.4)
    assert [lr_scale(s, trapezoid, 100) for s in (0, 5, 10, 60, 80, 100)] == pytest.approx(
        [0, 0.5, 1, 1, 0.5, 0]
    )


def test_adamw_decays_everything_with_the_betas_of_the_file():
    adam, *none = train_arith.make_optimizers(CompactTransformer(Knobs()), Knobs(betas="0.8,0.99"))
    assert not none and len(adam.param_groups) == 1 and len(adam.param_groups[0]["params"]) == 43
    assert (
        adam.param_groups[0]["betas"] == (0.8, 0.99)
        and adam.param_groups[0]["weight_decay"] == 0.01
    )


def test_muon_takes_the_blocks_matrices_and_makes_orthogonal_updates_of_adamws_size():
    model = model_of()
    adam, muon = train_arith.make_optimizers(
        model, Knobs(optimizer="muon", weight_decay=0.0, muon_lr=1.0)
    )
    assert [p.dim() for p in muon.param_groups[0]["params"]] == [2] * 12
    assert len(adam.param_groups[0]["params"]) == len(list(model.parameters())) - 12
    p, generator = model.blocks[0].attn.qkv.weight, torch.Generator().manual_seed(0)
    for q in model.parameters():
        q.grad = torch.randn(q.shape, generator=generator)
    before = p.detach().clone()
    muon.step()
    update = before - p.detach()
    spectrum = torch.linalg.svdvals(update / (0.2 * 48**0.5))
    assert 0.6 < float(spectrum.min()) and float(spectrum.max()) < 1.3
    assert float((update * p.grad).sum()) > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_whose_flag_is_down_moves_nothing(optimizer):
    model = model_of()
    k = Knobs(optimizer=optimizer)
    optimizers = train_arith.make_optimizers(model, k)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = [p.detach().clone() for p in model.parameters()]
    for value, moves in ((math.nan, False), (1.0, True)):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        assert train_arith.apply_update(optimizers, scaler, torch.tensor(moves))
        assert (
            all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            is not moves
        )
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_schedule_waits_when_the_scaler_skips():
    """The fp16 path of learn(), on the CPU: an overflow halves the scale and moves neither weights nor rate."""
    model = model_of()
    adam = train_arith.make_optimizers(model, Knobs())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    updates, scales, moved = 0, [], []
    for bad in (False, True, False, False):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.inf if bad else 1.0)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(torch.ones(()))
        scaler.unscale_(adam[0])
        train_arith.clip([p.grad for p in model.parameters()], 1.0)
        updates += train_arith.apply_update(adam, scaler, torch.tensor(True))
        scales.append(scaler.get_scale())
        moved.append(
            not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        )
    assert updates == 3 and moved == [True, False, True, True] and scales == [1024, 512, 512, 1024]


def test_clipping_is_torchs():
    model = model_of()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    wanted = [p.grad.clone() for p in model.parameters()]
    total = torch.nn.utils.get_total_norm(wanted)
    norms = train_arith.clip([p.grad for p in model.parameters()], 1.0)
    torch.testing.assert_close(norms.norm(), total)
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g / total, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------
# Knobs and files


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("model:\n  dmodel: 3", "model.dmodel is not a key; did you mean model.d_model?"),
        ("training:\n  lr: 0.1", "training.lr is not a key; did you mean training.optimizer.lr?"),
        ("model:\n  vocab_size: 40", "model.vocab_size: 40 is refused"),
        ("data:\n  use_steps: true", "data.use_steps: True is refused"),
        ("data:\n  step_masking_mode: mask_steps", "step_masking_mode: mask_steps is refused"),
        ("model:\n  d_model: wide", "D_MODEL='wide': expected a whole number >= 2"),
        ("model:\n  num_heads: 5", "D_MODEL=128 must be NUM_HEADS=5"),
        ("training:\n  optimizer:\n    betas: [0.9, 2]", "BETAS='0.9,2'"),
        ("model:\n  max_seq_len: 32\ndata:\n  max_seq_len: 64", "one knob"),
        ("model: [1]", "model is not a key"),
        ("just words", "expected sections"),
        ("a: [", "not YAML"),
    ],
)
def test_a_yaml_key_is_honoured_or_refused_in_one_line(tmp_path, yaml, words):
    (tmp_path / "c.yaml").write_text(yaml)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        train_arith.read_all([], {}, str(tmp_path / "c.yaml"), [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ("operators=+/", "OPERATORS='+/': expected some of + - *"),
        ("operand_min=50 operand_max=9", "a range from 50 to 9 is empty"),
        ("depth_min=2 depth_max=1", "DEPTH_MIN=2 is above DEPTH_MAX=1"),
        ("operands_max=6", "GRAMMAR=pilot ends at 4 operands"),
        ("grammar=trees operands_max=9 operand_max=99999", "values beyond 1e17"),
        (
            "operands_weights=1,2",
            "OPERANDS_WEIGHTS='1,2': one number >= 0 per operand count, 3 with commas",
        ),
        ("operands_weights=1,2,-1", "OPERANDS_WEIGHTS='1,2,-1'"),
        ("operands_weights=1,2,x", "OPERANDS_WEIGHTS='1,2,x'"),
        ("fp16=1 bf16=1", "FP16=1 and BF16=1 exclude each other"),
        ("fp16=1 optimizer=muon", "FP16=1 scales the loss for AdamW only"),
        ("train_path=generate", "set NUM_ITERATIONS"),
        ("train_path=generate train_examples=100 curriculum=0.5", "set NUM_ITERATIONS"),
        ("curriculum=0.5", "CURRICULUM and CURRICULUM_EXACT sort generated examples"),
        ("curriculum_exact=0.5", "CURRICULUM and CURRICULUM_EXACT sort generated examples"),
        ("train_path=generate num_iterations=9 curriculum_exact=0.5", "set ANSWER_ONLY_LOSS=1"),
        (
            "train_path=generate num_iterations=9 answer_only_loss=1 curriculum_exact=0.5 curriculum=0.5",
            "CURRICULUM and CURRICULUM_EXACT exclude each other",
        ),
        ("output_dir=runs/a run_id=b", "OUTPUT_DIR=runs/a names the run, RUN_ID=b differs"),
    ],
)
def test_knobs_that_do_not_fit_together_are_refused_in_one_line(sets, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        train_arith.read_all([], {}, "", sets.split())
    assert "\n" not in str(error.value)


def test_every_key_of_the_originals_files_reaches_its_knob():
    k = train_arith.read_all([], {}, str(ROOT / "configs/scale_10m.yaml"), [])
    assert (k.d_model, k.num_layers, k.num_heads, k.d_ff, k.batch_size, k.num_epochs) == (
        384,
        6,
        6,
        1536,
        8,
        50,
    )
    assert (k.eval_interval, k.save_interval, k.lr, k.warmup_steps, k.log_interval) == (
        2,
        5,
        1e-4,
        500,
        50,
    )
    pilot = train_arith.read_all([], {}, str(ROOT / "configs/pilot.yaml"), [])
    assert dataclasses.replace(pilot, config="") == Knobs()
    assert set(train_arith.YAML.values()) <= {f.name for f in dataclasses.fields(Knobs)}
    more = ["logging.use_wandb=true", "logging.wandb_project=x", "training.optimizer.betas=0.8,0.9"]
    k = train_arith.read_all([], {}, "", more)
    assert (k.track, k.track_project, k.betas) == ("wandb", "x", "0.8,0.9")


def test_flag_beats_environment_beats_set_beats_yaml_beats_default(tmp_path):
    text = "training:\n  batch_size: 2\n  num_epochs: 2\n  optimizer:\n    lr: 0.2\nmodel:\n  dropout: 0.2"
    (tmp_path / "c.yaml").write_text(text)
    sets = ["training.batch_size=3", "num_epochs=3", "lr=0.3"]
    env = dict(BATCH_SIZE="4", LEARNING_RATE="0.4")
    k = train_arith.read_all(["--batch_size=5"], env, str(tmp_path / "c.yaml"), sets)
    assert (k.batch_size, k.lr, k.num_epochs, k.dropout, k.seed) == (5, 0.4, 3, 0.2, 42)
    with pytest.raises(UserError, match="expected key=value"):
        train_arith.read_all([], {}, "", ["lr"])
    with pytest.raises(UserError, match="did you mean lr"):
        train_arith.read_all([], {}, "", ["lrr=3"])


def test_records_that_cannot_be_used_are_refused_by_name_and_line(tmp_path):
    paths = write_records(tmp_path)
    bad = tmp_path / "bad.jsonl"
    for text, words in (
        ('{"expr": "1+2"}\n', "bad.jsonl:1: expected"),
        ("", "no records"),
        ("x\n", "found 'x'"),
    ):
        bad.write_text(text)
        with pytest.raises(UserError, match=re.escape(words)):
            Data(Knobs(**(paths | dict(train_path=str(bad)))))
    with pytest.raises(UserError, match="generate_pilot_dataset"):
        Data(Knobs(**(paths | dict(train_path="nowhere.jsonl"))))
    with pytest.raises(UserError, match="exceed SEQUENCE_LENGTH=12 tokens"):
        Data(Knobs(**(paths | dict(sequence_length=12))))
    with pytest.raises(UserError, match="ANSWER_DIGITS=1"):
        Data(Knobs(**(paths | dict(answer_digits=1, answer_format="reversed"))))


def test_labels_cover_all_next_tokens_or_the_answer_and_its_end():
    k = Knobs()
    problems = problems_of(["1+2", "10-2"], [3, 8], k, 2)
    x, y = train_arith.inputs_and_labels(problems, False, 3)
    row = encode("1+2 = 3")
    assert x[0].tolist() == [*row[:-1], EOS][: x.shape[1]] and y[0].tolist() == [*row[1:], -100]
    assert (y[2] == -100).all() and x[2, 0] == 1
    _, y = train_arith.inputs_and_labels(problems, True, 2)
    assert [v for v in y[0].tolist() if v != -100] == [*encode("3", False), EOS]


def test_the_breakdown_counts_and_the_paren_blind_calculator_is_right_where_brackets_do_not_matter():
    k = Knobs()
    exprs = ["1+2", "(1+2)*3", "1-(2-3)", "((5+5))"]
    problems = problems_of(exprs, [train_arith.evaluate_expr(e) for e in exprs], k, 2)
    found = train_arith.breakdown(problems, np.array([1.0, 0.0, 1.0, 1.0]), k, 3)
    assert found["depth"] == {"0": [1.0, 1], "1": [0.5, 2], "2": [1.0, 1]}
    assert found["operators"] == {"*+": [0.0, 1], "+": [1.0, 2], "-": [1.0, 1]}
    assert found["baselines"] == dict(paren_blind=0.5, most_frequent=0.25)


def test_enforcement_ends_the_real_trainer_with_the_documented_words(monkeypatch):
    program = importlib.import_module("test_gpu_enforcement")
    wanted = (
        "--gpu-only",
        "--gpu-only --device cuda --fp16",
        "--device cuda --fp16",
        "--device cuda",
    )
    monkeypatch.setattr(program, "CASES", [case for case in program.CASES if case[0] in wanted])
    with redirect_stdout(StringIO()) as out:
        assert program.main() == 0, out.getvalue()
    assert out.getvalue().count("[OK]") == 4


def test_the_verifier_tells_by_its_exit_code(monkeypatch, tmp_path):
    program = importlib.import_module("verify_10m_config")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    codes = {}
    for name, *extra in (
        ("good", "--no-gpu"),
        ("no gpu",),
        ("small", "--no-gpu", "--config", str(ROOT / "configs/pilot.yaml")),
    ):
        monkeypatch.setattr(sys, "argv", ["verify", *extra])
        with redirect_stdout(StringIO()) as out:
            codes[name] = program.main()
        if name == "good":
            assert (
                "Total parameters: 10,651,776" in out.getvalue()
                and "Difference: 6.5%" in out.getvalue()
            )
    assert codes == {"good": 0, "no gpu": 3, "small": 1}


def test_no_knob_is_a_prefix_of_a_flag_of_torchruns():
    from torch.distributed.run import get_args_parser

    theirs = [option for action in get_args_parser()._actions for option in action.option_strings]
    ours = [f"--{f.name}" for f in dataclasses.fields(Knobs)] + [
        "--set",
        "--config",
        "--output-dir",
    ]
    spellings = {name.replace("_", sign) for name in ours for sign in "_-"}
    assert not [(a, b) for a in spellings for b in theirs if b.startswith(a)]


# ----------------------------------------------------------------------------
# Runs


def test_models_are_saved_every_interval_and_best_whenever_it_is_best(monkeypatch, tmp_path):
    out = tmp_path / "runs/here"
    code, text = run_here(
        monkeypatch, tmp_path, output_dir=out, num_epochs=5, eval_interval=3, save_interval=2
    )
    assert code == 0, text
    assert {p.name for p in out.glob("checkpoint_*.pt")} == {
        *(
            "checkpoint_epoch_2.pt",
            "checkpoint_epoch_4.pt",
            "checkpoint_latest.pt",
            "checkpoint_best.pt",
        )
    }
    rows = json.loads((out / "metrics/training_metrics_seed42.json").read_text())
    assert [m["epoch"] for m in rows["metrics"]] == [3, 5] and rows["best_val_epoch"] in (3, 5)
    model, k, state = load_model(out / "checkpoint_best.pt")
    assert (
        state["epoch"] == rows["best_val_epoch"]
        and k.d_model == 16
        and state["model_config"]["d_ff"] == 24
    )
    s = train_arith.summary(train_arith.score(model, Data(k).val, k, ONE))
    assert s["loss"] == pytest.approx(rows["best_val_loss"], rel=1e-6)
    for line in (
        "Vocabulary size: 35",
        "Train dataset size: 70",
        "Epoch 5/5",
        "TRAINING SUMMARY",
        "Training complete!",
    ):
        assert line in text
    assert "eos_after_gold" in text and "entropy_floor" in text and "paren_blind" in text
    assert json.loads((out / "evaluation.json").read_text())["sets"][k.test_path]["n"] == 9
    with open(tmp_path / "results.csv") as f:
        (row,) = csv.DictReader(f)
    assert (
        row["status"] == "finished"
        and row["steps_done"] == "25"
        and float(row["best_val_loss"]) > 0
    )
    with pytest.raises(UserError, match=r"complete .*choose another OUTPUT_DIR"):
        run_here(
            monkeypatch, tmp_path, output_dir=out, num_epochs=5, eval_interval=3, save_interval=2
        )


def test_answer_only_complement_with_muon_learns_one_digit_sums(monkeypatch, tmp_path):
    honest = dict(
        train_path="generate", val_path="generate", test_path="", num_iterations=250, operators="+"
    )
    honest |= dict(
        operand_min=1,
        operand_max=9,
        operands_max=2,
        depth_max=0,
        spaces=0,
        answer_only_loss=1,
        dropout=0,
    )
    honest |= dict(
        answer_format="complement",
        optimizer="muon",
        lr=0.01,
        muon_lr=0.02,
        schedule="trapezoid",
        batch_size=64,
    )
    code, text = run_here(
        monkeypatch, tmp_path, run_id="sums", val_every=0, save_every=0, val_examples=2, **honest
    )
    assert code == 0
    assert float(re.search(r"step:250/250 train_loss:([\d.]+)", text)[1]) < 0.35, "from ln 35 = 3.6"


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    """Fresh examples, a curriculum that depends on what was learnt, both optimizers, dropout."""
    knobs = dict(
        train_path="generate", val_path="generate", val_examples=1, num_iterations=90, operand_max=2
    )
    knobs |= dict(
        operators="+",
        answer_only_loss=1,
        curriculum_exact=0.3,
        answer_format="complement",
        dropout=0.1,
    )
    knobs |= dict(
        optimizer="muon", save_every=10, val_every=25, muon_lr=0.02, test_path="", batch_size=32
    )
    whole = run(1, tmp_path, run_id="whole", **knobs)
    assert whole.returncode == 0, whole.stderr
    line = [*command(1, "train_arith.py"), *flags(tmp_path, run_id="cut", **knobs)]
    process = subprocess.Popen(
        line, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    switched = int(re.search(r"curriculum: 3 operands from step (\d+)", whole.stdout)[1])
    kill_at = max(
        25, min(switched + 3, 80)
    )  # the switch is in the checkpoint, or comes after the resume
    for text in process.stdout:
        if text.startswith(f"step:{kill_at}/"):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    again = run(1, tmp_path, run_id="cut", **knobs)
    assert again.returncode == 0 and re.search(r"resumed step:[1-9]0 ", again.stdout), (
        again.stdout + again.stderr
    )
    assert curve(tmp_path, "whole") == curve(tmp_path, "cut")
    one, two = (newest_state(tmp_path, run_id) for run_id in ("whole", "cut"))
    assert one["switches"] == two["switches"] and one["switches"][0] == switched
    assert same_tensors(one["model"], two["model"])
    for ours, theirs in zip(one["optimizers"], two["optimizers"], strict=True):
        assert (
            same_tensors(ours["state"], theirs["state"])
            and ours["param_groups"] == theirs["param_groups"]
        )
    assert one["history"] == two["history"]


def test_two_ranks_train_as_one_does(tmp_path):
    knobs = dict(num_epochs=2, dropout=0.2)
    for nproc in (1, 2):
        done = run(nproc, tmp_path, run_id=f"n{nproc}", **knobs)
        assert done.returncode == 0, done.stderr
    one, two = (np.array([float(row[0]) for row in curve(tmp_path, f"n{n}")]) for n in (1, 2))
    assert len(one) == 10 and np.abs(one - two).max() < 2e-5
    vals = [[float(row[1]) for row in curve(tmp_path, f"n{n}") if row[1]] for n in (1, 2)]
    assert vals[0] == pytest.approx(vals[1], abs=2e-5) and len(vals[0]) == 2


def test_a_loss_that_is_not_finite_stops_the_run_before_its_update(monkeypatch, tmp_path):
    code, text = run_here(monkeypatch, tmp_path, run_id="bad", lr=1e30, warmup_steps=0)
    assert code == 1 and "not finite" in text
    assert json.loads((tmp_path / "logs/bad/status.json").read_text())["status"] == "nan"


def test_a_run_is_not_resumed_with_other_records_or_knobs(monkeypatch, tmp_path):
    stop = dict(run_id="r", num_epochs=4)
    real = train_arith.Run.validate

    def stop_at_once(self):
        real(self)
        self.w.signals.append(signal.SIGTERM)

    monkeypatch.setattr(train_arith.Run, "validate", stop_at_once)
    assert run_here(monkeypatch, tmp_path, **stop)[0] == 128 + signal.SIGTERM
    monkeypatch.setattr(train_arith.Run, "validate", real)
    with pytest.raises(UserError, match=re.escape("was started with LR=0.01, not 0.02")):
        run_here(monkeypatch, tmp_path, **stop, lr=0.02)
    monkeypatch.setattr(sys, "argv", ["train_arith.py", *flags(tmp_path, **stop)])
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(reversed(lines)))
    with (
        pytest.raises(UserError, match=r"other data .*another RUN_ID"),
        redirect_stdout(StringIO()),
    ):
        train_arith.main()


def test_the_pilot_configuration_starts_to_learn_within_seconds(tmp_path):
    importlib.import_module("test_arith_data").make("generate_pilot_dataset.py", tmp_path / "data")
    line = [
        *command(1, "train_arith.py"),
        "--config",
        str(ROOT / "configs/pilot.yaml"),
        "--output-dir",
        "runs/pilot",
    ]
    line += [
        "--set",
        "training.num_iterations=12",
        "--set",
        "training.optimizer.warmup_steps=4",
        "--seed",
        "42",
    ]
    line += [
        "--device",
        "cuda",
        "--results_file",
        str(tmp_path / "results.csv"),
        "--set",
        "data.test_path=",
    ]
    t0 = time.process_time()
    done = subprocess.run(
        line,
        cwd=tmp_path,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("CUDA not available, using CPU\n")
        and "parameters: 664,192" in done.stdout
    )
    loss = float(re.search(r"step:12/12 val_loss:([\d.]+)", done.stdout)[1])
    assert loss < 3.2 < math.log(35) and time.process_time() - t0 < 60
    assert (tmp_path / "runs/pilot/checkpoint_best.pt").exists() and (
        tmp_path / "runs/pilot.txt"
    ).exists()


def test_the_honest_configuration_trains_on_fresh_examples_and_scores_its_three_test_sets(tmp_path):
    sizes = [
        "--num-train",
        "0",
        "--num-val",
        "0",
        "--num-test",
        "20",
        "--minimal-pairs",
        "10",
        "--held-out",
        "--dedup",
    ]
    generator = importlib.import_module("test_arith_data")
    generator.make(
        "generate_pilot_dataset.py",
        tmp_path / "data",
        "--prefix",
        "study",
        "--operators",
        "+-",
        *sizes,
    )
    line = [
        *command(1, "train_arith.py"),
        "--config",
        str(ROOT / "configs/honest.yaml"),
        "--output-dir",
        "runs/honest",
    ]
    line += [
        "--set",
        "num_iterations=8",
        "--set",
        "val_examples=40",
        "--results_file",
        str(tmp_path / "results.csv"),
    ]
    done = subprocess.run(
        line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert (
        "parameters: 664,192" in done.stdout
        and "answer: complement_bare, up to 3 digits" in done.stdout
    )
    sets = json.loads((tmp_path / "runs/honest/evaluation.json").read_text())["sets"]
    assert {Path(name).stem: found["n"] for name, found in sets.items()} == {
        "generate": 40, "study_test_flat": 20, "study_test_paren": 20, "study_test_pairs": 20
    }  # fmt: skip
    assert all(found["exact_match"] < 0.2 and found["baselines"].keys() for found in sets.values())
    losses = [float(x) for x in re.findall(r"train_loss:([\d.]+)", done.stdout)]
    assert losses and losses[-1] < math.log(35)
