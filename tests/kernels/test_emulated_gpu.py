"""The CUDA kernels' own source on an emulated GPU, against float64; and the layouts they read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_gpu as wanted
import torch
from gpu_emulated import EmulatedDevice, emulated, emulated_backends, missing
from torch import Tensor
from weights import every_code, product, weight_of

from gblm.errors import MachineError
from gblm.kernels import BACKENDS, Backend
from gblm.kernels.cuda.delta import Delta, pack_deltas, tokens_at_once
from gblm.kernels.cuda.mma_sp import PLACES, SparseTensorCore, pack_tiles, token_blocks
from gblm.sparse.formats import Format, Shape, from_spec, make_format
from gblm.sparse.weights import SparseWeight

needs_compiler = pytest.mark.skipif(missing() is not None, reason=str(missing()))
BF16, FP16 = torch.bfloat16, torch.float16
# Each is another way through the source: value types, groups within and across steps, tails of
# rows and columns, blocks of tokens, direct and rearranged activations, few and many zeros.
CASES = [
    ("mma_sp", "nm/2:4", (16, 64), 1, BF16),
    ("mma_sp", "nm/2:4", (16, 1088), 8, BF16),
    ("mma_sp", "nm/2:4", (40, 72), 5, FP16),
    ("mma_sp", "nm/2:4", (33, 136), 13, BF16),
    ("mma_sp", "nm/2:4", (16, 128), 33, BF16),
    ("mma_sp", "nm/2:4", (24, 200), 64, FP16),
    ("mma_sp", "nm/2:4/int8:row", (16, 64), 3, BF16),
    ("mma_sp", "nm/2:4/int8:row", (20, 72), 17, FP16),
    ("mma_sp", "nm/2:4/int8:32", (16, 96), 1, BF16),
    ("mma_sp", "nm/2:4/int8:64", (32, 192), 9, FP16),
    ("mma_sp", "nm/2:4/int8:96", (16, 288), 2, BF16),
    ("mma_sp", "nm/2:4/int8:128", (16, 1280), 64, BF16),
    ("mma_sp", "nm/2:4/int4:row", (16, 192), 1, BF16),
    ("mma_sp", "nm/2:4/int4:32", (17, 160), 4, FP16),
    ("mma_sp", "nm/2:4/int4:128", (16, 256), 16, BF16),
    ("mma_sp", "nm/2:4/int4:192", (16, 384), 1, FP16),
    ("mma_sp", "nm/2:4/int4:256", (16, 512), 1, BF16),
    *(
        ("delta", f"bitmask/{sparsity}", shape, tokens, dtype)
        for shape in ((8, 256), (13, 1024), (5, 8))
        for sparsity, tokens, dtype in [
            ("0", 1, BF16), ("0.5", 1, FP16), ("0.7", 3, FP16), ("0.98", 1, BF16),
            ("0.5", 2, BF16), ("0.5", 8, FP16),
        ]
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def gpu() -> Iterator[EmulatedDevice]:
    torch.use_deterministic_algorithms(True)  # fills what new_empty gives with NaN
    yield emulated()
    torch.use_deterministic_algorithms(False)


def activations(tokens: int, columns: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def two_four(
    gpu: EmulatedDevice, columns: int = 64, values: str = "float"
) -> tuple[SparseTensorCore, Format, SparseWeight, list[Tensor]]:
    """16 rows of 2:4 on the emulated GPU: backend, format, weight, and what `prepare` made."""
    fmt, backend = make_format("nm", "2:4", values), SparseTensorCore(lambda _: gpu)
    weight = weight_of(fmt, (16, columns))
    return backend, fmt, weight, backend.prepare(fmt, fmt.pack("w", weight), (16, columns), BF16)


@needs_compiler
@pytest.mark.parametrize(("name", "spec", "shape", "tokens", "dtype"), CASES, ids=str)
def test_the_kernels_source_gives_the_float64_product(
    gpu: EmulatedDevice, name: str, spec: str, shape: Shape, tokens: int, dtype: torch.dtype
) -> None:
    fmt, backend = from_spec(spec), emulated_backends()[name]
    weight, x = weight_of(fmt, shape, dtype), activations(tokens, shape[1], dtype)
    parts = fmt.pack("w", weight)
    prepared, want, results = backend.prepare(fmt, parts, shape, dtype), product(weight, x), []
    for seed in (0, 1):
        gpu.seed(seed)
        got = backend.linear(x, prepared, fmt, shape)
        assert got.dtype == dtype
        # Sums are float32: the only error is that of rounding the result once.
        bound = 1.01 * torch.finfo(dtype).eps / 2
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=1e-5)
        results.append(got)
    assert torch.equal(*results)
    dense = backend.expand(x, prepared, fmt, shape)
    assert torch.equal(dense, fmt.expand(parts, dtype))
    assert not torch.signbit(dense[dense == 0]).any()


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("values", ["int8:row", "int4:row"])
def test_every_code_is_widened_exactly(
    gpu: EmulatedDevice, values: str, dtype: torch.dtype
) -> None:
    fmt, shape, x = make_format("nm", "2:4", values), (16, 512), torch.empty(1, 512, dtype=dtype)
    weight, backend = every_code(fmt, dtype), SparseTensorCore(lambda _: gpu)
    prepared = backend.prepare(fmt, fmt.pack("w", weight), shape, dtype)
    assert torch.equal(backend.expand(x, prepared, fmt, shape), weight.codes.to(dtype))


@needs_compiler
def test_shapes_and_views_of_activations(gpu: EmulatedDevice) -> None:
    backend, fmt, weight, prepared = two_four(gpu)
    whole = activations(6, 65).reshape(2, 3, 65)
    for x in (whole[..., 1:], whole[:, :1, :64], whole[0, 0, :64], whole[:, :0, :64]):
        got = backend.linear(x, prepared, fmt, (16, 64))
        assert got.shape == (*x.shape[:-1], 16)
        torch.testing.assert_close(got.double(), product(weight, x), rtol=4e-3, atol=1e-5)


@needs_compiler
def test_many_tokens_meet_the_expanded_weight(gpu: EmulatedDevice) -> None:
    backend, fmt, weight, prepared = two_four(gpu, values="int8:32")
    x = activations(65, 64)
    gpu.launches.clear()
    got = backend.linear(x, prepared, fmt, (16, 64))
    assert gpu.launches == ["expand"]
    assert torch.equal(got, torch.nn.functional.linear(x, weight.weight.to(BF16)))


@needs_compiler
@pytest.mark.parametrize(
    ("tokens", "launches"),
    [(1, ["mma_sp"]), (16, ["mma_sp"]), (17, ["repack", "mma_sp"]), (64, ["repack", "mma_sp"])],
)
def test_few_tokens_take_one_launch(gpu: EmulatedDevice, tokens: int, launches: list[str]) -> None:
    backend, fmt, _, prepared = two_four(gpu)
    gpu.launches.clear()
    backend.linear(torch.ones(tokens, 64, dtype=BF16), prepared, fmt, (16, 64))
    assert gpu.launches == launches
    assert token_blocks(tokens) * 8 >= tokens


@needs_compiler
def test_long_rows_take_several_launches(gpu: EmulatedDevice) -> None:
    assert [tokens_at_once(gpu, columns) for columns in (4096, 14336, 28672, 65528)] == [8, 4, 2, 1]
    fmt, shape = make_format("bitmask", "0.95"), (2, 40_000)  # no signed number of 16 bits
    weight, x, backend = weight_of(fmt, shape), activations(3, shape[1]), Delta(lambda _: gpu)
    prepared = backend.prepare(fmt, fmt.pack("w", weight), shape, BF16)
    gpu.launches.clear()
    got = backend.linear(x, prepared, fmt, shape)
    assert gpu.launches == ["delta", "delta"]
    assert torch.equal(backend.expand(x, prepared, fmt, shape), weight.weight)
    torch.testing.assert_close(got.double(), product(weight, x), rtol=4e-3, atol=1e-3)


@needs_compiler
def test_delta_multiplies_codes_out_at_load(gpu: EmulatedDevice) -> None:
    fmt, shape, backend = make_format("bitmask", "0.5", "int8:32"), (8, 96), Delta(lambda _: gpu)
    weight, x = weight_of(fmt, shape), activations(9, 96)
    prepared = backend.prepare(fmt, fmt.pack("w", weight), shape, BF16)
    assert torch.equal(backend.expand(x, prepared, fmt, shape), weight.weight.to(BF16))
    many = backend.linear(x, prepared, fmt, shape)
    assert torch.equal(many, torch.nn.functional.linear(x, weight.weight.to(BF16)))


@needs_compiler
def test_the_emulated_gpu_notices_what_it_should(gpu: EmulatedDevice) -> None:
    backend, fmt, weight, _ = two_four(gpu, columns=128)
    values, meta, scales = pack_tiles(fmt, fmt.pack("w", weight), (16, 128))
    x = torch.ones(1, 128, dtype=BF16)
    for damaged, match in (
        ([values[:-16], meta, scales], "a read out of bounds"),
        ([values, meta[..., :-1].contiguous(), scales], "a read out of bounds"),
        ([values, torch.zeros_like(meta), scales], "metadata out of order"),
    ):
        with pytest.raises(MachineError, match=match):
            backend.linear(x, damaged, fmt, (16, 128))


def test_metadata_is_what_the_instruction_defines() -> None:
    # PTX ISA: of sixteen nibbles these are legal with ordered metadata.
    assert sorted(PLACES.values()) == [4, 8, 9, 12, 13, 14]
    for mask, places in PLACES.items():
        assert mask == 1 << (places & 3) | 1 << (places >> 2)


def test_half_of_the_weights_take_eleven_bits_each_at_most() -> None:
    weight = torch.randn(32, 4096, generator=torch.Generator().manual_seed(0)).to(FP16)
    mask = weight.abs() >= weight.abs().median(dim=1, keepdim=True).values
    size = sum(part.nbytes for part in pack_deltas(weight, mask))
    assert 8 * size / weight.numel() < 11.5


# The list of what a GPU must prove, before a card is there: its Python is right, it sees faults.
LISTED = [case for case in wanted.GPU_CASES if case[0] in ("mma_sp", "delta") and case[2][0] < 512]


@pytest.fixture
def in_place_of_cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, backend in emulated_backends().items():
        monkeypatch.setitem(BACKENDS, name, backend)
    monkeypatch.setattr(wanted, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(wanted, "TOKENS", (9, 65))
    yield
    torch.set_deterministic_debug_mode("default")


@needs_compiler
@pytest.mark.usefixtures("in_place_of_cards")
@pytest.mark.parametrize("case", LISTED[::3], ids=str)
def test_the_list_for_gpus_runs_and_is_met(case: tuple[str, str, Shape, torch.dtype]) -> None:
    wanted.test_products_equal_float64(*case)
    wanted.test_the_expanded_weight_is_that_of_the_format(*case)


@needs_compiler
@pytest.mark.usefixtures("in_place_of_cards")
@pytest.mark.parametrize("fault", ["last row missing", "one percent off"])
def test_the_list_for_gpus_sees_a_wrong_product(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    class Broken(type(BACKENDS["delta"])):  # type: ignore[misc]
        def multiply(
            self, x: Tensor, out: Tensor, prepared: list[Tensor], fmt: Format, shape: Shape
        ) -> None:
            whole = torch.empty_like(out)
            super().multiply(x, whole, prepared, fmt, shape)
            if fault == "last row missing":
                out[:, :-1] = whole[:, :-1]
            else:
                out.copy_(whole * 1.01)

    broken: Backend = Broken(BACKENDS["delta"]._device_of)
    monkeypatch.setitem(BACKENDS, "delta", broken)
    monkeypatch.setattr(wanted, "TOKENS", (2,))
    with pytest.raises(AssertionError):
        wanted.test_products_equal_float64(*LISTED[-1])
