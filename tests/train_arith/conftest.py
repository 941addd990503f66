"""Where the tests of the arithmetic study find the trainer and its programs."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "scripts"),
    str(ROOT / "scripts/arith"),
    str(Path(__file__).parent),
]


@pytest.fixture(scope="session")
def trained():
    from heads_support import overfitted

    return overfitted()


@pytest.fixture
def data(tmp_path) -> str:
    from heads_support import write_sets

    return write_sets(tmp_path)
