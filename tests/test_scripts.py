"""What holds for every program of scripts/."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_no_program_takes_a_part_of_a_flags_name_for_the_flag():
    for path in [*(ROOT / "scripts").rglob("*.py"), ROOT / "cached_fineweb10B.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser"):
                options = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert options.get("allow_abbrev") == "False", path


def test_programs_in_scripts_never_import_each_other():
    texts = {path: path.read_text() for path in (ROOT / "scripts").rglob("*.py")}
    programs = {p: text for p, text in texts.items() if 'if __name__ == "__main__":' in text}
    names = "|".join(path.stem for path in programs)
    for path, text in programs.items():
        assert not re.search(rf"^\s*(import|from) ({names})\b", text, re.M), path.name
