"""The kernels of cuda/mma_sp.cu, run on an emulated GPU, against float64; and their tiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_cases import product, weight_of
from gpu_emulated import EmulatedDevice, emulated, missing

from gblm.errors import MachineError
from gblm.kernels.cuda.mma_sp import PLACES, SparseTensorCore, pack_tiles, token_blocks
from gblm.sparse.formats import make_format
from gblm.sparse.weights import SparseWeight

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
]


@pytest.fixture(scope="module")
def gpu() -> Iterator[EmulatedDevice]:
    torch.use_deterministic_algorithms(True)  # fills what new_empty gives with NaN
    yield emulated()
    torch.use_deterministic_algorithms(False)


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


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("values", ["int8:row", "int4:row"])
def test_every_code_is_widened_exactly(
    gpu: EmulatedDevice, values: str, dtype: torch.dtype
) -> None:
    fmt, shape = make_format("nm", "2:4", values), (16, 512)
    mask = torch.arange(512).remainder(4).lt(2).expand(shape)
    lowest = fmt.values.least
    span = fmt.values.limit - lowest + 1
    codes = torch.arange(256).remainder(span).add(lowest).expand(16, 256)
    placed = torch.zeros(shape, dtype=torch.int8)
    placed[mask] = codes.reshape(-1).to(torch.int8)
    scales = torch.ones(16, 1, dtype=BF16)
    weight = SparseWeight.from_codes(placed, scales, mask, dtype)
    backend, parts = SparseTensorCore(lambda _: gpu), fmt.pack("w", weight)
    x = torch.empty(1, 512, dtype=dtype)
    dense = backend.expand(x, backend.prepare(fmt, parts, shape, dtype), fmt, shape)
    assert torch.equal(dense, placed.to(dtype))


def test_shapes_and_views_of_activations(gpu: EmulatedDevice) -> None:
    fmt, shape, backend = make_format("nm", "2:4"), (16, 64), SparseTensorCore(lambda _: gpu)
    weight = weight_of(fmt, shape, BF16)
    prepared = backend.prepare(fmt, fmt.pack("w", weight), shape, BF16)
    whole = torch.randn(2, 3, 65, generator=torch.Generator().manual_seed(1)).to(BF16)
    for x in (whole[..., 1:], whole[:, :1, :64], whole[0, 0, :64], whole[:, :0, :64]):
        got = backend.linear(x, prepared, fmt, shape)
        assert got.shape == (*x.shape[:-1], 16)
        torch.testing.assert_close(got.double(), product(weight, x), rtol=4e-3, atol=1e-5)


def test_many_tokens_meet_the_expanded_weight(gpu: EmulatedDevice) -> None:
    fmt, shape, backend = (
        make_format("nm", "2:4", "int8:32"),
        (16, 64),
        SparseTensorCore(lambda _: gpu),
    )
    weight = weight_of(fmt, shape, BF16)
    prepared = backend.prepare(fmt, fmt.pack("w", weight), shape, BF16)
    x = torch.randn(65, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    gpu.launches.clear()
    got = backend.linear(x, prepared, fmt, shape)
    assert gpu.launches == ["expand"]
    assert torch.equal(got, torch.nn.functional.linear(x, weight.weight.to(BF16)))


@pytest.mark.parametrize(
    ("tokens", "launches"),
    [(1, ["mma_sp"]), (16, ["mma_sp"]), (17, ["repack", "mma_sp"]), (64, ["repack", "mma_sp"])],
)
def test_few_tokens_take_one_launch(gpu: EmulatedDevice, tokens: int, launches: list[str]) -> None:
    fmt, shape, backend = make_format("nm", "2:4"), (16, 64), SparseTensorCore(lambda _: gpu)
    prepared = backend.prepare(fmt, fmt.pack("w", weight_of(fmt, shape, BF16)), shape, BF16)
    gpu.launches.clear()
    backend.linear(torch.ones(tokens, 64, dtype=BF16), prepared, fmt, shape)
    assert gpu.launches == launches
    assert token_blocks(tokens) * 8 >= tokens


def test_the_emulated_gpu_notices_what_it_should(gpu: EmulatedDevice) -> None:
    fmt, shape, backend = make_format("nm", "2:4"), (16, 128), SparseTensorCore(lambda _: gpu)
    values, meta, scales = pack_tiles(fmt, fmt.pack("w", weight_of(fmt, shape, BF16)), shape)
    x = torch.ones(1, 128, dtype=BF16)
    with pytest.raises(MachineError, match="a read out of bounds"):
        backend.linear(x, [values[:-16], meta, scales], fmt, shape)
    with pytest.raises(MachineError, match="a read out of bounds"):
        backend.linear(x, [values, meta[..., :-1].contiguous(), scales], fmt, shape)
    with pytest.raises(MachineError, match="metadata out of order"):
        backend.linear(x, [values, torch.zeros_like(meta), scales], fmt, shape)


def test_metadata_is_what_the_instruction_defines() -> None:
    # PTX ISA: of sixteen nibbles these are legal with ordered metadata.
    assert sorted(PLACES.values()) == [4, 8, 9, 12, 13, 14]
    for mask, places in PLACES.items():
        assert mask == 1 << (places & 3) | 1 << (places >> 2)


@pytest.mark.parametrize(
    ("pattern", "values", "dtype", "reason"),
    [
        ("4:8", "float", BF16, "the pattern must be 2:4, not 4:8"),
        ("2:4", "float", torch.float32, "activations must be bfloat16 or float16, not float32"),
        ("2:4", "int4:32", FP16, None),
    ],
)
def test_it_says_why_it_refuses(
    pattern: str, values: str, dtype: torch.dtype, reason: str | None
) -> None:
    fmt, backend = make_format("nm", pattern, values), SparseTensorCore()
    assert backend.refuses_weight(fmt, (16, 64), dtype) == reason
    here = backend.refuses(fmt, (16, 64), dtype, torch.device("cpu"))
    assert here == "it runs on CUDA devices, not on cpu"
