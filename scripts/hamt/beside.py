"""beside.py -- lets the programs of this folder import scripts/lib and the trainers."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]


def git_commit() -> str:
    """The checkout's commit; empty where git cannot tell."""
    command = ["git", "-C", str(SCRIPTS.parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
