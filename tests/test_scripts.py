"""What holds for every program of scripts/."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_programs_in_scripts_never_import_each_other():
    texts = {path: path.read_text() for path in (ROOT / "scripts").rglob("*.py")}
    programs = {p: text for p, text in texts.items() if 'if __name__ == "__main__":' in text}
    names = "|".join(path.stem for path in programs)
    for path, text in programs.items():
        assert not re.search(rf"^\s*(import|from) ({names})\b", text, re.M), path.name
