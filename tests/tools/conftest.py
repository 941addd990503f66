"""Where the tests of the tools find them, and a run that several of them read."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in ("tests/gpt", "scripts"):
    sys.path.insert(0, str(ROOT / folder))

from run_support import train_run  # noqa: E402


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with one run, called run_support.ID."""
    return train_run(tmp_path_factory.mktemp("run"))
