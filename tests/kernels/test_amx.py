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
from source_tree import copy_sources

from gblm.kernels import native

pytest.importorskip("setuptools", minversion="77")  # the build is not isolated: no network
HERE = Path(__file__).parent


def has_avx512() -> bool:
    """Whether the kernels run, with AVX-512 at least."""
    return native.refusal() is None and native.instruction_set() in ("amx", "avx512")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX: runs on x86"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: .ci/run installs it"),
    pytest.mark.skipif(not has_avx512(), reason="no AVX-512: runs on CPUs with it"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the tile registers of tests/kernels/amx."""
    root = tmp_path_factory.mktemp("amx")
    copy_sources(root)
    shutil.copy(HERE / "amx" / "amx_registers.h", root / "toolkit" / "kernels" / "csrc")
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=root,
                   check=True, capture_output=True)  # fmt: skip
    return root / "toolkit" / "kernels" / native.LIBRARY.name


def test_every_test_of_amx_passes_on_emulated_tiles(emulated: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "emulated", "-k", "amx",
         HERE / "test_cpu.py"],
        capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | {"GBLM_EMULATED": str(emulated), "PYTHONPATH": str(HERE / "amx")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert int(found[1]) > 100
    assert "skipped" not in done.stdout
