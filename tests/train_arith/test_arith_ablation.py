"""Ablation of heads and MLPs, and the original's depth-3 table."""

import json
from pathlib import Path

import eval_ablation
import eval_ood_depth3
import lib_ablation as ablation
import lib_heads as heads
import lib_tables as tables
import numpy as np
import pytest
import torch
from heads_support import TEXTS, is_figure, problems, save, subject, table
from lib_ablation import Place
from lib_tables import holm

from plumbing import UserError

pytest.importorskip("scipy")


def test_zeroing_a_head_is_zeroing_its_columns_of_the_output_projection():
    s = subject()
    p = problems(s.language, TEXTS)
    bank = ablation.Bank(s, p, 0)
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
    s = subject()
    p = problems(s.language, TEXTS)
    hooked = heads.measure(s, p, ablation.Bank(s, p, 0).hooks(Place(1, None), "zero"))
    with torch.no_grad():
        s.model.blocks[1].mlp.fc2.weight.zero_()
        s.model.blocks[1].mlp.fc2.bias.zero_()
    np.testing.assert_allclose(hooked, heads.measure(s, p), atol=1e-5)


def test_the_mean_of_a_constant_activation_changes_nothing_and_zero_does():
    s = subject()
    p = problems(s.language, ["1+2", "(30-4)+55", "7-(8-9)", "9-10-11"])
    with (
        torch.no_grad()
    ):  # whatever comes in, every token's values are the same, and so is what a head puts out
        s.model.blocks[0].ln1.weight.zero_()
        s.model.blocks[0].ln1.bias.normal_(generator=torch.Generator().manual_seed(0))
    base, bank = heads.measure(s, p), ablation.Bank(s, p, 0)
    np.testing.assert_allclose(
        heads.measure(s, p, bank.hooks(Place(0, 0), "mean")), base, atol=1e-4
    )
    np.testing.assert_allclose(
        heads.measure(s, p, bank.hooks(Place(0, 0), "resample")), base, atol=1e-4
    )
    assert abs(heads.measure(s, p, bank.hooks(Place(0, 0), "zero")) - base)[:, 1].max() > 0.01


def test_means_are_over_real_tokens_at_one_distance_from_the_answer():
    s, exprs = subject(), ["1+2", "30-44", "(7-8)-9"]
    p = problems(s.language, exprs)
    mean, offset = ablation.Bank(s, p, 0).means(Place(1, 1))
    found: dict[int, list] = {}
    for expr in exprs:
        one = problems(s.language, [expr])
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
        donor = ablation.draw_donors(starts, np.random.default_rng(seed))
        assert (donor != np.arange(7)).all()
        assert (starts[donor[:5]] == starts[:5]).all()
        assert starts[donor[5]] == 7 and donor[6] == 5
    with pytest.raises(UserError, match="one item only"):
        ablation.draw_donors(starts[:1], np.random.default_rng(0))


def test_resampled_activations_are_the_donors_at_the_same_distance_from_the_answer():
    s, exprs = subject(), ["1+2", "3-4", "(70-8)-9"]
    p = problems(s.language, exprs)
    bank = ablation.Bank(s, p, 0)
    T = int(p.lengths_N.max()) - 1
    new = bank.replacement(Place(0, 1), "resample", np.array([2, 0]), T)
    for row, item in enumerate((2, 0)):
        donor = int(bank.donor_N[item])
        one = problems(s.language, [exprs[donor]])
        z = s.model.run_with_cache(torch.from_numpy(one.tokens_NT[:, :-1].astype(int)))[1]["z", 0][
            0, :, 1
        ]
        for t in range(int(p.lengths_N[item]) - 1):
            at = min(max(t - int(p.starts_N[item]) + int(one.starts_N[0]), 0), len(z) - 1)
            torch.testing.assert_close(new[row, t], z[at], atol=1e-5, rtol=1e-4)


def test_the_model_is_as_it_was_after_an_ablation_that_fails():
    s = subject()
    p = problems(s.language, TEXTS[:4])
    base = heads.measure(s, p)

    def breaks(x, point):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        heads.measure(
            s,
            p,
            lambda rows, T: [
                ("blocks.0.attn.hook_z", lambda x, point: x * 0),
                ("blocks.1.attn.hook_z", breaks),
            ],
        )
    assert not any(point._forward_hooks for point in s.model.points.values())
    assert np.array_equal(heads.measure(s, p), base)


def test_exact_match_of_one_pass_is_that_of_greedy_decoding(trained):
    unseen = [f"{a}-({b}+1)" for a, b in zip(range(30, 50), range(1, 21), strict=True)]
    p = problems(trained.language, TEXTS[:20] + unseen)
    one_pass = heads.measure(trained, p)[:, 0]
    assert np.array_equal(one_pass, heads.greedy_exact(trained, p))
    assert one_pass[:20].mean() == 1 and one_pass[20:].mean() < 0.5


def test_a_pair_is_right_when_both_its_items_are():
    items = np.array([[1, -1.0, 1], [1, -3.0, 0], [1, 0.0, 1], [0, -4.0, 1]])
    assert heads.units(items, True).tolist() == [[1, -2.0, 0], [0, -2.0, 1]]
    assert heads.units(items, False) is items


def test_holm_is_over_the_heads_of_one_kind_and_set_and_mlps_are_their_own_family(trained):
    t = heads.TestSet("paren", Path("x"), TEXTS, problems(trained.language, TEXTS), False)
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
    monkeypatch.setattr(tables, "write_figure", shown)
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
    out, names, write_figure = tmp_path / "out", [], tables.write_figure
    draw = lambda path, figure: (
        names.append(path.name)
        or (path.name == "heads_s1_exact.png" and write_figure(path, figure))
    )
    monkeypatch.setattr(tables, "write_figure", draw)  # one is drawn in full, for the sake of time
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
