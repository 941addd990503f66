"""Whole small runs of train_gpt.py: schedule, batch shape, precision, plans and the results row."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import ONE, knobs, losses, metrics, rows, run, run_here, write_data

import plumbing.clock
import train_gpt
from plumbing import TokenShards, UserError
from train_gpt import GPT, lr_scale, schedule_position


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
    cfg = knobs(num_iterations=n, warmup_iters=up, warmdown_iters=down)
    assert [lr_scale(step, cfg) for step in range(n + 1)] == expected


def test_no_iterations_is_one_validation_and_a_row(monkeypatch, tmp_path):
    code, out = run_here(monkeypatch, tmp_path, num_iterations=0, warmup_iters=0, warmdown_iters=0)
    assert code == 0 and out.count("val_loss:") == 1 and rows(tmp_path)[0]["steps_done"] == "0"


def test_a_time_budget_ends_the_run_and_decays_the_rate_on_time(monkeypatch, tmp_path):
    """By a clock of five milliseconds per look at it: a step of a busy machine takes any time."""
    looks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.005 * next(looks))
    monkeypatch.setattr(plumbing.clock, "time", clock)
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
    assert code == 0 and row["status"] == "finished" and float(row["train_time_ms"]) >= 1000
    assert row["notes"].startswith("N_LAYER=2") and "TIME_BUDGET_S=1.0" in row["notes"]
    assert rates[0] == 0.01 and min(rates) < 0.001 and rates == sorted(rates, reverse=True)


def test_data_that_run_out_under_a_time_budget_leave_a_run_that_can_go_on(monkeypatch, tmp_path):
    values = dict(run_id="a", time_budget_s=3600, num_iterations=30, val_every=0, save_every=0)
    code, out = run_here(monkeypatch, tmp_path, **values)
    assert code == 1 and "the data are used up: get more, or set EPOCHS_OK=1" in out
    assert rows(tmp_path)[0]["status"] == "preempted" and rows(tmp_path)[0]["steps_done"] == "33"


@pytest.mark.parametrize("micro", [1, 3, 8, 16, "auto"])
def test_the_micro_batch_changes_rounding_only(monkeypatch, tmp_path, micro):
    run_here(monkeypatch, tmp_path, run_id="a")
    run_here(monkeypatch, tmp_path, run_id="b", device_batch_size=micro)
    a, b = (np.array([float(t) for t, _ in losses(tmp_path, r)[1:]]) for r in "ab")
    assert np.sqrt(np.mean((a - b) ** 2)) <= 1e-3
    assert micro != "auto" or rows(tmp_path)[1]["device_batch_size"] == "16"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"val_tokens": 1008}, "1,000 tokens, VAL_TOKENS needs 1,009"),
        (
            {"vocab_size": 200, "input_bin": "embedded", "input_val_bin": "embedded"},
            "set VOCAB_SIZE=256",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_data_are_refused(monkeypatch, tmp_path, values, words):
    with pytest.raises(UserError, match=words):
        run_here(monkeypatch, tmp_path, **values)


def test_training_on_the_validation_shards_is_refused_by_name(monkeypatch, tmp_path):
    write_data(tmp_path)
    with pytest.raises(UserError, match=r"v_000000.bin: is training data too"):
        run_here(monkeypatch, tmp_path, input_bin=str(tmp_path / "*.bin"))


@pytest.mark.parametrize("size", [3, 5])
def test_ranks_that_do_not_divide_the_batch_train_the_same(monkeypatch, tmp_path, size):
    """16 sequences on 3 or 5 ranks: uneven shares, the same tokens, the same losses."""
    values = dict(num_iterations=20, val_every=5, save_every=0, attngate="headwise")
    run_here(monkeypatch, tmp_path, run_id="one", **values)
    done = run(size, tmp_path, run_id="many", **values)
    assert done.returncode == 0, done.stderr
    one, many = (
        np.array([float(train or val) for train, val in losses(tmp_path, run_id)])
        for run_id in ("one", "many")
    )
    assert np.sqrt(np.mean((one - many) ** 2)) <= 1e-3
    first, second = rows(tmp_path)
    assert abs(float(first["final_val_loss"]) - float(second["final_val_loss"])) < 1e-3


def test_validation_does_not_depend_on_the_micro_batch(tmp_path):
    write_data(tmp_path)
    cfg = knobs(val_tokens=16 * 37)
    model = GPT(cfg, torch.float32)
    model.init_weights(1)
    val = TokenShards(str(tmp_path / "v_*.bin"))
    found = [train_gpt.evaluate(model, val, rows, cfg, ONE) for rows in (1, 4, 16, 37, 64)]
    assert max(found) - min(found) < 1e-5 * found[0]
    x = torch.from_numpy(val.read(0, 16 * 37 + 1).astype(np.int64))
    with torch.no_grad():
        logits = model.logits(x[:-1].view(37, 16))
    assert abs(F.cross_entropy(logits.flatten(0, 1), x[1:]) - found[0]) < 1e-4


def dry_run(monkeypatch, capsys, *flags: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["train_gpt.py", "--dry_run", *flags])
    code = train_gpt.main()
    return code, capsys.readouterr().out


def test_a_dry_run_shows_sizes_and_trains_nothing(monkeypatch, tmp_path, capsys):
    write_data(tmp_path)
    flags = [f"--{k}={v}" for k, v in train_gpt_flags(tmp_path).items()]
    code, out = dry_run(monkeypatch, capsys, *flags)
    assert code == 0 and "parameters:      26,624" in out and "9,000 tokens in 2 shard(s)" in out
    assert '"attngate": "none"' in out and not (tmp_path / "logs").exists()


def train_gpt_flags(folder) -> dict[str, object]:
    from support import SMALL

    places = {"logs_folder": folder / "logs", "results_file": folder / "results.csv"}
    shards = {"input_bin": folder / "t_*.bin", "input_val_bin": folder / "v_*.bin"}
    return {**SMALL, **places, **shards}


@pytest.mark.parametrize(
    ("knob", "value", "words"),
    [
        ("input_bin", "none_*.bin", "no token shards match"),
        ("num_iterations", 40, "feed 33 steps"),
        ("val_tokens", 1008, "VAL_TOKENS needs"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(monkeypatch, tmp_path, capsys, knob, value, words):
    write_data(tmp_path)
    values = train_gpt_flags(tmp_path) | {knob: value}
    code, out = dry_run(monkeypatch, capsys, *(f"--{k}={v}" for k, v in values.items()))
    assert code == 2 and "problem:" in out and words in out
    with pytest.raises(UserError, match=words):
        run_here(monkeypatch, tmp_path, **{knob: value})


def test_target_loss_is_logged_once_with_step_and_time(monkeypatch, tmp_path):
    code, out = run_here(monkeypatch, tmp_path, target_loss=3.5, num_iterations=30, val_every=3)
    assert (
        code == 0
        and out.count("target_loss:3.5 reached_step=") == 1
        and "step:30/30 val_loss" in out
    )
    assert "reached_step=" in rows(tmp_path)[0]["notes"]


def test_both_precisions_of_a_cpu_train_to_the_same_loss_within_rounding(monkeypatch, tmp_path):
    for precision in ("bf16", "fp32"):
        run_here(monkeypatch, tmp_path, run_id=precision, precision=precision)
    first, second = (float(row["final_val_loss"]) for row in rows(tmp_path))
    assert first != second and abs(first - second) < 2e-3


def test_a_time_budget_moves_the_schedule_and_nothing_else_does():
    cfg = knobs(num_iterations=10, time_budget_s=100.0)
    assert schedule_position(3, 50.0, cfg) == 5.0
    assert schedule_position(3, 50.0, knobs(num_iterations=10)) == 3


def test_the_loss_scale_of_fp16_halves_on_overflow_and_a_bad_step_is_skipped():
    """The scaler alone, on a CPU: what train() does with it, in fp32 numbers."""
    p = torch.nn.Parameter(torch.ones(3))
    adam = train_gpt.AdamW([p], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    for gradient, moved in ((float("inf"), False), (1.0, True)):
        scaler.scale(p.sum()).backward()
        p.grad.fill_(gradient)
        scale, before = scaler.get_scale(), p.detach().clone()
        scaler.unscale_(adam)
        adam.step(0.1, p.grad.isfinite().all())
        scaler.update()
        assert torch.equal(before, p.detach()) is not moved
        assert scaler.get_scale() == (scale if moved else scale / 2)


def test_flops_count_each_product_once():
    cfg = train_gpt.Knobs()
    blocks = 12 * (4 * 768**2 + 8 * 768**2)
    assert train_gpt.flops_per_token(cfg) == 6 * (50304 * 768 + blocks) + 6 * 12 * 1024 * 768


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_twenty_compiled_steps_follow_the_cpu(monkeypatch, tmp_path):
    values = dict(num_iterations=20, warmup_iters=0, warmdown_iters=0, val_every=0)
    run_here(monkeypatch, tmp_path, run_id="cpu", **values)
    run_here(monkeypatch, tmp_path, run_id="gpu", **values, device="cuda", compile=1)
    a, b = (np.array([float(t) for t, _ in losses(tmp_path, r)]) for r in ("cpu", "gpu"))
    assert np.sqrt(np.mean((a - b) ** 2)) <= 1e-2
