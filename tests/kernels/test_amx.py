"""The AMX kernels on CPUs without AMX: the tests of every instruction set, on emulated tiles."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gblm.kernels import native

HERE = Path(__file__).parent
ROOT, LIBRARY = HERE.parents[1], "build/amx/_cpu.so"
MISSING = [tool for tool in ("make", "g++") if shutil.which(tool) is None]


def has_avx512() -> bool:
    """Whether the kernels run, with AVX-512 at least."""
    return native.refusal() is None and native.instruction_set() in ("amx", "avx512")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX: runs on x86"),
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: .ci/run installs it"),
    pytest.mark.skipif(not has_avx512(), reason="no AVX-512: runs on CPUs with it"),
]


def test_every_test_of_amx_passes_on_emulated_tiles() -> None:
    built = subprocess.run(["make", "--jobs", "2", LIBRARY], cwd=ROOT, capture_output=True,
                           text=True, check=False, timeout=600)  # fmt: skip
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "emulated", "-k", "amx",
         HERE / "test_cpu.py", HERE / "test_experts.py"],
        capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | {"GBLM_EMULATED": str(ROOT / LIBRARY), "PYTHONPATH": _path()},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert int(found[1]) > 100
    assert "skipped" not in done.stdout


def _path() -> str:
    return os.pathsep.join([str(HERE / "amx"), os.environ.get("PYTHONPATH", "")])
