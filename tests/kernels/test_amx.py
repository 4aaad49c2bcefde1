"""The AMX kernels on CPUs without AMX: the tests of every instruction set, on emulated tiles."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gblm.kernels import native

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "toolkit" / "kernels" / "csrc"
UNITS = ("linear", "memory", "panels", "portable", "prepare", "torch_op", "avx2", "avx512", "amx")
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vbmi2", "vnni", "bf16")]
AVX512 += ["-mgfni", "-mpopcnt", "-mbmi2", "-mfma"]
# With tiles comes Intel's way of loading.
FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mpopcnt"],
    "avx512": AVX512,
    "amx": [*AVX512, "-mamx-tile"],
}
TESTS = ("test_cpu.py", "test_cpu_fuzz.py")


def has_avx512() -> bool:
    """Whether the kernels run, with AVX-512 at least."""
    return native.refusal() is None and native.instruction_set() in ("amx", "avx512")


pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86's"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(not has_avx512(), reason="this CPU has no AVX-512"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the tile registers of tests/kernels/amx."""
    root = tmp_path_factory.mktemp("amx")
    shutil.copytree(CSRC, root, dirs_exist_ok=True)
    shutil.copy(HERE / "amx" / "amx_registers.h", root)

    def compiled(unit: str) -> Path:
        made = root / f"{unit}.o"
        flags = ["-std=c++17", "-O1", "-fPIC", "-Wno-psabi", *FLAGS.get(unit, [])]
        subprocess.run(["g++", *flags, "-c", root / f"{unit}.cpp", "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, UNITS))
    library = root / "_cpu.so"
    subprocess.run(["g++", "-shared", *objects, "-ldl", "-o", library], check=True)
    return library


def test_every_test_of_amx_passes_on_emulated_tiles(emulated: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "emulated", "-k", "amx",
         *(HERE / name for name in TESTS)],
        capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | {"GBLM_EMULATED": str(emulated), "PYTHONPATH": str(HERE / "amx")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert int(found[1]) > 100
    assert "skipped" not in done.stdout
