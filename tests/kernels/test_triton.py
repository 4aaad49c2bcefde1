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
from gblm.kernels.triton.backend import (
    SIZES,
    Pairs,
    Stored,
    arrays,
    blocks,
    package_refusal,
    sized,
)
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
    assert int(passed) >= 65, "cases were lost"


def test_the_parts_are_not_copied() -> None:
    fmt, shape = make_format("nm", "2:4", "int8:row"), (16, 64)
    parts = fmt.pack("w", weight_of(fmt, shape))
    made = arrays(fmt, parts, shape)
    for array, part in ((made.values, "values"), (made.words, "bitmask"), (made.scales, "scales")):
        assert array.data_ptr() == parts[part].data_ptr()
    assert made.starts.numel() == made.begins.numel() == 0


@pytest.mark.parametrize("two_four", [True, False])
@pytest.mark.parametrize("tokens", [2, *SIZES])
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
    assert blocks(stored, (64, 4096), 1, 132, groups=8).split == 8
    assert blocks(stored, (64, 4096), 1, 132, groups=64).split == 2
    assert sized(((16, 256), (8, 256)), Stored(False, 8, 96)) == (64, 32)


@pytest.mark.parametrize(
    ("tokens", "chosen", "experts"),
    [(1, 8, 64), (8, 2, 8), (16, 1, 1), (40, 2, 5), (300, 8, 8), (2, 1, 1), (700, 1, 9)],
)
def test_each_pair_is_in_one_group_of_its_expert(tokens: int, chosen: int, experts: int) -> None:
    # Every third expert is never chosen; ids below 0 and above the last are others' or nobody's.
    seed = torch.Generator().manual_seed(1)
    ids = torch.randint(-2, experts + 2, (tokens, chosen), generator=seed)
    ids[ids % 3 == 2] = 0
    found = Pairs.of(ids, experts)
    assert found.most in SIZES
    assert found.most > 1 or tokens == 1
    # Other ids make no other number of groups, for a graph that is captured once.
    assert len(found.groups) == len(Pairs.of(torch.zeros_like(ids), experts).groups)
    seen = []
    for expert, first, count in found.groups.tolist():
        own = found.order[first : first + count].tolist()
        assert len(own) == count <= found.most
        assert all(ids.flatten()[pair] == expert for pair in own)
        seen += own
    flat = ids.flatten()
    assert sorted(seen) == ((flat >= 0) & (flat < experts)).nonzero().flatten().tolist()


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
