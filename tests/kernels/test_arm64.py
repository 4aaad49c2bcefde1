"""The arm64 kernels, built by a cross compiler and run by qemu: neon against portable."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "build/arm64/arm64_check"
# What each CPU must have, the one that is chosen first.
SETS = {"max": ("neon_bf16", "neon"), "neoverse-n1": ("neon",), "cortex-a57": ("portable",)}
MISSING = [
    tool for tool in ("make", "aarch64-linux-gnu-g++", "qemu-aarch64") if shutil.which(tool) is None
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"no {', '.join(MISSING)}: `make arm64` runs this where they are"
    ),
]


def test_instruction_sets_of_arm64_agree_with_the_portable_kernels() -> None:
    # One test: workers that build the same program would disturb each other.
    built = subprocess.run(["make", "--jobs", "2", PROGRAM], cwd=ROOT, capture_output=True,
                           text=True, check=False, timeout=600)  # fmt: skip
    assert built.returncode == 0, built.stderr
    for cpu, sets in SETS.items():
        done = subprocess.run(["qemu-aarch64", "-cpu", cpu, PROGRAM, *sets], cwd=ROOT,
                              capture_output=True, text=True, check=False, timeout=600)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            f"arm64_check: {name} agrees with portable" for name in sets
        ]
