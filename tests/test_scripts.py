"""What holds for every program of scripts/."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_programs_in_scripts_never_import_each_other():
    paths = list((ROOT / "scripts").rglob("*.py"))
    programs = [p for p in paths if p.parent.name != "lib" and not p.name.startswith("lib_")]
    names = "|".join(path.stem for path in programs)
    for path in programs:
        assert not re.search(rf"^\s*(import|from) ({names})\b", path.read_text(), re.M), path.name
