"""What every backend promises: the same product as a float64 reference, traceable by PyTorch."""

from __future__ import annotations

import re

import pytest
import torch

from gblm.errors import UsageError
from gblm.formats import Format, make_format
from gblm.kernels import BACKENDS, Backend, linear, native, select
from gblm.values import quantize
from gblm.weights import SparseWeight

FORMATS = [("nm", "2:4"), ("nm", "4:8"), ("nm", "8:16"), ("nm", "1:4"), ("bitmask", "0.5"),
           ("bitmask", "0.9"), ("dense", "dense")]  # fmt: skip
SHAPES = [(48, 64), (5, 24), (70, 8192)]
KINDS = ("int8:row", "int4:row", "int8:64", "int4:64", "uint4:row", "uint4:64", "fp8:64")
INTEGERS = [(values, shape) for values in KINDS
            for shape in SHAPES if values.endswith("row") or shape[1] % 64 == 0]  # fmt: skip
CPU = torch.device("cpu")


def tolerance(dtype: torch.dtype, columns: int) -> float:
    """Rounding error of a sum of `columns` products of unit variance, with room to spare."""
    return 16 * torch.finfo(dtype).eps * columns**0.5


def fitted(pattern: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape, twice as wide where it would cut a group of 8:16."""
    return (shape[0], 2 * shape[1]) if pattern == "8:16" and shape[1] % 16 else shape


def case(
    name: str, pattern: str, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[SparseWeight, dict[str, torch.Tensor]]:
    fmt = make_format(name, pattern)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    sparse = SparseWeight.cut(weight, fmt.pattern.keep(weight.float().abs(), "row"))
    return sparse, fmt.pack("w", sparse)


def integer_case(
    fmt: Format, shape: tuple[int, int]
) -> tuple[SparseWeight, dict[str, torch.Tensor]]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sparse = quantize(weight, fmt.pattern.keep(weight.abs(), "row"), fmt.values)
    return sparse, fmt.pack("w", sparse)


def serving(
    backend: str, fmt: Format, shape: tuple[int, int], dtype: torch.dtype
) -> Backend | None:
    """The backend, or None after checking that it refuses where it may, and says why."""
    reason = BACKENDS[backend].refuses(fmt, shape, dtype, CPU)
    if reason is None:
        return BACKENDS[backend]
    if BACKENDS[backend].needs == "cuda":
        assert reason == "it runs on CUDA devices, not on cpu"
        return None
    unit = 8 if fmt.values.is_float or fmt.values.is_fp8 else 32
    may = dtype != torch.bfloat16 or shape[1] % unit or native.refusal() is not None
    assert backend == "cpu"
    assert may, reason
    with pytest.raises(UsageError, match=re.escape(f"{backend}: {reason}")):
        select(fmt, shape, dtype, CPU, forced=backend)
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 17, 65])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "pattern"), FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_equals_the_float64_product(
    backend: str,
    name: str,
    pattern: str,
    shape: tuple[int, int],
    num_tokens: int,
    dtype: torch.dtype,
) -> None:
    shape = fitted(pattern, shape)
    sparse, parts = case(name, pattern, shape, dtype)
    x = torch.randn(num_tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    fmt = make_format(name, pattern)
    chosen = serving(backend, fmt, shape, dtype)
    if chosen is None:
        return
    got = linear(x, chosen.prepare(fmt, parts, shape, dtype), shape, fmt, chosen)
    want = x.double() @ sparse.weight.double().t()
    assert got.dtype == dtype
    bound = tolerance(dtype, shape[1])
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 17])
@pytest.mark.parametrize(("values", "shape"), INTEGERS, ids=str)
@pytest.mark.parametrize(("name", "pattern"), FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_of_codes_equals_the_float64_product(
    backend: str,
    name: str,
    pattern: str,
    values: str,
    shape: tuple[int, int],
    num_tokens: int,
    dtype: torch.dtype,
) -> None:
    fmt, shape = make_format(name, pattern, values), fitted(pattern, shape)
    sparse, parts = integer_case(fmt, shape)
    x = torch.randn(num_tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    chosen = serving(backend, fmt, shape, dtype)
    if chosen is None:
        return
    got = linear(x, chosen.prepare(fmt, parts, shape, dtype), shape, fmt, chosen)
    want = x.double() @ sparse.weight.double().t()
    assert got.dtype == dtype
    bound = tolerance(dtype, shape[1])
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values", ["float", "int8:32", "int4:row", "uint4:32", "fp8:32"])
@pytest.mark.parametrize(("name", "pattern"), [("nm", "2:4"), ("bitmask", "0.5")])
def test_op_passes_opcheck_and_compiles_as_one_graph(
    backend: str, name: str, pattern: str, values: str
) -> None:
    fmt, shape = make_format(name, pattern, values), (16, 32)
    dtype = torch.bfloat16 if backend == "cpu" else torch.float32
    chosen = serving(backend, fmt, shape, dtype)
    if chosen is None:
        return
    if fmt.values.is_float:
        _, parts = case(name, pattern, shape, dtype)
    else:
        _, parts = integer_case(fmt, shape)
    prepared = chosen.prepare(fmt, parts, shape, dtype)
    x = torch.randn(2, 3, 32).to(dtype)
    if chosen.own_op:
        op, arguments = torch.ops.gblm.cpu_linear.default, (x, prepared[0], 16)
    else:
        op, arguments = torch.ops.gblm.linear.default, (x, prepared, [16, 32], fmt.spec, backend)
    checks = ["test_faketensor", "test_aot_dispatch_dynamic"]
    if torch.float8_e4m3fn not in {tensor.dtype for tensor in prepared}:
        checks.append("test_schema")  # it multiplies arguments, which PyTorch cannot for these
    torch.library.opcheck(op, arguments, test_utils=tuple(checks))
    eager = linear(x, prepared, shape, fmt, chosen)
    assert eager.shape == (2, 3, 16)
    torch._dynamo.reset()  # it counts how often the same lambda was compiled in other cases
    compiled = torch.compile(
        lambda t: linear(t, prepared, shape, fmt, chosen), fullgraph=True, backend="aot_eager"
    )
    for tokens in (x, x[:1], torch.randn(17, 32).to(dtype), x[:0], x.transpose(0, 1)):
        expected = linear(tokens, prepared, shape, fmt, chosen)
        torch.testing.assert_close(compiled(tokens), expected)


@pytest.mark.skipif(native.refusal() is not None, reason=f"no CPU kernels: {native.refusal()}")
def test_first_backend_that_does_not_refuse_wins() -> None:
    fmt = make_format("nm", "2:4")
    backend, reasons = select(fmt, (8, 8), torch.bfloat16, CPU)
    assert backend is next(iter(BACKENDS.values()))
    assert reasons == []
    backend, reasons = select(fmt, (8, 8), torch.float32, CPU)
    assert backend.name == "reference"
    assert reasons[0] == "cpu: activations must be bfloat16, not float32"
    assert reasons[1:] == [
        f"{name}: it runs on CUDA devices, not on cpu"
        for name in BACKENDS
        if BACKENDS[name].needs == "cuda"
    ]


@pytest.mark.skipif(native.refusal() is not None, reason=f"no CPU kernels: {native.refusal()}")
@pytest.mark.parametrize("group", ["fp8:row", "fp8:32"])
@pytest.mark.parametrize(("name", "pattern"), FORMATS)
def test_cpu_holds_what_fp8_codes_stand_for_as_bfloat16(
    name: str, pattern: str, group: str
) -> None:
    fmt, floats, shape = make_format(name, pattern, group), make_format(name, pattern), (21, 96)
    sparse, parts = integer_case(fmt, shape)
    panels = BACKENDS["cpu"].prepare(fmt, parts, shape)[0]
    same = floats.pack("w", SparseWeight(sparse.weight.bfloat16(), fmt.mask(parts)))
    assert torch.equal(panels, BACKENDS["cpu"].prepare(floats, same, shape)[0])
    backend, reasons = select(fmt, shape, torch.bfloat16, CPU)
    assert (backend.name, reasons) == ("cpu", ["cpu: fp8 values as bfloat16, rounded once"])
    assert select(floats, shape, torch.bfloat16, CPU)[1] == []


@pytest.mark.parametrize(
    ("values", "shape", "dtype", "device", "reason"),
    [
        ("float", (8, 8), torch.bfloat16, "cuda", "it runs on CPU, not on cuda"),
        ("float", (8, 8), torch.float16, "cpu", "activations must be bfloat16, not float16"),
        ("float", (8, 12), torch.bfloat16, "cpu", "12 columns are not a multiple of 8"),
        ("int8:row", (8, 40), torch.bfloat16, "cpu", "40 columns are not a multiple of 32"),
    ],
)
def test_cpu_backend_says_why_it_refuses(
    values: str, shape: tuple[int, int], dtype: torch.dtype, device: str, reason: str
) -> None:
    fmt = make_format("bitmask", "0.5", values)
    assert BACKENDS["cpu"].refuses(fmt, shape, dtype, torch.device(device)) == reason


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=", ".join(BACKENDS)):
        select(make_format("nm", "2:4"), (8, 8), torch.float32, CPU, forced="cuda")
