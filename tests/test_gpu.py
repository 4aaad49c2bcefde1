"""Pruning on CUDA devices: the same code, so the same result up to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gblm.checkpoint.packed_folder import PackedReader
from gblm.layers import stream
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe

pytestmark = pytest.mark.gpu
METHODS = ["magnitude", "wanda", "sparsegpt", "gradient", "gblm"]


def recipe(tiny: Path, text: Path, method: str, device: str) -> Recipe:
    calibration = Calibration(source=str(text), num_samples=4, seq_len=32)
    return Recipe(
        model=str(tiny), method=method, dtype="float32", device=device, calibration=calibration
    )


def different_bits(first: Path, second: Path) -> float:
    wrong = total = 0
    with PackedReader(first) as a, PackedReader(second) as b:
        for name, linear in a.linears.items():
            one = linear.fmt.unpack(a.parts(name)).mask
            wrong += int((one != linear.fmt.unpack(b.parts(name)).mask).sum())
            total += one.numel()
    return wrong / total


@pytest.mark.parametrize("method", METHODS)
def test_masks_equal_those_of_the_cpu(
    tiny: Path, text_file: Path, tmp_path: Path, method: str
) -> None:
    for device in ("cpu", "cuda"):
        prune(recipe(tiny, text_file, method, device), tmp_path / device)
    assert different_bits(tmp_path / "cpu", tmp_path / "cuda") < 1e-3


def test_layers_are_read_ahead_and_dropped(tiny: Path) -> None:
    with stream(tiny, device="cuda") as layers:
        with layers.open(0) as module:
            assert all(p.is_cuda for p in module.parameters())
            assert layers._ahead is not None
            assert layers._ahead[0] == 1
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with layers.open(1):
            pass
        assert torch.cuda.memory_allocated() <= before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_share_the_samples(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    prune(recipe(tiny, text_file, "gblm", "cuda"), tmp_path / "one")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "gblm", "prune", str(tiny), "--method", "gblm", "--device", "cuda"),
        *("--dtype", "float32", "--calibration", str(text_file), "--num-samples", "4"),
        *("--seq-len", "32", "--output", str(tmp_path / "two")),
    ]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert different_bits(tmp_path / "one", tmp_path / "two") < 1e-3
