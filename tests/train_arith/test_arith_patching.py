"""Activation patching on minimal pairs."""

from dataclasses import replace
from pathlib import Path

import lib_heads as heads
import numpy as np
import patch_heads
import pytest
import torch
from arith_support import ONE
from heads_support import TEXTS, is_figure, problems, save, subject, table, write

import arithmetic

pytest.importorskip("scipy")


def patch_set(s: heads.Subject) -> heads.TestSet:
    return heads.TestSet("pairs", Path("pairs"), TEXTS, problems(s.language, TEXTS), True)


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

    def by_hand(z, point):
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
    t = heads.TestSet("pairs", Path("p"), exprs, problems(s.language, exprs), True)
    x = patch_heads.make_pairs(t, [0], ONE.device)
    texts = ["".join(arithmetic.VOCABULARY[i] for i in row) for row in x.clean_PT.tolist()]
    assert texts == ["<BOS>30-(7-5)=8", "<BOS>(30-7)-5=8"]
    assert [arithmetic.VOCABULARY[i] for i in (*x.right_P, *x.wrong_P)] == ["2", "1", "1", "2"]
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
