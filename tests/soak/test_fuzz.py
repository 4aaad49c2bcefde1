"""A part of the fuzz that `make soak` runs in full; in a process of its own, which may crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parent / "fuzz.py"
CASES = 200


@pytest.mark.slow
def test_damaged_folders_are_refused_or_load_as_stored() -> None:
    words = [sys.executable, str(FUZZ), "--cases", str(CASES), "--seed", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["found"] == []
    assert found["refused"] > CASES / 4
    assert found["loaded as stored"] > CASES / 20
