"""Pruning on CUDA devices: the same code, so the same result up to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gblm.checkpoint.packed_folder import PackedReader
from gblm.formats import make_format
from gblm.kernels import BACKENDS, linear
from gblm.kernels.cuda.libraries import LIBRARIES, Library
from gblm.kernels.cuda.semi_structured import SemiStructured
from gblm.layers import stream
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe
from gblm.values import quantize
from gblm.weights import SparseWeight

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


@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 64, 65])
@pytest.mark.parametrize(
    "values", ["float", "int8:row", "int8:128", "int4:32", "uint4:128", "fp8:128"]
)
@pytest.mark.parametrize(("name", "pattern"), [("nm", "2:4"), ("bitmask", "0.5")])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if BACKENDS[b].needs == "cuda"])
def test_linears_on_the_gpu_equal_the_float64_product(
    backend: str, name: str, pattern: str, values: str, tokens: int
) -> None:
    fmt, shape, runs = make_format(name, pattern, values), (200, 1152), BACKENDS[backend]
    if runs.refuses(fmt, shape, torch.bfloat16, torch.device("cuda")):
        assert name == "bitmask"
        assert backend in ("mma_sp", "semi_structured")
        return
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = fmt.pattern.keep(drawn.abs(), "row")
    weight = SparseWeight.cut(drawn.bfloat16(), mask)
    if not fmt.values.is_float:
        weight = quantize(drawn, mask, fmt.values)
    parts = {part: tensor.cuda() for part, tensor in fmt.pack("w", weight).items()}
    prepared = runs.prepare(fmt, parts, shape, torch.bfloat16)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    got = linear(x, prepared, shape, fmt, runs)
    want = x.double() @ weight.weight.double().t().cuda()
    assert float((got.double() - want).norm() / want.norm()) < 1e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear(x, prepared, shape, fmt, runs)
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, got)


@pytest.mark.parametrize("tokens", [65, 300, 2048])
@pytest.mark.parametrize("plentiful", [False, True])
def test_prefill_is_right_captured_and_waits_for_nothing(plentiful: bool, tokens: int) -> None:
    fmt, shape = make_format("nm", "2:4"), (512, 1024)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = SparseWeight.cut(drawn.bfloat16(), fmt.pattern.keep(drawn.abs(), "row"))
    parts = {part: tensor.cuda() for part, tensor in fmt.pack("w", weight).items()}
    backend = SemiStructured(plentiful=plentiful)
    prepared = backend.prepare(fmt, parts, shape, torch.bfloat16)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    want = x.double() @ weight.weight.double().t().cuda()
    backend.linear(x, prepared, fmt, shape)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = backend.linear(x, prepared, fmt, shape)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float((got.double() - want).norm() / want.norm()) < 1e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.linear(x, prepared, fmt, shape)
    captured.fill_(torch.nan)
    graph.replay()
    assert float((captured.double() - want).norm() / want.norm()) < 1e-2


@pytest.mark.parametrize("tokens", [1, 65, 2048])
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_pytorchs_libraries_are_called_as_they_want_to_be(library: Library, tokens: int) -> None:
    shape, kept = (512, 1024), torch.arange(1024).remainder(4).lt(2)
    if reason := library.refuses(shape, torch.bfloat16):
        pytest.skip(reason)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16() * kept
    x = torch.randn(tokens, 1024, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    want = x.double() @ weight.double().t().cuda()
    packed = library.pack(weight.cuda())
    assert len(packed) == library.num_tensors
    for algorithm in (0, library.search(packed, library.padded(x))):
        got = library.multiply(packed, x, algorithm)
        assert float((got.double() - want).norm() / want.norm()) < 1e-2
