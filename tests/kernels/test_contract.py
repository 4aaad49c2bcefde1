"""What every backend promises: the same product as a float64 reference, traceable by PyTorch."""

from __future__ import annotations

import pytest
import torch

from gblm.errors import UsageError
from gblm.formats import Format, make_format
from gblm.kernels import BACKENDS, linear, select
from gblm.values import quantize
from gblm.weights import SparseWeight

FORMATS = [("nm", "2:4"), ("nm", "4:8"), ("nm", "1:4"), ("bitmask", "0.5"), ("bitmask", "0.9"),
           ("dense", "dense")]  # fmt: skip
SHAPES = [(48, 64), (5, 24), (70, 8192)]
INTEGERS = [(values, shape) for values in ("int8:row", "int4:row", "int8:64", "int4:64")
            for shape in SHAPES if values.endswith("row") or shape[1] % 64 == 0]  # fmt: skip
CPU = torch.device("cpu")


def tolerance(dtype: torch.dtype, columns: int) -> float:
    """Rounding error of a sum of `columns` products of unit variance, with room to spare."""
    return 16 * torch.finfo(dtype).eps * columns**0.5


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
    sparse, parts = case(name, pattern, shape, dtype)
    x = torch.randn(num_tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    fmt = make_format(name, pattern)
    chosen, _ = select(fmt, shape, dtype, CPU, forced=backend)
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
    fmt = make_format(name, pattern, values)
    sparse, parts = integer_case(fmt, shape)
    x = torch.randn(num_tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    chosen, _ = select(fmt, shape, dtype, CPU, forced=backend)
    got = linear(x, chosen.prepare(fmt, parts, shape, dtype), shape, fmt, chosen)
    want = x.double() @ sparse.weight.double().t()
    assert got.dtype == dtype
    bound = tolerance(dtype, shape[1])
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values", ["float", "int8:32", "int4:row"])
@pytest.mark.parametrize(("name", "pattern"), [("nm", "2:4"), ("bitmask", "0.5")])
def test_op_passes_opcheck_and_compiles_as_one_graph(
    backend: str, name: str, pattern: str, values: str
) -> None:
    fmt, shape = make_format(name, pattern, values), (16, 32)
    if fmt.values.is_float:
        _, parts = case(name, pattern, shape, torch.float32)
    else:
        _, parts = integer_case(fmt, shape)
    prepared = BACKENDS[backend].prepare(fmt, parts, shape, torch.float32)
    x = torch.randn(2, 3, 32)
    arguments = (x, prepared, [16, 32], fmt.spec, backend)
    torch.library.opcheck(
        torch.ops.gblm.linear.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    eager = linear(x, prepared, shape, fmt, BACKENDS[backend])
    assert eager.shape == (2, 3, 16)
    compiled = torch.compile(
        lambda t: linear(t, prepared, shape, fmt, BACKENDS[backend]),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(x), eager)


def test_first_backend_that_does_not_refuse_wins() -> None:
    backend, reasons = select(make_format("nm", "2:4"), (8, 8), torch.float32, CPU)
    assert backend is next(iter(BACKENDS.values()))
    assert reasons == []


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="reference, dense"):
        select(make_format("nm", "2:4"), (8, 8), torch.float32, CPU, forced="cuda")
