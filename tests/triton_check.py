"""The Triton kernels in Triton's interpreter, on a CPU; tests/kernels/test_triton.py runs this.

Every access is checked against the arrays of its launch, and outputs are NaN before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from weights import every_code, moved, product, weight_of

from gblm.kernels import experts
from gblm.kernels.experts import Stack, one_by_one, stacked
from gblm.kernels.triton.backend import Pairs, Triton
from gblm.sparse.formats import Format, from_spec, make_format
from gblm.sparse.weights import SparseWeight

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported.")

BF16, FP16 = torch.bfloat16, torch.float16
# Every value type and group size class; rows that are no whole block, columns that are no word.
VALUES = [
    ("float", (37, 200), BF16),
    ("float", (5, 8), FP16),
    ("float", (9, 1096), FP16),
    ("int8:row", (19, 136), BF16),
    ("int8:32", (33, 96), FP16),
    ("int8:128", (5, 1280), BF16),
    ("int4:row", (21, 72), FP16),
    ("int4:96", (7, 288), BF16),
    ("int4:256", (3, 1536), FP16),
]
# Patterns, and every how many-th of VALUES they meet: other masks take the same way as 0.5.
PATTERNS = [("nm", "2:4", 1), ("bitmask", "0.5", 1), ("nm", "4:8", 3), ("bitmask", "0.9", 4)]
CASES = [(name, pattern, *case) for name, pattern, step in PATTERNS for case in VALUES[::step]]
UNITS = 64


class Watched:
    """Triton's loads and stores; AssertionError for one outside the arguments of the launch."""

    def __init__(self, real: Any) -> None:
        self.real, self.spans = real, np.zeros((0, 2), dtype=np.uint64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def load(self, at: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.check(at, mask, np.dtype(dtype).itemsize)
        return self.real.load(at, mask, other, dtype)

    def store(self, at: Any, value: Any, mask: Any) -> Any:
        self.check(at, mask, value.itemsize)
        return self.real.store(at, value, mask)

    def check(self, at: Any, mask: Any, size: int) -> None:
        used = at[mask].astype(np.uint64)
        assert not (used % np.uint64(size)).any(), "an access that is not aligned"
        begin = np.searchsorted(self.spans[:, 0], used, side="right") - 1
        inside = begin >= 0
        inside &= used + np.uint64(size) <= self.spans[begin, 1] if len(self.spans) else False
        assert inside.all(), "an access out of bounds"


@pytest.fixture(scope="module", autouse=True)
def watched() -> Iterator[Watched]:
    from triton.runtime import interpreter

    watch = Watched(interpreter._interpreter)
    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        spans = sorted(
            (one.data_ptr(), one.data_ptr() + one.nbytes)
            for one in arguments if isinstance(one, torch.Tensor) and one.numel()
        )  # fmt: skip
        watch.spans = np.array(spans, dtype=np.uint64).reshape(-1, 2)
        return run(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", watch)
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        torch.use_deterministic_algorithms(True)  # fills what new_empty gives with NaN
        yield watch
        torch.use_deterministic_algorithms(False)


def prepared_case(
    name: str, pattern: str, values: str, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Format, SparseWeight, list[torch.Tensor]]:
    fmt = make_format(name, pattern, values)
    weight = weight_of(fmt, shape, dtype)
    return fmt, weight, Triton().prepare(fmt, fmt.pack("w", weight), shape, dtype)


def activations(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(("name", "pattern", "values", "shape", "dtype"), CASES, ids=str)
def test_kernels_give_the_float64_product(
    name: str, pattern: str, values: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    fmt, weight, prepared = prepared_case(name, pattern, values, shape, dtype)
    backend = Triton(lambda _: UNITS)
    for tokens in (1, 5, 16):
        x = activations(tokens, shape[1], dtype)
        got = backend.linear(x, prepared, fmt, shape)
        assert got.dtype == dtype
        # Sums are float32: the only error is that of rounding the result once.
        bound = torch.finfo(dtype).eps / 2
        want = product(weight, x)
        torch.testing.assert_close(got.double(), want, rtol=1.01 * bound, atol=1e-5 * bound**0.5)
    dense = backend.expand(x, prepared, fmt, shape)
    assert torch.equal(dense, fmt.expand(fmt.pack("w", weight), dtype))
    assert not torch.signbit(dense[dense == 0]).any()


@pytest.mark.parametrize("tokens", [1, 3])
def test_shares_of_columns_add_up_whatever_their_number(tokens: int) -> None:
    shape = (5, 1096)
    fmt, weight, prepared = prepared_case("nm", "2:4", "float", shape, BF16)
    x = activations(tokens, shape[1], BF16)
    for units in (0, 64):
        got = Triton(lambda _, units=units: units).linear(x, prepared, fmt, shape)
        torch.testing.assert_close(got.double(), product(weight, x), rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("values", ["int8:row", "int4:row"])
@pytest.mark.parametrize(("name", "pattern"), [("nm", "2:4"), ("bitmask", "0.5")])
def test_every_code_is_widened_exactly(
    name: str, pattern: str, values: str, dtype: torch.dtype
) -> None:
    fmt, shape, backend = make_format(name, pattern, values), (16, 512), Triton(lambda _: 1)
    weight = every_code(fmt, dtype)
    prepared = backend.prepare(fmt, fmt.pack("w", weight), shape, dtype)
    codes, x = weight.codes.to(dtype), torch.empty(1, 512, dtype=dtype)
    assert torch.equal(backend.expand(x, prepared, fmt, shape), codes)
    # A token that sees one column has its codes as the sum: nothing is rounded on the way.
    eye = torch.zeros(1, 512, dtype=dtype)
    for column in (1, 508):
        eye.zero_()[0, column] = 1
        for x in (eye, eye.expand(2, 512)):
            got = backend.linear(x, prepared, fmt, shape)
            assert torch.equal(got, codes[:, column].expand(len(x), 16))


def test_a_small_negative_product_is_positive_zero() -> None:
    fmt, shape = make_format("bitmask", "0.5", "int8:row"), (16, 32)
    mask = torch.ones(shape, dtype=torch.bool)
    codes, scales = torch.full(shape, -1, dtype=torch.int8), torch.full((16, 1), 1e-9, dtype=BF16)
    weight = SparseWeight.from_codes(codes, scales, mask, FP16)
    backend = Triton()
    prepared = backend.prepare(fmt, fmt.pack("w", weight), shape, FP16)
    dense = backend.expand(torch.empty(1, 32, dtype=FP16), prepared, fmt, shape)
    assert not dense.any()
    assert not torch.signbit(dense).any()


def test_a_weight_that_keeps_nothing() -> None:
    fmt, shape = make_format("bitmask", "0.5"), (16, 32)
    nothing = SparseWeight.cut(torch.ones(shape, dtype=BF16), torch.zeros(shape, dtype=torch.bool))
    backend = Triton(lambda _: 1)
    prepared = backend.prepare(fmt, fmt.pack("w", nothing), shape, BF16)
    for tokens in (1, 2, 17):
        assert not backend.linear(activations(tokens, 32, BF16), prepared, fmt, shape).any()


@pytest.mark.parametrize("name", ["nm", "bitmask"])
@pytest.mark.parametrize("values", ["float", "int4:row"])
def test_an_access_out_of_bounds_is_noticed(name: str, values: str) -> None:
    from triton.runtime.errors import InterpreterError

    pattern, shape = {"nm": "2:4", "bitmask": "0.5"}[name], (16, 64)
    fmt, _, prepared = prepared_case(name, pattern, values, shape, BF16)
    short = [prepared[0].reshape(-1)[:-1], *prepared[1:]]
    for tokens in (1, 2):
        with pytest.raises(InterpreterError, match="an access out of bounds"):
            Triton(lambda _: 1).linear(activations(tokens, 64, BF16), short, fmt, shape)


# Of an expert's linear; rows that are no whole block, columns that are no word; shares of columns.
EXPERT_CASES = [
    ("nm/2:4", (37, 200), BF16),
    ("nm/2:4/int8:row", (19, 136), FP16),
    ("nm/2:4/int4:32", (7, 1120), BF16),
    ("bitmask/0.5", (9, 72), FP16),
    ("bitmask/0.5/int8:32", (33, 96), BF16),
    ("bitmask/0.5/int4:row", (21, 72), FP16),
    ("nm/4:8/int4:96", (7, 288), BF16),
    ("nm/8:16/int8:32", (11, 160), BF16),
]
HIDDEN, INNER = 64, 32


def stack_of(
    fmt: Format, shape: tuple[int, int], dtype: torch.dtype, count: int, first: int = 0
) -> tuple[list[SparseWeight], Stack]:
    """Weights of so many experts, none like another: rows have moved."""
    weights = [moved(weight_of(fmt, shape, dtype), first + index) for index in range(count)]
    parts = fmt.join([fmt.pack("w", weight) for weight in weights])
    prepared = Triton().prepare(fmt, parts, (count * shape[0], shape[1]), dtype)
    return weights, Stack(fmt, shape, prepared)


def routed(tokens: int, count: int, chosen: int) -> torch.Tensor:
    """Different experts for each token; the last of all is never chosen."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, count - 1, generator=generator).argsort(1)[:, :chosen]


@pytest.mark.parametrize("chosen", [1, 2])
@pytest.mark.parametrize(("spec", "shape", "dtype"), EXPERT_CASES, ids=str)
def test_each_pair_gives_the_float64_product_of_its_expert(
    spec: str, shape: tuple[int, int], dtype: torch.dtype, chosen: int
) -> None:
    weights, stack = stack_of(from_spec(spec), shape, dtype, 4)
    bound = torch.finfo(dtype).eps / 2
    for tokens in (1, 3, 8):
        x, ids = activations(tokens, shape[1], dtype), routed(tokens, 4, chosen)
        ids[0, 1:] = ids[2:3, 0] = -1
        # An x for each token, as gate and up have it, and one for each pair, as down has it.
        for lines in (x, activations(tokens * chosen, shape[1], dtype)):
            out = torch.full((ids.numel(), shape[0]), torch.nan, dtype=dtype)
            pairs = Pairs.of(ids, 4)
            Triton(lambda _: UNITS).multiply(lines, out, stack.prepared, stack.fmt, shape, pairs)
            for pair, index in enumerate(ids.flatten().tolist()):
                if index < 0:
                    assert out[pair].isnan().all(), "a pair without an expert was written"
                    continue
                line = lines[pair * len(lines) // ids.numel()]
                want = product(weights[index], line[None])[0]
                torch.testing.assert_close(
                    out[pair].double(), want, rtol=1.01 * bound, atol=1e-5 * bound**0.5
                )


def assert_a_layer_is_that_of_its_experts(
    specs: tuple[str, str, str], ids: torch.Tensor, count: int
) -> None:
    sides = [
        stack_of(from_spec(spec), shape, BF16, count, 40 * place)
        for place, (spec, shape) in enumerate(
            zip(specs, ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)), strict=True)
        )
    ]
    linears = [
        tuple(lambda x, w=weights[index]: product(w, x).to(BF16) for weights, _ in sides)
        for index in range(count)
    ]
    x, shares = activations(len(ids), HIDDEN, BF16), torch.rand(ids.shape)
    got = stacked(x, ids, shares, [one for _, one in sides], count, Triton(lambda _: UNITS))
    want = one_by_one(x, ids, shares, linears)
    assert got.dtype == BF16
    # Sums in another order may be rounded to the neighbour.
    assert (got.double() - want.double()).norm() <= 2e-3 * want.double().norm()


@pytest.mark.parametrize("chosen", [1, 2, 8])
@pytest.mark.parametrize("values", ["", "/int8:32", "/int4:row"])
def test_a_layer_in_three_launches_is_that_of_its_experts(values: str, chosen: int) -> None:
    specs = (f"nm/2:4{values}", f"bitmask/0.5{values}", f"nm/2:4{values}")
    for tokens in (1, 2, 8):
        ids = routed(tokens, 9, chosen).int()
        ids[4:6] = -1  # another rank has them
        assert_a_layer_is_that_of_its_experts(specs, ids, 9)


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_all_tokens_may_choose_one_expert_or_all_of_them(tokens: int) -> None:
    specs = ("nm/2:4", "nm/2:4/int8:row", "bitmask/0.5")
    for ids in (torch.full((tokens, 1), 1), torch.arange(2).expand(tokens, 2)):
        assert_a_layer_is_that_of_its_experts(specs, ids, 2)


def test_many_tokens_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "TURN", 3)
    specs = ("bitmask/0.5", "nm/2:4", "nm/2:4")
    assert_a_layer_is_that_of_its_experts(specs, routed(7, 3, 2), 3)


def test_no_token_and_no_expert_of_this_rank_give_zeros() -> None:
    stacks = [stack_of(from_spec("nm/2:4"), (32, 32), BF16, 2)[1]] * 3
    for tokens in (0, 3):
        ids, x = torch.full((tokens, 2), -1), torch.ones(tokens, 32, dtype=BF16)
        got = stacked(x, ids, torch.ones(tokens, 2), stacks, 2, Triton(lambda _: 1))
        assert got.shape == x.shape
        assert not got.any()
