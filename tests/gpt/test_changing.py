"""docs/changing.md: each walk, applied to a copy of the trainer, trains."""

import re

import forked
import pytest
from support import ROOT, environment, flags, rows

TEXT = (ROOT / "docs/changing.md").read_text()
WALKS = dict(re.findall(r"^## (.*?)$.*?^```diff\n(.*?)^```", TEXT, re.M | re.S))
KNOBS = {
    "A new gate activation": {"gateact": "tanh", "attngate": "headwise"},
    "A new gate position": {"gatepos": "key_and_value", "attngate": "headwise"},
    "A new optimizer": {},
}


def apply_diff(source: str, diff: str) -> str:
    """Replace each hunk's old lines, which must stand in the source once, by its new ones."""
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -") + "\n"
        new = "\n".join(line[1:] for line in lines if line[0] in " +") + "\n"
        assert source.count(old) == 1, f"not in train_gpt.py, or more than once:\n{old}"
        source = source.replace(old, new)
    return source


def test_the_document_has_these_walks():
    assert list(WALKS) == list(KNOBS)


@pytest.mark.parametrize("walk", KNOBS)
def test_a_walk_is_the_whole_change_that_it_takes(tmp_path, walk):
    changed = apply_diff((ROOT / "train_gpt.py").read_text(), WALKS[walk])
    (tmp_path / "train_gpt.py").write_text(changed)
    words = [str(tmp_path / "train_gpt.py"), *flags(tmp_path, run_id="a", **KNOBS[walk])]
    done = forked.run(words, tmp_path, environment())
    assert done.returncode == 0, done.stderr
    assert float(rows(tmp_path)[0]["final_val_loss"]) < 4.0
