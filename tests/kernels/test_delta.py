"""The kernels of cuda/delta.cu, run on an emulated GPU, against float64; and their layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_emulated import EmulatedDevice, emulated, missing

from gblm.kernels.cuda.delta import Delta, pack_deltas, padded_columns, tokens_at_once
from gblm.sparse.formats import make_format
from gblm.sparse.values import quantize

needs_compiler = pytest.mark.skipif(missing() is not None, reason=str(missing()))
BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [(8, 256), (13, 1024), (5, 8)]
KEPT = [0.0, 0.02, 0.3, 0.5, 1.0]


@pytest.fixture(scope="module")
def gpu() -> Iterator[EmulatedDevice]:
    torch.use_deterministic_algorithms(True)  # fills what new_empty gives with NaN
    yield emulated()
    torch.use_deterministic_algorithms(False)


def masked(
    shape: tuple[int, int], kept: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with nothing kept, with all kept, with only the last column kept, and others."""
    generator = torch.Generator().manual_seed(int(100 * kept))
    mask = torch.rand(shape, generator=generator) < kept
    mask[0], mask[1], mask[2] = False, True, False
    mask[2, -1] = True
    weight = torch.randn(shape, generator=generator).to(dtype)
    return torch.where(mask, weight, torch.zeros_like(weight)), mask


def unpack(parts: list[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of `pack_deltas`, one value after the other, as its layout is described."""
    values, gaps, starts, words = (part.tolist() for part in parts)
    dense = torch.zeros(shape[0], padded_columns(shape[1]), dtype=torch.float64)
    for row in range(shape[0]):
        for lane in range(32):
            column = (starts[row * 32 + lane] & 0xFFFF) - 1
            for word in range(words[row], words[row + 1]):
                for i in range(8):
                    column += ((gaps[word * 32 + lane] >> 4 * i) & 15) + 1
                    dense[row, column] += values[word * 32 + lane][i]
    assert not dense[:, shape[1] :].any()
    return dense[:, : shape[1]]


@pytest.mark.parametrize("shape", [*SHAPES, (3, 40_000)], ids=str)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5])
def test_layout_holds_the_weight(shape: tuple[int, int], kept: float) -> None:
    weight, mask = masked(shape, kept, FP16)
    assert torch.equal(unpack(pack_deltas(weight, mask), shape), weight.double())


def test_half_of_the_weights_take_eleven_bits_each_at_most() -> None:
    weight = torch.randn(32, 4096, generator=torch.Generator().manual_seed(0)).to(FP16)
    mask = weight.abs() >= weight.abs().median(dim=1, keepdim=True).values
    size = sum(part.nbytes for part in pack_deltas(weight, mask))
    assert 8 * size / weight.numel() < 11.5


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "kept"), [*((1, k) for k in KEPT), (2, 0.5), (3, 0.3), (8, 0.5)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_source_gives_the_float64_product(
    gpu: EmulatedDevice, shape: tuple[int, int], tokens: int, kept: float, dtype: torch.dtype
) -> None:
    weight, mask = masked(shape, kept, dtype)
    backend, prepared, fmt = (
        Delta(lambda _: gpu),
        pack_deltas(weight, mask),
        make_format("bitmask", "0.5"),
    )
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for seed in (0, 1):
        gpu.seed(seed)
        results.append(backend.linear(x, prepared, fmt, shape))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        results[0].double(), x.double() @ weight.double().t(), rtol=0.51 * eps, atol=1e-5
    )
    assert torch.equal(*results)
    assert torch.equal(backend.expand(x, prepared, fmt, shape), weight)


@needs_compiler
def test_long_rows_take_several_launches(gpu: EmulatedDevice) -> None:
    assert [tokens_at_once(gpu, columns) for columns in (4096, 14336, 28672, 65528)] == [8, 4, 2, 1]
    shape = (2, 28672)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16)
    mask = weight.abs() > 2
    weight = torch.where(mask, weight, torch.zeros_like(weight))
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1)).to(BF16)
    gpu.launches.clear()
    got = Delta(lambda _: gpu).linear(
        x, pack_deltas(weight, mask), make_format("bitmask", "0.9"), shape
    )
    assert gpu.launches == ["delta", "delta"]
    torch.testing.assert_close(got.double(), x.double() @ weight.double().t(), rtol=4e-3, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("values", ["int8:32"])
def test_codes_are_multiplied_out_at_load(gpu: EmulatedDevice, values: str) -> None:
    fmt, shape, backend = make_format("bitmask", "0.5", values), (8, 96), Delta(lambda _: gpu)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = quantize(drawn, fmt.pattern.keep(drawn.abs(), "row"), fmt.values)
    prepared = backend.prepare(fmt, fmt.pack("w", weight), shape, BF16)
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(1)).to(BF16)
    assert torch.equal(backend.expand(x, prepared, fmt, shape), weight.weight.to(BF16))
    many = backend.linear(x, prepared, fmt, shape)
    assert torch.equal(many, torch.nn.functional.linear(x, weight.weight.to(BF16)))


@pytest.mark.parametrize(
    ("name", "pattern", "columns", "dtype", "reason"),
    [
        ("dense", "dense", 64, BF16, "a dense weight has no zeros to leave out"),
        (
            "bitmask",
            "0.5",
            64,
            torch.float32,
            "activations must be bfloat16 or float16, not float32",
        ),
        ("bitmask", "0.5", 65536, BF16, "65536 columns are more than 65535"),
        ("nm", "4:8", 64, FP16, None),
    ],
)
def test_it_says_why_it_refuses(
    name: str, pattern: str, columns: int, dtype: torch.dtype, reason: str | None
) -> None:
    assert Delta().refuses_weight(make_format(name, pattern), (8, columns), dtype) == reason
