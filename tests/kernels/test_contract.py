"""What every backend promises: the product that is meant, traceable by PyTorch, or a refusal.

`reference` is held against float64; the others that run on a CPU against `reference`, those of
GPUs in tests/test_gpu.py and, on emulated devices, in the files beside this one.
"""

from __future__ import annotations

import pytest
import torch
from alike import NEEDS_KERNELS
from pairs import pairwise
from weights import product, weight_of

from gblm.errors import PatternError, UsageError
from gblm.kernels import BACKENDS, Backend, linear, select
from gblm.kernels.few_tokens import FewTokens
from gblm.sparse.formats import Format, format_for, from_spec
from gblm.sparse.patterns import parse
from gblm.sparse.values import parse_values

PATTERNS = ["2:4", "4:8", "8:16", "1:4", "0.5", "0.9", "dense"]
VALUES = ["float", "int8:row", "int4:row", "int8:64", "int4:64"]
SHAPES = [(48, 64), (5, 24), (5, 48), (70, 8192)]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
TOKENS = (1, 2, 3, 17, 65)
CPU = torch.device("cpu")
# Columns that the compiled kernels take at once.
UNITS = {"float": 8}


def storable(pattern: str, values: str, shape: tuple[int, int], *_: object) -> bool:
    """Whether the columns divide into the pattern's and the values' groups."""
    try:
        make(pattern, values).check_shape("w", shape)
    except PatternError:
        return False
    return True


def cpu_serves(pattern: str, values: str, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """What the compiled kernels promise; written down here a second time."""
    whole = shape[1] % UNITS.get(values, 32) == 0
    return dtype == torch.bfloat16 and whole and storable(pattern, values, shape)


def make(pattern: str, values: str) -> Format:
    return format_for(parse(pattern), parse_values(values))


def multiply(
    backend: Backend, fmt: Format, parts: dict[str, torch.Tensor], x: torch.Tensor,
    shape: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    assert backend.refuses(fmt, shape, x.dtype, CPU) is None
    got = linear(x, backend.prepare(fmt, parts, shape, x.dtype), shape, fmt, backend)
    assert got.dtype == x.dtype
    return got.double()


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, columns: int) -> None:
    """Within the rounding of a sum of `columns` products of unit variance, with room to spare."""
    bound = 16 * torch.finfo(dtype).eps * columns**0.5
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


def drawn(dtype: torch.dtype, columns: int) -> torch.Tensor:
    return torch.randn(max(TOKENS), columns, generator=torch.Generator().manual_seed(1)).to(dtype)


FULL = [
    pytest.param(
        pattern, values, shape, dtype,
        marks=() if (shape, dtype) == (SHAPES[0], DTYPES[0]) else pytest.mark.slow,
    )
    for pattern in PATTERNS for values in VALUES for shape in SHAPES for dtype in DTYPES
    if storable(pattern, values, shape)
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "values", "shape", "dtype"), FULL, ids=str)
def test_reference_gives_the_float64_product(
    pattern: str, values: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    fmt, x = make(pattern, values), drawn(dtype, shape[1])
    weight = weight_of(fmt, shape, dtype)
    parts = fmt.pack("w", weight)
    for tokens in TOKENS:
        got = multiply(BACKENDS["reference"], fmt, parts, x[:tokens], shape)
        assert_close(got, product(weight, x[:tokens]), dtype, shape[1])


PAIRS = [("dense", *case) for case in pairwise(PATTERNS, VALUES, SHAPES, DTYPES, allowed=storable)]
PAIRS += [("cpu", *case)
          for case in pairwise(PATTERNS, VALUES, SHAPES, DTYPES, allowed=cpu_serves)]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "pattern", "values", "shape", "dtype"),
    [pytest.param(*case, marks=NEEDS_KERNELS if case[0] == "cpu" else ()) for case in PAIRS],
    ids=str,
)
def test_other_backends_give_what_reference_gives(
    backend: str, pattern: str, values: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    fmt, x = make(pattern, values), drawn(dtype, shape[1])
    parts = fmt.pack("w", weight_of(fmt, shape, dtype))
    for tokens in TOKENS:
        got = multiply(BACKENDS[backend], fmt, parts, x[:tokens], shape)
        want = multiply(BACKENDS["reference"], fmt, parts, x[:tokens], shape)
        assert_close(got, want, dtype, shape[1])


OPS = [
    pytest.param(*case, marks=[*([NEEDS_KERNELS] if case[0] == "cpu" else []),
                               *([pytest.mark.slow] if case[1] != "int8:32" else [])])
    for case in pairwise(["reference", "cpu", "dense"], ["float", "int8:32", "int4:row"],
                         ["2:4", "0.5"])
]  # fmt: skip


@pytest.mark.parametrize(("backend", "values", "pattern"), OPS)
def test_op_passes_opcheck_and_compiles_as_one_graph(
    backend: str, values: str, pattern: str
) -> None:
    fmt, shape = make(pattern, values), (16, 32)
    dtype = torch.bfloat16 if backend == "cpu" else torch.float32
    chosen = BACKENDS[backend]
    prepared = chosen.prepare(fmt, fmt.pack("w", weight_of(fmt, shape, dtype)), shape, dtype)
    x = torch.randn(2, 3, 32).to(dtype)
    if chosen.own_op:
        op, arguments = torch.ops.gblm.cpu_linear.default, (x, prepared[0], 16)
    else:
        op, arguments = torch.ops.gblm.linear.default, (x, prepared, [16, 32], fmt.spec, backend)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=checks)
    eager = linear(x, prepared, shape, fmt, chosen)
    assert eager.shape == (2, 3, 16)
    torch._dynamo.reset()  # it counts how often the same lambda was compiled in other cases
    compiled = torch.compile(
        lambda t: linear(t, prepared, shape, fmt, chosen), fullgraph=True, backend="aot_eager"
    )
    for tokens in (x, x[:1], torch.randn(17, 32).to(dtype), x[:0], x.transpose(0, 1)):
        expected = linear(tokens, prepared, shape, fmt, chosen)
        torch.testing.assert_close(compiled(tokens), expected)


@NEEDS_KERNELS
def test_first_backend_that_does_not_refuse_wins() -> None:
    fmt = make("2:4", "float")
    order = list(BACKENDS)
    assert order.index("delta") < order.index("triton") < order.index("reference")
    assert order.index("triton") < order.index("dense") < order.index("reference")
    backend, reasons = select(fmt, (8, 8), torch.bfloat16, CPU)
    assert backend is BACKENDS[order[0]]
    assert reasons == []
    backend, reasons = select(fmt, (8, 8), torch.float32, CPU)
    assert backend.name == "dense"
    assert reasons[0] == "cpu: activations must be bfloat16, not float32"
    assert reasons[1:] == [
        f"{name}: it runs on CUDA devices, not on cpu"
        for name in BACKENDS
        if BACKENDS[name].needs == "cuda"
    ]


BF16, FP32, FP16 = DTYPES
IN_PYTORCH = ("reference", "dense")
FLOATS_ONLY = "activations must be bfloat16 or float16, not float32"
# Those of GPUs say of a weight whether any device could serve it; None: it could.
REFUSALS = [
    ("cpu", "bitmask/0.5", (8, 8), FP16, "activations must be bfloat16, not float16"),
    ("cpu", "bitmask/0.5", (8, 12), BF16, "12 columns are not a multiple of 8"),
    ("cpu", "bitmask/0.5/int8:row", (8, 40), BF16, "40 columns are not a multiple of 32"),
    ("mma_sp", "nm/4:8", (16, 64), BF16, "the pattern must be 2:4, not 4:8"),
    ("mma_sp", "nm/2:4", (16, 64), FP32, FLOATS_ONLY),
    ("mma_sp", "nm/2:4/int4:32", (16, 64), FP16, None),
    ("delta", "dense/dense", (8, 64), BF16, "a dense weight has no zeros to leave out"),
    ("delta", "bitmask/0.5", (8, 64), FP32, FLOATS_ONLY),
    ("delta", "bitmask/0.5", (8, 65536), BF16, "65536 columns are more than 65535"),
    ("delta", "nm/4:8", (8, 64), FP16, None),
    ("triton", "dense/dense", (16, 64), BF16, "a dense weight has no zeros to leave out"),
    ("triton", "nm/2:4", (16, 64), FP32, FLOATS_ONLY),
    ("triton", "nm/2:4", (16, 65544), BF16, "65544 columns are more than 65536"),
    ("triton", "bitmask/0.5", (16, 65536), FP16, None),
]


@pytest.mark.parametrize(("name", "spec", "shape", "dtype", "reason"), REFUSALS, ids=str)
def test_backends_say_why_they_refuse_a_weight(
    name: str, spec: str, shape: tuple[int, int], dtype: torch.dtype, reason: str | None
) -> None:
    fmt, backend = from_spec(spec), BACKENDS[name]
    if isinstance(backend, FewTokens):
        assert backend.refuses_weight(fmt, shape, dtype) == reason
    else:
        assert backend.refuses(fmt, shape, dtype, CPU) == reason
        with pytest.raises(UsageError, match=f"{name}: {reason}"):
            select(fmt, shape, dtype, CPU, forced=name)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in IN_PYTORCH])
def test_compiled_backends_refuse_another_device(name: str) -> None:
    place, other = ("CPU", "cuda") if name == "cpu" else ("CUDA devices", "cpu")
    with pytest.raises(UsageError, match=f"{name}: it runs on {place}, not on {other}"):
        select(make("2:4", "float"), (16, 64), BF16, torch.device(other), forced=name)


@pytest.mark.parametrize("name", IN_PYTORCH)
def test_backends_in_pytorch_refuse_nothing(name: str) -> None:
    for device in ("cpu", "cuda"):
        place = torch.device(device)
        assert BACKENDS[name].refuses(make("0.9", "int4:32"), (1, 32), torch.float64, place) is None


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=", ".join(BACKENDS)):
        select(make("2:4", "float"), (8, 8), torch.float32, CPU, forced="cuda")
