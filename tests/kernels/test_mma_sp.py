"""The kernels of cuda/mma_sp.cu, run on an emulated GPU, against float64; and their tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_emulated import EmulatedDevice, missing

from gblm.errors import MachineError
from gblm.formats import Format, make_format
from gblm.kernels.cuda.sparse_tensor_core import SparseTensorCore, token_blocks
from gblm.kernels.cuda.tiles import PLACES, pack_tiles
from gblm.values import quantize
from gblm.weights import SparseWeight

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
BF16, FP16 = torch.bfloat16, torch.float16
# Each is another way through the source: value types, groups within and across steps, tails of
# rows and columns, blocks of tokens, direct and rearranged activations.
CASES = [
    ("float", (16, 64), 1, BF16),
    ("float", (16, 1088), 8, BF16),
    ("float", (40, 72), 5, FP16),
    ("float", (33, 136), 13, BF16),
    ("float", (16, 128), 33, BF16),
    ("float", (24, 200), 64, FP16),
    ("int8:row", (16, 64), 3, BF16),
    ("int8:row", (20, 72), 17, FP16),
    ("int8:32", (16, 96), 1, BF16),
    ("int8:64", (32, 192), 9, FP16),
    ("int8:96", (16, 288), 2, BF16),
    ("int8:128", (16, 1280), 64, BF16),
    ("int4:row", (16, 192), 1, BF16),
    ("int4:32", (17, 160), 4, FP16),
    ("int4:128", (16, 256), 16, BF16),
    ("int4:192", (16, 384), 1, FP16),
    ("int4:256", (16, 512), 1, BF16),
    ("uint4:row", (24, 136), 2, BF16),
    ("uint4:32", (16, 96), 20, FP16),
    ("uint4:128", (48, 384), 7, BF16),
]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedDevice]:
    yield EmulatedDevice(tmp_path_factory.mktemp("gpu"))


def weight_of(fmt: Format, shape: tuple[int, int], dtype: torch.dtype) -> SparseWeight:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    drawn[0] = 0
    mask = fmt.pattern.keep(drawn.abs(), "row")
    if fmt.values.is_float:
        return SparseWeight.cut(drawn.to(dtype), mask)
    return quantize(drawn, mask, fmt.values)


def product(weight: SparseWeight, x: torch.Tensor) -> torch.Tensor:
    """float64, with codes as they are, not rounded to the activations' dtype."""
    exact = weight.weight.double()
    if weight.codes is not None and weight.scales is not None:
        groups = weight.codes.double().reshape(len(exact), weight.scales.shape[1], -1)
        exact = (groups * weight.scales.double().unsqueeze(-1)).reshape(exact.shape)
    return x.double() @ exact.t()


@pytest.mark.parametrize(("values", "shape", "tokens", "dtype"), CASES, ids=str)
def test_the_kernels_source_gives_the_float64_product(
    gpu: EmulatedDevice, values: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype
) -> None:
    fmt, backend = make_format("nm", "2:4", values), SparseTensorCore(lambda _: gpu)
    weight = weight_of(fmt, shape, dtype)
    prepared = backend.prepare(fmt, fmt.pack("w", weight), shape, dtype)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    want, results = product(weight, x), []
    for seed in (0, 1):
        gpu.seed(seed)
        got = backend.linear(x, prepared, fmt, shape)
        assert got.dtype == dtype
        # Sums are float32: the only error is that of rounding the result once.
        bound = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(got.double(), want, rtol=1.01 * bound, atol=1e-5 * bound**0.5)
        results.append(got)
    assert torch.equal(*results)
    dense = backend.expand(x, prepared, fmt, shape)
    assert torch.equal(dense, fmt.expand(fmt.pack("w", weight), dtype))
    assert not torch.signbit(dense[dense == 0]).any()
