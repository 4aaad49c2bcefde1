"""Without a C++ compiler the installation works, and says in one line what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gblm.kernels import BACKENDS

pytest.importorskip("setuptools", minversion="77")  # the build is not isolated: no network
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

CHECK = """
import torch
from gblm.sparse.formats import make_format
from gblm.kernels import linear, native, select

print(native.refusal())
fmt, weight = make_format("nm", "2:4"), torch.tensor([[1.0, 0, 2, 0, 0, 3, 0, 4]]).bfloat16()
backend, reasons = select(fmt, (1, 8), torch.bfloat16, torch.device("cpu"))
print(backend.name, reasons)
from gblm.sparse.weights import SparseWeight
parts = fmt.pack("w", SparseWeight.cut(weight, weight.bool()))
prepared = backend.prepare(fmt, parts, (1, 8))
print(linear(torch.ones(1, 8).bfloat16(), prepared, (1, 8), fmt, backend).item())
"""


# What a build reads; of it, nothing that was built.
SOURCES = ("toolkit", "export", "serve", "deploy", "setup.py", "pyproject.toml", "README.md",
           "LICENSE")  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel of this tree made where no compiler can be started, and what its building said."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__py*")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    missing = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--wheel-dir", out, source],
        capture_output=True, text=True, check=False, env=os.environ | missing, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout + done.stderr


def test_building_says_it_in_one_line(built: tuple[Path, str]) -> None:
    said = [line.strip() for line in built[1].splitlines() if "CPU kernels" in line]
    assert len(said) == 1
    assert said[0].startswith("gblm: the CPU kernels were not built (")
    assert said[0].endswith("); slower backends will serve.")
    assert "Traceback" not in built[1]


def test_the_wheel_serves_expanded_weights_and_says_why(
    built: tuple[Path, str], tmp_path: Path
) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        assert not [name for name in wheel.namelist() if name.endswith(".so")]
        wheel.extractall(tmp_path)
    done = subprocess.run(
        # -S: an editable installation must not come first.
        [sys.executable, "-S", "-c", CHECK], capture_output=True, text=True, check=False,
        cwd=tmp_path, timeout=120, env=os.environ | {"PYTHONPATH": _path(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason = "not built (no C++ compiler at installation)"
    gpu_backends = [name for name in BACKENDS if BACKENDS[name].needs == "cuda"]
    on_gpus = [f"{name}: it runs on CUDA devices, not on cpu" for name in gpu_backends]
    assert done.stdout.splitlines() == [
        reason, f"dense {[f'cpu: {reason}', *on_gpus]}", "10.0",
    ]  # fmt: skip


def _path(first: Path) -> str:
    return os.pathsep.join([str(first), *(path for path in sys.path if "site-packages" in path)])
