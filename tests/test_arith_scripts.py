"""What the programs that look inside an arithmetic model promise: on tiny models, untrained, constructed or overfitted.

The overfitted one knows 24 minimal pairs by heart: what it gets right and wrong is known.
"""

import csv
import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ONE, ROOT
from torch.nn import functional as F

sys.path.insert(0, str(ROOT / "scripts"))
import eval_ablation
import eval_ood_depth3
import exact_match
import generate_depth3_dataset
import generate_pilot_dataset
import lib_heads as heads
import patch_heads
import plot_arith
import probe_depth
import view_attention
from lib.stats import holm
from lib_heads import Place, Subject

import train_arith as arith
from plumbing import UserError

pytest.importorskip("scipy")
SMALL = dict(
    d_model=32,
    num_layers=2,
    num_heads=2,
    d_ff=32,
    dropout=0.0,
    train_path="generate",
    num_iterations=1,
)
SMALL |= dict(
    operators="+-",
    answer_format="complement",
    spaces=False,
    sequence_length=32,
    answer_only_loss=True,
)
DIGITS = 3
PAIRS = [(f"{a}-({b}-{c})", f"({a}-{b})-{c}") for a, b, c in
         zip(range(30, 54), [7, 12, 3, 25, 18, 4] * 4, [5, 2, 9, 11, 16, 21, 8, 3] * 3, strict=True)]  # fmt: skip
TEXTS = [text for pair in PAIRS for text in pair]


def problems(k: arith.Knobs, exprs: list[str]) -> arith.Problems:
    return arith.problems_of(exprs, [arith.evaluate_expr(e) for e in exprs], k, DIGITS)


def loud(model: arith.CompactTransformer) -> arith.CompactTransformer:
    """Untrained weights so large that every head moves the answer."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model.eval()


def subject(**knobs) -> Subject:
    k = arith.Knobs(**(SMALL | knobs))
    model = arith.CompactTransformer(k)
    model.init_weights(3)
    return Subject("tiny", Path("tiny.pt"), loud(model), k, DIGITS, ONE)


@pytest.fixture(scope="module")
def trained() -> Subject:
    """Knows the answers to TEXTS by heart."""
    s = subject()
    s.model.init_weights(3)
    x, y = (
        torch.from_numpy(a) for a in arith.inputs_and_labels(problems(s.k, TEXTS), True, len(TEXTS))
    )
    optimizer = torch.optim.AdamW(
        s.model.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.0
    )
    for _ in range(400):
        loss = F.cross_entropy(s.model(x).flatten(0, 1), y.flatten(), ignore_index=arith.IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    assert loss < 0.05
    return replace(s, model=s.model.eval())


def save(s: Subject, folder: Path) -> str:
    folder.mkdir(parents=True)
    state = dict(
        model_state_dict=s.model.state_dict(),
        answer_digits=DIGITS,
        train_config=dataclasses.asdict(s.k),
    )
    torch.save(state, folder / "checkpoint_best.pt")
    return str(folder)


def write(path: Path, exprs: list[str]) -> None:
    lines = [
        dict(expr=e, result=arith.evaluate_expr(e), depth=arith.depth_labels(e)) for e in exprs
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def data(tmp_path) -> str:
    """The prefix of small sets: what the trained model knows, and deeper expressions."""
    deep = lambda d: [
        f"{'(' * d}{a}-{b}{')' * (d - 1)}+{a % 7})"
        for a, b in zip(range(20, 40), range(5, 25), strict=True)
    ]
    sets = dict(
        flat=[e.replace("(", "").replace(")", "") for e in TEXTS[::2]], paren=TEXTS, pairs=TEXTS
    )
    for name, exprs in (sets | {f"depth{d}": deep(d) for d in (3, 4, 5)}).items():
        write(tmp_path / f"data/study_test_{name}.jsonl", exprs)
    return str(tmp_path / "data/study")


def table(path: Path) -> list[dict[str, str]]:
    with open(path) as f:
        return list(csv.DictReader(f))


def is_figure(path: Path) -> bool:
    """A PNG with more than one colour, and an SVG beside it."""
    from matplotlib.image import imread

    return np.ptp(imread(path)[..., :3]) > 0.5 and path.with_suffix(".svg").read_text().startswith(
        "<?xml"
    )


# ----------------------------------------------------------------------------
# Ablation


def test_zeroing_a_head_is_zeroing_its_columns_of_the_output_projection():
    s, p = subject(), problems(arith.Knobs(**SMALL), TEXTS)
    bank = heads.Bank(s, p, 0)
    for place in (Place(0, 1), Place(1, 0)):
        hooked = heads.measure(s, p, bank.hooks(place, "zero"))
        weight = s.model.blocks[place.layer].attn.out.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[:, 16 * place.head : 16 * place.head + 16] = 0
        by_hand = heads.measure(s, p)
        with torch.no_grad():
            weight.copy_(kept)
        np.testing.assert_allclose(hooked, by_hand, atol=1e-5)
        assert abs(hooked - heads.measure(s, p))[:, 1].max() > 0.01


def test_zeroing_an_mlp_is_zeroing_its_second_matrix_and_bias():
    s, p = subject(), problems(arith.Knobs(**SMALL), TEXTS)
    hooked = heads.measure(s, p, heads.Bank(s, p, 0).hooks(Place(1, None), "zero"))
    with torch.no_grad():
        s.model.blocks[1].mlp.fc2.weight.zero_()
        s.model.blocks[1].mlp.fc2.bias.zero_()
    np.testing.assert_allclose(hooked, heads.measure(s, p), atol=1e-5)


def test_the_mean_of_a_constant_activation_changes_nothing_and_zero_does():
    s, p = subject(), problems(arith.Knobs(**SMALL), ["1+2", "(30-4)+55", "7-(8-9)", "9-10-11"])
    with (
        torch.no_grad()
    ):  # whatever comes in, every token's values are the same, and so is what a head puts out
        s.model.blocks[0].ln1.weight.zero_()
        s.model.blocks[0].ln1.bias.normal_(generator=torch.Generator().manual_seed(0))
    base, bank = heads.measure(s, p), heads.Bank(s, p, 0)
    np.testing.assert_allclose(
        heads.measure(s, p, bank.hooks(Place(0, 0), "mean")), base, atol=1e-4
    )
    np.testing.assert_allclose(
        heads.measure(s, p, bank.hooks(Place(0, 0), "resample")), base, atol=1e-4
    )
    assert abs(heads.measure(s, p, bank.hooks(Place(0, 0), "zero")) - base)[:, 1].max() > 0.01


def test_means_are_over_real_tokens_at_one_distance_from_the_answer():
    s, exprs = subject(), ["1+2", "30-44", "(7-8)-9"]
    p = problems(s.k, exprs)
    mean, offset = heads.Bank(s, p, 0).means(Place(1, 1))
    found: dict[int, list] = {}
    for expr in exprs:
        one = problems(s.k, [expr])
        ids = torch.from_numpy(one.tokens_NT[:, :-1].astype(int))
        _, cache = s.model.run_with_cache(ids)
        for t in range(ids.size(1)):
            found.setdefault(t - int(one.starts_N[0]), []).append(cache["z", 1][0, t, 1])
    assert len(found) == len(mean)
    for r, values in found.items():
        torch.testing.assert_close(
            mean[r + offset], torch.stack(values).mean(0), atol=1e-5, rtol=1e-4
        )


def test_resampling_takes_from_other_items_of_equal_length_where_there_are_any():
    starts = np.array([5, 5, 7, 7, 7, 9, 12])
    for seed in range(20):
        donor = heads.draw_donors(starts, np.random.default_rng(seed))
        assert (donor != np.arange(7)).all()
        assert (starts[donor[:5]] == starts[:5]).all()
        assert starts[donor[5]] == 7 and donor[6] == 5
    with pytest.raises(UserError, match="one item only"):
        heads.draw_donors(starts[:1], np.random.default_rng(0))


def test_resampled_activations_are_the_donors_at_the_same_distance_from_the_answer():
    s, exprs = subject(), ["1+2", "3-4", "(70-8)-9"]
    p = problems(s.k, exprs)
    bank = heads.Bank(s, p, 0)
    T = int(p.lengths_N.max()) - 1
    new = bank.replacement(Place(0, 1), "resample", np.array([2, 0]), T)
    for row, item in enumerate((2, 0)):
        donor = int(bank.donor_N[item])
        one = problems(s.k, [exprs[donor]])
        z = s.model.run_with_cache(torch.from_numpy(one.tokens_NT[:, :-1].astype(int)))[1]["z", 0][
            0, :, 1
        ]
        for t in range(int(p.lengths_N[item]) - 1):
            at = min(max(t - int(p.starts_N[item]) + int(one.starts_N[0]), 0), len(z) - 1)
            torch.testing.assert_close(new[row, t], z[at], atol=1e-5, rtol=1e-4)


def test_the_model_is_as_it_was_after_an_ablation_that_fails():
    s, p = subject(), problems(arith.Knobs(**SMALL), TEXTS[:4])
    base = heads.measure(s, p)

    def breaks(x, hook):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        heads.measure(
            s,
            p,
            lambda rows, T: [
                ("blocks.0.attn.hook_z", lambda x, hook: x * 0),
                ("blocks.1.attn.hook_z", breaks),
            ],
        )
    assert not s.model.taps.fns
    assert np.array_equal(heads.measure(s, p), base)


def test_exact_match_of_one_pass_is_that_of_greedy_decoding(trained):
    unseen = [f"{a}-({b}+1)" for a, b in zip(range(30, 50), range(1, 21), strict=True)]
    p = problems(trained.k, TEXTS[:20] + unseen)
    one_pass = heads.measure(trained, p)[:, 0]
    assert np.array_equal(one_pass, heads.greedy_exact(trained, p))
    assert one_pass[:20].mean() == 1 and one_pass[20:].mean() < 0.5


def test_a_pair_is_right_when_both_its_items_are():
    items = np.array([[1, -1.0, 1], [1, -3.0, 0], [1, 0.0, 1], [0, -4.0, 1]])
    assert heads.units(items, True).tolist() == [[1, -2.0, 0], [0, -2.0, 1]]
    assert heads.units(items, False) is items


# ----------------------------------------------------------------------------
# Statistics


def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_units():
    from scipy.stats import binomtest

    before, after = np.ones(100), np.ones(100)
    after[:4] = 0
    assert heads.mcnemar(before, after) == (
        4,
        0,
        0.125,
    )  # the original's best head: 93 to 89 of 100
    assert heads.mcnemar(before, before) == (0, 0, 1.0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        before, after = rng.integers(0, 2, (2, 60))
        lost, gained, p = heads.mcnemar(before, after)
        assert p == pytest.approx(binomtest(lost, lost + gained).pvalue)


def test_bootstrap_intervals_are_paired_and_agree_with_scipy():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(1)
    base, noise = rng.normal(0, 5, 200), rng.normal(1, 0.5, 200)
    low, high = heads.intervals((base - (base - noise))[:, None])[:, 0]
    want = bootstrap(
        (noise,), np.mean, method="percentile", n_resamples=4000, random_state=0
    ).confidence_interval
    assert (low, high) == pytest.approx((want.low, want.high), abs=0.006)
    assert high - low < 0.2  # 1.96 * 2 * 0.5 / sqrt(200), however much the items themselves vary
    assert np.ptp(heads.intervals(np.ones((50, 1)))) == pytest.approx(0, abs=1e-12)


def test_wilson_intervals_of_no_and_of_one_in_a_hundred():
    assert heads.wilson(0, 100) == pytest.approx((0, 0.037), abs=5e-4)
    assert heads.wilson(1, 100) == pytest.approx((0.002, 0.054), abs=5e-4)


def test_concordance_is_one_for_equal_rankings_and_friedmans_otherwise():
    from scipy.stats import friedmanchisquare

    w = lambda x: float(eval_ablation.concordance(eval_ablation.ranked(x[:, None])[:, 0]))
    assert w(np.array([[1.0, 5, 2, 9], [10, 50, 20, 90], [-4, 0, -1, 3]])) == pytest.approx(1)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, (5, 8)).astype(float)  # with ties
    assert w(x) == pytest.approx(friedmanchisquare(*x.T).statistic / (5 * 7))


def test_seeds_that_agree_about_layers_only_are_told_from_ones_that_agree_about_heads():
    rng = np.random.default_rng(0)
    layers = np.array([5.0, 3, 1])[None, :, None] + rng.normal(0, 0.3, (5, 3, 4))
    both = layers + np.array([0, 0.5, 1, 1.5]) * 2
    p = lambda x, within: eval_ablation.shuffled_p(eval_ablation.ranked(x), within, draws=500)
    assert p(layers, False) < 0.02 and p(layers, True) > 0.05
    assert p(both, True) < 0.02


# ----------------------------------------------------------------------------
# eval_ablation.py and eval_ood_depth3.py


def test_holm_is_over_the_heads_of_one_kind_and_set_and_mlps_are_their_own_family(trained):
    t = heads.TestSet("paren", Path("x"), TEXTS, problems(trained.k, TEXTS), False)
    r = eval_ablation.ablate(trained, t, ("zero", "mean"), True, False, 0)
    rows = eval_ablation.rows_of(r, ("zero", "mean"))
    assert len(rows) == 2 * (4 + 2)
    for kind in ("zero", "mean"):
        for family in (
            [x for x in rows if x["kind"] == kind and (x["head"] == "MLP") == mlp]
            for mlp in (True, False)
        ):
            assert [x["holm_p"] for x in family] == holm([x["mcnemar_p"] for x in family])
    for x in rows:
        assert x["exact_drop"] == pytest.approx((x["lost"] - x["gained"]) / len(TEXTS))
        assert x["exact_low"] <= x["exact_drop"] <= x["exact_high"]


def test_below_the_gate_no_head_is_named_and_nothing_is_ablated(tmp_path, data, capsys):
    run = save(subject(), tmp_path / "runs/tiny")
    argv = ["--checkpoint", run, "--data", data, "--sets", "paren", "--out", str(tmp_path / "out")]
    assert eval_ablation.main(argv) == 1
    said = capsys.readouterr().out
    assert "below the competence gate of 50%: no head is named" in said and "L0-H" not in said
    assert not list((tmp_path / "out").glob("*.csv")) and not list((tmp_path / "out").glob("*.png"))
    found = json.loads((tmp_path / "out/ablation.json").read_text())
    assert (
        found["named"] == []
        and not found["baselines"][0]["competent"]
        and not found["baselines"][0]["ablated"]
    )


def test_allowed_below_the_gate_every_output_says_so(tmp_path, data, capsys, monkeypatch):
    run, titles = save(subject(), tmp_path / "runs/tiny"), []
    shown = lambda path, figure: titles.extend(a.get_title() for a in figure.axes)
    monkeypatch.setattr(heads, "write_figure", shown)
    argv = [
        "--checkpoint",
        run,
        "--data",
        data,
        "--sets",
        "paren",
        "--kinds",
        "zero",
        "--out",
        str(tmp_path / "out"),
    ]
    assert eval_ablation.main([*argv, "--allow-incompetent"]) == 0
    assert "BELOW THE COMPETENCE GATE" in capsys.readouterr().out
    assert {row["competent"] for row in table(tmp_path / "out/ablation.csv")} == {"0"}
    assert any("BELOW THE GATE" in title for title in titles)


def test_ablation_of_two_seeds_writes_its_tables_agreement_and_maps(
    tmp_path, data, trained, monkeypatch
):
    runs = [save(trained, tmp_path / f"runs/s{i}") for i in (1, 2)]
    out, names, write_figure = tmp_path / "out", [], heads.write_figure
    draw = lambda path, figure: (
        names.append(path.name)
        or (path.name == "heads_s1_exact.png" and write_figure(path, figure))
    )
    monkeypatch.setattr(heads, "write_figure", draw)  # one is drawn in full, for the sake of time
    argv = [
        "--checkpoint",
        *runs,
        "--data",
        data,
        "--sets",
        "paren",
        "pairs",
        "--kinds",
        "zero",
        "--limit",
        "12",
    ]
    assert eval_ablation.main([*argv, "--out", str(out)]) == 0
    rows = table(out / "ablation.csv")
    assert len(rows) == 2 * 2 * 6 and {row["competent"] for row in rows} == {"1"}
    assert [row["units"] for row in rows if row["set"] == "pairs"] == ["12"] * 12
    found = json.loads((out / "ablation.json").read_text())
    agreed = next(r for r in found["agreement"] if r["metric"] == "logprob")
    assert agreed["kendall_tau"] == pytest.approx(1) and agreed["kendall_w"] == pytest.approx(
        1
    )  # one model, twice
    assert table(out / "seeds.csv")[0]["logprob_mlp_sd"] == "0"
    assert names == [
        f"heads_{s}_{metric}.png" for s in ("s1", "s2") for metric in ("exact", "logprob", "eos")
    ]
    assert is_figure(out / "heads_s1_exact.png")


def test_the_original_table_stands_beside_answers_and_what_needs_no_model(
    tmp_path, data, trained, capsys
):
    run, out = save(trained, tmp_path / "runs/s"), tmp_path / "out"
    argv = [
        "--checkpoint",
        run,
        "--data",
        data,
        "--sets",
        "paren",
        "--layer",
        "1",
        "--head",
        "0",
        "--out",
        str(out),
    ]
    assert eval_ood_depth3.main(argv) == 0
    rows = {(row["metric"], row["kind"]): row for row in table(out / "ood.csv")}
    assert float(rows["exact", "zero"]["baseline"]) == 1
    known = json.loads((out / "ood.json").read_text())["without_a_model"]["paren"]
    assert known["always_end"] == dict(exact=0.0, eos=1.0)
    assert (
        known["paren_blind"]["exact"] == 0.5
    )  # of each pair one, (a-b)-c, is what it is without brackets
    assert "L1-H0 zeroed" in capsys.readouterr().out and is_figure(out / "ood.png")
    with pytest.raises(UserError, match="L7-H0: s has layers 0 to 1"):
        eval_ood_depth3.main(["--checkpoint", run, "--data", data, "--layer", "7", "--head", "0"])


# ----------------------------------------------------------------------------
# patch_heads.py


def patch_set(s: Subject) -> heads.TestSet:
    return heads.TestSet("pairs", Path("pairs"), TEXTS, problems(s.k, TEXTS), True)


def test_patching_a_text_into_itself_changes_nothing_and_all_of_the_stream_recovers_everything():
    s = subject()
    x = patch_heads.make_pairs(patch_set(s), range(6), ONE.device)
    clean, ends = (
        patch_heads.clean_run(s, x),
        [patch_heads.logit_difference(s, t, x) for t in (x.clean_PT, x.corrupt_PT)],
    )
    everywhere = patch_heads.masks(x)["all"]
    itself = replace(x, corrupt_PT=x.clean_PT)
    for site in patch_heads.sites(s):
        np.testing.assert_allclose(
            patch_heads.patched(s, itself, clean, site, everywhere), ends[0], atol=1e-4
        )
        nowhere = patch_heads.patched(s, x, clean, site, torch.zeros_like(everywhere))
        np.testing.assert_allclose(nowhere, ends[1], atol=1e-4)
    for site in patch_heads.sites(s)[:3]:  # the stream before either block, and behind the last
        value, low, high = patch_heads.recovery(
            patch_heads.patched(s, x, clean, site, everywhere), *ends
        )
        assert (value, low, high) == pytest.approx((1, 1, 1), abs=1e-3)


def test_patching_one_head_at_one_place_is_what_a_hook_by_hand_does():
    s = subject()
    x = patch_heads.make_pairs(patch_set(s), range(4), ONE.device)
    clean, mask = patch_heads.clean_run(s, x), patch_heads.masks(x)["span"]
    site = patch_heads.Site("blocks.0.attn.hook_z", 1)
    source = s.model.run_with_cache(x.clean_PT)[1]["z", 0]

    def by_hand(z, hook):
        return torch.stack(
            [z[:, :, 0], torch.where(mask[..., None], source[:, :, 1], z[:, :, 1])], 2
        )

    logits = s.model.run_with_hooks(x.corrupt_PT, [("blocks.0.attn.hook_z", by_hand)]).detach()
    want = [
        logits[i, x.read_P[i], x.right_P[i]] - logits[i, x.read_P[i], x.wrong_P[i]]
        for i in range(len(x))
    ]
    np.testing.assert_allclose(
        patch_heads.patched(s, x, clean, site, mask), torch.stack(want).numpy(), atol=1e-4
    )


def test_pairs_read_the_first_answer_token_that_differs_and_places_split_the_prompt():
    s = subject()
    exprs = [
        "30-(7-5)",
        "(30-7)-5",
    ]  # 28 and 18: the first digit written, the last of the number, is shared
    t = heads.TestSet("pairs", Path("p"), exprs, problems(s.k, exprs), True)
    x = patch_heads.make_pairs(t, [0], ONE.device)
    texts = ["".join(arith.VOCABULARY[i] for i in row) for row in x.clean_PT.tolist()]
    assert texts == ["<BOS>30-(7-5)=8", "<BOS>(30-7)-5=8"]
    assert [arith.VOCABULARY[i] for i in (*x.right_P, *x.wrong_P)] == ["2", "1", "1", "2"]
    where = {
        name: "".join("01"[v] for v in m[0].tolist()) for name, m in patch_heads.masks(x).items()
    }
    #                       ^30-(7-5)=8
    assert where == dict(
        all="11111111111",
        before="10000000000",
        span="01111111100",
        after="00000000010",
        read="00000000001",
    )
    assert torch.equal(x.clean_PT[0], x.corrupt_PT[1]) and torch.equal(
        x.clean_PT[1], x.corrupt_PT[0]
    )


def test_patching_writes_its_tables_and_maps_and_uses_pairs_that_are_right(
    tmp_path, data, trained, capsys
):
    run, out = save(trained, tmp_path / "runs/s"), tmp_path / "out"
    unknown = ["60-(59-57)", "(60-59)-57", "98-(65-87)", "(98-65)-87"]
    write(Path(f"{data}_test_pairs.jsonl"), unknown + TEXTS)
    assert (
        patch_heads.main(["--checkpoint", run, "--data", data, "--limit", "10", "--out", str(out)])
        == 0
    )
    assert "8 of 10 pairs are used, both answers right" in capsys.readouterr().out
    rows = {(row["site"], row["place"]): float(row["recovery"]) for row in table(out / "patch.csv")}
    assert rows["L0.resid_pre", "all"] == pytest.approx(1, abs=1e-3)
    assert rows["L1.resid_post", "read"] == pytest.approx(1, abs=1e-3)
    assert rows["L1.resid_post", "span"] == pytest.approx(
        0, abs=1e-3
    )  # behind the last block nothing moves any more
    tokens = [row["clean_token"] for row in table(out / "positions.csv") if row["site"] == "L0-H0"]
    assert "".join(tokens[:4]) in ("^3d-", "^(3d") and all(
        is_figure(path) for path in out.glob("*.png")
    )
    run = save(subject(), tmp_path / "runs/untrained")
    assert (
        patch_heads.main(["--checkpoint", run, "--data", data, "--out", str(tmp_path / "no")]) == 1
    )
    assert sorted(path.name for path in (tmp_path / "no").iterdir()) == ["patch.json"]


# ----------------------------------------------------------------------------
# probe_depth.py


def need_sklearn() -> None:
    pytest.importorskip("sklearn")


def test_a_probe_finds_a_planted_direction_and_nothing_in_noise():
    need_sklearn()
    rng = np.random.default_rng(0)
    y, direction = rng.integers(0, 3, 3000), rng.normal(size=16)
    x = rng.normal(0, 0.1, (3000, 16)) + y[:, None] * direction
    for scale in (True, False):
        probe = probe_depth.Probe(x[:2000], y[:2000], scale)
        assert probe_depth.balanced_accuracy(probe(x[2000:]), y[2000:]) == 1 and probe.converged
    drawn = rng.integers(0, 3, 3000)
    probe = probe_depth.Probe(x[:2000], drawn[:2000], True)
    assert probe_depth.balanced_accuracy(probe(x[2000:]), drawn[2000:]) == pytest.approx(
        1 / 3, abs=0.04
    )
    assert probe_depth.rank_correlation(x[:2000], y[:2000], x[2000:], y[2000:]) > 0.9


def test_balanced_accuracy_is_the_mean_over_labels_whatever_their_number():
    label = np.array([0] * 90 + [1] * 10)
    assert probe_depth.balanced_accuracy(np.zeros(100), label) == 0.5
    assert (
        probe_depth.balanced_accuracy(np.r_[np.zeros(90), np.ones(5), np.zeros(5)], label) == 0.75
    )


def test_no_expression_and_no_other_grouping_of_it_is_on_two_sides():
    exprs = [f"({a}-{b})-{c}" for a in range(1, 12) for b in range(1, 6) for c in (1, 2)]
    exprs += [f"{a}-({b}-{c})" for a in range(1, 12) for b in range(1, 6) for c in (1, 2)]
    parts = probe_depth.split_by_expression(exprs, 0)
    keys = [{e.replace("(", "").replace(")", "") for e in part} for part in parts]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert sum(map(len, parts)) == len(exprs)
    assert [len(part) / len(exprs) for part in parts] == pytest.approx([0.6, 0.2, 0.2], abs=0.01)


def test_random_labels_are_a_function_of_the_kind_of_character_and_as_frequent_as_asked():
    c = probe_depth.chars_of(TEXTS * 3)
    labels = probe_depth.random_labels(c, np.array([0.2, 0.5, 0.3]), 1)
    kinds: dict[tuple, set] = {}
    for kind, label in zip(
        zip(c.previous_N, c.char_N, c.position_N, strict=True), labels, strict=True
    ):
        kinds.setdefault(kind, set()).add(int(label))
    assert all(len(found) == 1 for found in kinds.values())
    other = probe_depth.chars_of(TEXTS[5:9])  # the same kinds in another split have the same labels
    for kind, label in zip(zip(other.previous_N, other.char_N, other.position_N, strict=True),
                           probe_depth.random_labels(other, np.array([0.2, 0.5, 0.3]), 1), strict=True):  # fmt: skip
        assert kinds[kind] == {int(label)}
    many = probe_depth.Chars(
        [],
        np.arange(30000) % 35,
        np.arange(30000) // 35 % 35,
        np.arange(30000) // 1225,
        np.zeros(1),
    )
    shares = np.bincount(probe_depth.random_labels(many, np.array([0.2, 0.5, 0.3]), 1)) / 30000
    assert shares == pytest.approx([0.2, 0.5, 0.3], abs=0.02)


def test_features_of_a_character_are_its_own_position_in_its_own_text():
    s, exprs = subject(), ["(12-3)+4", "5-(6-7)", "8-9"]
    x = probe_depth.activations(s.model, s.k, exprs, ONE.device, batch=2)
    assert len(x) == 2 + 4
    for site, values in x.items():
        kind, layer, head = site
        assert len(values) == sum(map(len, exprs))
        ids = torch.tensor([arith.encode(exprs[1])])
        cache = s.model.run_with_cache(ids)[1]
        want = (
            cache["resid_post", layer][0] if kind == "resid" else cache["z", layer][0, :, head]
        ).detach()
        at = len(exprs[0])
        np.testing.assert_allclose(values[at : at + 7], want[1:8].numpy(), atol=1e-5)
    c = probe_depth.chars_of(exprs)
    assert c.depth_N[:8].tolist() == [1, 1, 1, 1, 1, 0, 0, 0] and c.previous_N[8] == arith.BOS
    wide = probe_depth.one_hot(c, "character+position+previous character", 5)
    assert wide.shape == (18, 35 + 5 + 35) and set(wide.sum(1)) == {
        2.0,
        3.0,
    }  # a position from 5 on has no column


def test_the_originals_set_up_has_its_sizes_majority_and_table_without_a_network(
    tmp_path, monkeypatch
):
    need_sklearn()
    monkeypatch.setattr(sys, "argv", ["generate_pilot_dataset.py", "--output-dir", str(tmp_path)])
    assert generate_pilot_dataset.main() == 0
    a = probe_depth.arguments(
        ["--checkpoint", "x", "--original", "--data", str(tmp_path / "pilot")]
    )
    split = probe_depth.make_split(subject(), a)
    assert (len(split.fit.char_N), len(split.test.char_N)) == (15147, 1125)
    row = probe_depth.majority_rows(split, True)[0]
    assert (row["fit_accuracy"], row["test_accuracy"]) == pytest.approx((0.7887, 0.7716), abs=1e-4)
    x = {
        name: probe_depth.one_hot(c, probe_depth.FEATURES[-1], 17)
        for name, c in split.parts.items()
    }
    (row,) = probe_depth.probe_rows(x, split, True, {}, False)
    assert row["test_accuracy"] == pytest.approx(
        0.896, abs=1e-3
    )  # no network at all: above the original's head, 0.8916


def test_probing_writes_controls_and_the_choice_of_dev_in_one_table_and_figures(
    tmp_path, data, trained, capsys
):
    need_sklearn()
    run, out = save(trained, tmp_path / "runs/s"), tmp_path / "out"
    argv = ["--checkpoint", run, "--data", data, "--untrained", "2", "--out", str(out)]
    assert probe_depth.main(argv) == 0
    rows = table(out / "probe.csv")
    assert {row["network"] for row in rows} == {"none", "trained", "untrained 0", "untrained 1"}
    mine = [
        row
        for row in rows
        if row["task"] == "depth>0" and row["network"] == "trained" and row["kind"] == "head"
    ]
    (best,) = [row for row in mine if row["chosen"] == "1"]
    assert float(best["dev_balanced"]) == max(float(row["dev_balanced"]) for row in mine)
    for row in mine:
        assert float(row["selectivity"]) == pytest.approx(
            float(row["test_balanced"]) - float(row["random_labels_balanced"]), abs=1e-5
        )
    assert {"depth3_balanced", "depth5_spearman", "depth4_no_brackets_balanced"} <= set(
        rows[0]
    ) | set(rows[-1])
    assert is_figure(out / "layers.png") and is_figure(out / "transfer.png")
    assert "untrained" in capsys.readouterr().out


# ----------------------------------------------------------------------------
# view_attention.py, and errors


def test_the_attention_viewer_shows_rows_that_sum_to_one_and_never_look_ahead(
    tmp_path, trained, capsys
):
    run, out = save(trained, tmp_path / "runs/s"), tmp_path / "out"
    assert view_attention.main(["--checkpoint", run, "--expr", TEXTS[0], "--out", str(out)]) == 0
    found = json.loads((out / "attention.json").read_text())
    patterns = np.array(found["patterns"])
    T = len(found["tokens"])
    assert (
        patterns.shape == (2, 2, T, T)
        and found["tokens"][:3] == ["^", "3", "0"]
        and found["tokens"][-1] == "$"
    )
    np.testing.assert_allclose(patterns.sum(-1), 1, atol=2e-3)
    assert np.triu(patterns, 1).max() == 0
    assert "the model says 28, right" in capsys.readouterr().out and is_figure(
        out / "attention.png"
    )


PILOT, DEPTH3 = (
    f"make it with: python scripts/generate_{name}_dataset.py --prefix study"
    for name in ("pilot", "depth3")
)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["view_attention", "--expr", "12 + 3"], "--expr '12 \\+ 3': not an arithmetic expression"),
        (["view_attention", "--expr", "1+2", "--layer", "9"], "--layer 9: s has layers 0 to 1"),
        (["view_attention", "--expr", "99999+1"], "answers up to 100,000, but s writes 3 digits"),
        (["eval_ablation"], PILOT),
        (["eval_ood_depth3", "--layer", "1", "--head", "1"], DEPTH3),
        (["patch_heads"], PILOT),
        (["probe_depth"], PILOT),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_with_the_way_out(tmp_path, argv, words):
    run, program = save(subject(), tmp_path / "runs/s"), globals()[argv[0]]
    more = [] if argv[0] == "view_attention" else ["--data", str(tmp_path / "study")]
    with pytest.raises(UserError, match=words):
        program.main(["--checkpoint", run, *more, *argv[1:]])
    with pytest.raises(UserError, match="no such checkpoint"):
        program.main(["--checkpoint", str(tmp_path / "nothing"), *more, *argv[1:]])


def test_the_commands_that_errors_name_are_ones_the_generators_take(tmp_path, monkeypatch):
    k = arith.Knobs(**SMALL)
    for prefix, name in (
        ("study", "pairs"),
        ("study", "depth4_control"),
        ("pilot", "flat"),
        ("pilot", "depth3"),
    ):
        words = heads.how_to_make(tmp_path / prefix, name, k).replace("'", "").split()
        monkeypatch.setattr(sys, "argv", words[1:])
        program = generate_depth3_dataset if "depth3" in words[1] else generate_pilot_dataset
        assert words[1] == f"scripts/{program.__name__}.py"
        a = program.arguments()
        assert a.prefix == prefix and a.output_dir == tmp_path
        assert prefix == "pilot" or (a.operators == "+-" and a.held_out)


# ----------------------------------------------------------------------------
# Fall-off and curves


def test_exact_match_counts_what_the_model_gets_right_and_names_the_baselines(
    trained, data, tmp_path, capsys
):
    line = [
        "--checkpoint",
        save(trained, tmp_path / "runs/one"),
        "--data",
        data,
        "--sets",
        "paren",
        "depth3",
    ]
    assert (
        exact_match.main(
            [
                *line,
                "--operands",
                "3",
                "--digits",
                "1",
                "--items",
                "40",
                "--out",
                str(tmp_path / "o"),
            ]
        )
        == 0
    )
    rows = {(r["sweep"], r["cell"]): r for r in table(tmp_path / "o/exact_match.csv")}
    known = rows["sets", "paren"]
    assert (
        float(known["exact"])
        == heads.measure(trained, problems(trained.k, TEXTS))[:, 0].mean()
        > 0.9
    )
    assert float(known["paren_blind"]) == 0.5, (
        "of each pair, (a-b)-c is what a-b-c is without its brackets"
    )
    assert (
        float(rows["operands", "3"]["exact"]) < 0.5 < float(known["low"]) <= float(known["exact"])
    )
    assert {cell for sweep, cell in rows if sweep == "cells"} >= {
        "2 operands, depth 0",
        "4 operands, depth 2",
    }
    assert (
        is_figure(tmp_path / "o/exact_match.png")
        and "one sets paren: n:48" in capsys.readouterr().out
    )


def test_exact_match_draws_the_same_held_out_expressions_for_every_model():
    seen = [
        exact_match.drawn(s, 30, operands_min=3, operands_max=3)[0].exprs(s.k)
        for s in (subject(), subject(seed=9, operands_weights="1,2,3"))
    ]
    assert seen[0] == seen[1] and {arith.hash_expr(e) % arith.BUCKETS for e in seen[0]} == {
        arith.TEST
    }


def test_values_that_the_answer_format_cannot_write_are_left_out_and_counted(
    data, tmp_path, capsys
):
    s = subject(answer_format="complement_bare")
    found, left_out = exact_match.drawn(
        s, 60, operands_min=4, operands_max=4, operand_min=100, operand_max=999
    )
    assert len(found) + left_out == 60 and 0 < left_out < 60 and abs(found.values_N).max() < 500
    write(Path(f"{data}_test_flat.jsonl"), ["250+250", "99+400", "1-2"])
    kept = heads.read_set(s, Path(data), "flat")
    assert kept.exprs == ["99+400", "1-2"] and kept.left_out == 1
    assert "1 of 3 records left out: tiny writes 3 digits" in capsys.readouterr().out
    write(Path(f"{data}_test_pairs.jsonl"), ["250+(251-1)", "(250+251)-1", "9-(8-7)", "(9-8)-7"])
    assert heads.read_set(s, Path(data), "pairs").exprs == ["9-(8-7)", "(9-8)-7"], (
        "a pair goes as a whole"
    )


def test_exact_match_refuses_a_cell_with_too_few_expressions(trained, data, tmp_path):
    line = ["--checkpoint", save(trained, tmp_path / "runs/one"), "--data", data, "--sets", "paren"]
    with pytest.raises(
        UserError, match=r"--items 2000 at .*only \d+ of 2000 different test expressions"
    ):
        exact_match.main(
            [*line, "--operands", "2", "--items", "2000", "--out", str(tmp_path / "o")]
        )


def run_folder(tmp_path: Path, name: str, exact: float, seed: int = 1, **row: str) -> None:
    """A finished run with validations after 10 and 20 steps, and its line in results.csv."""
    folder, results = tmp_path / "logs" / name, tmp_path / "results.csv"
    folder.mkdir(parents=True)
    lines = [
        "step,val_loss,train_time_s,exact_match,train_exact",
        "10,1.0,1,0.1,0.2",
        "20,0.5,2,,0.9",
    ]
    (folder / "metrics.csv").write_text("\n".join([*lines, f"20,0.5,2,{exact},", ""]))
    (folder / "evaluation.json").write_text(json.dumps(dict(sets=dict(generate=dict(n=100)))))
    fields = (
        dict(run_id=name, seed=str(seed), answer_format="plain", train_examples="0", batch_size="8")
        | row
    )
    fields |= dict(status="finished", stage="s", final_val_loss="0.5", exact_match=str(exact))
    with open(results, "a", newline="") as f:
        writer = csv.DictWriter(f, arith.RESULTS, restval="")
        if f.tell() == 0:
            writer.writeheader()
        writer.writerow(fields)


def test_curves_show_a_runs_last_exact_match_with_its_interval_and_examples_seen(tmp_path, capsys):
    run_folder(tmp_path, "a", 0.5)
    run_folder(tmp_path, "b", 0.75, answer_format="reversed")
    line = [
        "--results",
        str(tmp_path / "results.csv"),
        "--logs-folder",
        str(tmp_path / "logs"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert plot_arith.main(["--stage", "s", *line]) == 0
    a, b = table(tmp_path / "o/runs.csv")
    assert (a["configuration"], b["configuration"]) == (
        "answer format plain",
        "answer format reversed",
    )
    assert (float(a["exact_match"]), float(b["exact_match"])) == (0.5, 0.75) and a[
        "examples_seen"
    ] == "160"
    assert [round(float(a[key]), 3) for key in ("low", "high")] == [0.404, 0.596]
    assert is_figure(tmp_path / "o/learning.png") and not (tmp_path / "o/examples.png").exists()
    assert (
        "answer format reversed, seed 1: exact match 0.750 [0.657, 0.825] of 100 after 160 examples"
        in capsys.readouterr().out
    )


def test_runs_that_differ_in_training_examples_alone_make_a_scaling_curve(tmp_path):
    for name, n, exact in (("a", "1000", 0.1), ("b", "0", 0.9), ("c", "10000", 0.5)):
        run_folder(tmp_path, name, exact, train_examples=n)
    run_folder(tmp_path, "other", 0.3, train_examples="10", answer_format="reversed")
    rows = plot_arith.rows_wanted(
        plot_arith.arguments(["--stage", "s", "--results", str(tmp_path / "results.csv")])
    )
    runs = [
        plot_arith.read_run(r, l, tmp_path / "logs")
        for r, l in zip(rows, plot_arith.labels_of(rows), strict=True)
    ]
    (group,) = plot_arith.by_examples(runs)
    assert [run.row["run_id"] for run in group] == ["a", "c", "b"] and [
        run.exact[-1] for run in group
    ] == [0.1, 0.5, 0.9]


def test_curves_of_no_such_run_are_refused_with_what_there_is(tmp_path):
    run_folder(tmp_path, "a", 0.5)
    with pytest.raises(UserError, match="no finished run with run_id zz; it has a"):
        plot_arith.main(["--run", "zz", "--results", str(tmp_path / "results.csv")])
