"""The backend `triton`: its kernels in the interpreter, its arrays, blocks and refusals."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from weights import weight_of

from gblm.kernels.triton import backend as module
from gblm.kernels.triton.backend import MAX_TOKENS, Stored, arrays, blocks, package_refusal, sized
from gblm.sparse.formats import make_format
from gblm.sparse.values import GROUP_SIZES

CHECK = Path(__file__).parent.parent / "triton_check.py"
NO_TRITON = package_refusal()


@pytest.mark.slow
@pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
def test_every_kernel_in_the_interpreter() -> None:
    # In a process of its own: Triton reads the variable when it is imported.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECK)],
        env=kept | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert int(passed) >= 40, "cases were lost"


def test_the_parts_are_not_copied() -> None:
    fmt, shape = make_format("nm", "2:4", "int8:row"), (16, 64)
    parts = fmt.pack("w", weight_of(fmt, shape))
    made = arrays(fmt, parts, shape)
    for array, part in ((made.values, "values"), (made.words, "bitmask"), (made.scales, "scales")):
        assert array.data_ptr() == parts[part].data_ptr()
    assert made.starts.numel() == made.begins.numel() == 0


@pytest.mark.parametrize("two_four", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, MAX_TOKENS])
@pytest.mark.parametrize("group", [0, *GROUP_SIZES])
def test_blocks_suit_the_scales_and_triton(group: int, tokens: int, two_four: bool) -> None:
    stored = Stored(two_four, 8, group)
    block = blocks(stored, (4096, 4096), tokens, 108)
    assert block.tokens >= tokens
    for number in (block.rows, block.columns, block.tokens):
        assert number & -number == number
    assert group % block.columns == 0 or not group
    # What tl.dot needs of 16-bit operands.
    assert tokens == 1 or (block.columns >= 16 and block.rows >= 16)


def test_columns_are_shared_until_every_unit_has_work() -> None:
    stored = Stored(True, 16, 0)
    assert blocks(stored, (4096, 4096), 1, 1).split == 1
    assert blocks(stored, (64, 4096), 1, 132).split == 8
    assert blocks(stored, (64, 1024), 1, 132).split == 2
    assert blocks(stored, (64, 1016), 1, 132).split == 1
    assert sized(((16, 256), (8, 256)), Stored(False, 8, 96)) == (64, 32)


def test_it_refuses_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == "triton" else found(name)
    )
    assert module.refusal(torch.device("cuda")) == "there is no Triton: pip install triton"


@pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.5.1", "Triton 3.5.1 is older than 3.6"), ("3.6.0", None), ("3.10.0+rocm7", None)],
)
def test_it_refuses_an_old_triton(
    monkeypatch: pytest.MonkeyPatch, version: str, reason: str | None
) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    assert package_refusal() == reason


@pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
@pytest.mark.parametrize(
    ("arch", "hip", "reason"),
    [
        ((8, 0), None, None),
        ((7, 5), None, "compute capability 7.5 is older than 8.0"),
        ((9, 4), "7.0", None),
    ],
)
def test_it_takes_amd_gpus_and_refuses_old_ones(
    monkeypatch: pytest.MonkeyPatch, arch: tuple[int, int], hip: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: arch)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert module.refusal(torch.device("cuda")) == reason
