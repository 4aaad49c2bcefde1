"""The grouped call of a mixture of experts gives the bits of its linears, called one by one."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import product as product_of

import pytest
import torch
from alike import NEEDS_KERNELS
from cpu_cases import MASKS, activations, case, seeded
from torch import Tensor
from torch.nn import functional

from gblm.kernels import experts, native

pytestmark = NEEDS_KERNELS
VALUES = ("float", "int8", "int4")
HIDDEN, INNER, COUNT, CHOSEN = 96, 160, 6, 2
TOKENS = (0, 1, 2, 7, 64)
Layer = tuple[list[list[Tensor]], Tensor, Tensor]


@cache
def panels(rows: int, columns: int, values: str, mask: str, seed: int) -> Tensor:
    return case((rows, columns), values, mask, seed=seed).panels


def layer(
    kinds: Sequence[tuple[str, str]], step: int = 0, hidden: int = HIDDEN, inner: int = INNER
) -> Layer:
    """The linears of an expert for each kind of values and mask, and what `join` gives.

    Up and down have the kind that is so many steps further.
    """
    linears = [
        [panels(inner, hidden, *kinds[i], 3 * i),
         panels(inner, hidden, *kinds[(i + step) % len(kinds)], 3 * i + 1),
         panels(hidden, inner, *kinds[(i + 2 * step) % len(kinds)], 3 * i + 2)]
        for i in range(len(kinds))
    ]  # fmt: skip
    return linears, *experts.join(linears)


def routed(tokens: int, count: int = COUNT, chosen: int = CHOSEN) -> tuple[Tensor, Tensor]:
    """Different experts for each token; the last of all is never chosen."""
    order = torch.rand(tokens, count - 1, generator=seeded(tokens)).argsort(1)
    shares = torch.rand(tokens, chosen, generator=seeded(2))
    return order[:, :chosen].to(torch.int32), shares


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up as the kernels compute it: bfloat16 of two bfloat16 [tokens, features]."""
    sums = torch.cat([gate, up], 1).float()
    out = torch.empty(gate.shape)
    function = ctypes.CDLL(str(native.LIBRARY)).gblm_gate
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [pointer, number, number, pointer, pointer]
    function(sums.data_ptr(), *gate.shape, out.data_ptr(), None)
    return out.bfloat16()


def linear(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    out: Tensor = torch.ops.gblm.cpu_linear(x, weight, rows)
    return out


def expected(
    x: Tensor, ids: Tensor, shares: Tensor, linears: list[list[Tensor]], inner: int = INNER
) -> Tensor:
    """Each expert's linears for its own tokens; added up in the order in which they were chosen."""
    found = torch.zeros(*ids.shape, x.shape[1])
    for index in ids.unique().tolist():
        if index < 0:
            continue
        tokens, places = (ids == index).nonzero(as_tuple=True)
        gate, up, down = linears[index]
        between = gated(linear(x[tokens], gate, inner), linear(x[tokens], up, inner))
        found[tokens, places] = linear(between, down, x.shape[1]).float()
    total = torch.zeros(x.shape)
    for place in range(ids.shape[1]):
        total += shares[:, place, None] * found[:, place]
    return total.bfloat16()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("values", VALUES)
def test_the_grouped_call_gives_the_bits_of_the_linears(
    instructions: str, threads: None, values: str, mask: str
) -> None:
    linears, *joined = layer([(values, mask)] * COUNT)
    for count, tokens in product_of((1, 2), TOKENS):
        torch.set_num_threads(count)
        x, (ids, shares) = activations(tokens, HIDDEN), routed(tokens)
        got = experts.grouped(x, ids, shares, *joined)
        assert torch.equal(got, expected(x, ids, shares, linears)), (count, tokens)


@pytest.mark.parametrize("step", [0, 1])
def test_linears_may_be_stored_in_different_ways(instructions: str, step: int) -> None:
    kinds = [*product_of(VALUES, MASKS)]
    linears, *joined = layer(kinds, step)
    for tokens in (1, 5, 40, 150):
        x, (ids, shares) = activations(tokens, HIDDEN), routed(tokens, len(kinds), 8)
        got = experts.grouped(x, ids, shares, *joined)
        assert torch.equal(got, expected(x, ids, shares, linears)), tokens


def test_one_token_or_all_may_meet_one_expert(instructions: str) -> None:
    linears, *joined = layer([("int4", "8:16")] * COUNT)
    for tokens in (1, 33):
        x = activations(tokens, HIDDEN)
        for ids in (torch.full((tokens, 1), 4), torch.arange(COUNT).expand(tokens, COUNT)):
            shares = torch.rand(ids.shape, generator=seeded(1))
            got = experts.grouped(x, ids, shares, *joined)
            assert torch.equal(got, expected(x, ids, shares, linears))


def test_more_tokens_than_a_turn_takes() -> None:
    linears, *joined = layer([("int8", "2:4")] * COUNT)
    x, (ids, shares) = activations(1100, HIDDEN), routed(1100)
    got = experts.grouped(x, ids, shares, *joined)
    assert torch.equal(got, expected(x, ids, shares, linears))


def test_more_activations_than_are_packed_at_once(instructions: str) -> None:
    """More than 8 MB; gates and ups of two experts are packed apart."""
    kinds = [("float", "dense"), ("int8", "any"), ("float", "2:4"), ("float", "any")]
    linears, *joined = layer(kinds, 1, hidden=4096, inner=32)
    x, ids = activations(500, 4096), torch.arange(4).expand(500, 4)
    shares = torch.rand(500, 4, generator=seeded(2))
    got = experts.grouped(x, ids, shares, *joined)
    assert torch.equal(got, expected(x, ids, shares, linears, inner=32))


def test_a_negative_id_is_no_expert() -> None:
    linears, *joined = layer([("float", "any")] * COUNT)
    x, (ids, shares) = activations(9, HIDDEN), routed(9)
    ids[3] = -1
    ids[5, 0] = -7
    got = experts.grouped(x, ids, shares, *joined)
    assert torch.equal(got, expected(x, ids, shares, linears))
    assert not got[3].any()


def test_one_by_one_agrees_but_for_rounding() -> None:
    linears, *joined = layer([("float", "2:4")] * COUNT)
    x, (ids, shares) = activations(9, HIDDEN).clamp(-1, 1), routed(9)
    ids[2, 1] = -1
    callables = [
        tuple(lambda x, w=w, rows=rows: linear(x, w, rows)
              for w, rows in zip(expert, (INNER, INNER, HIDDEN), strict=True))
        for expert in linears
    ]  # fmt: skip
    want = experts.one_by_one(x, ids, shares, callables).float()
    got = experts.grouped(x, ids, shares, *joined).float()
    assert (got - want).norm() < 0.01 * want.norm()


def test_one_by_one_is_the_formula() -> None:
    weights = [
        [torch.randn(shape, generator=seeded(3 * i + j)).double() for j, shape in
         enumerate(((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)))]
        for i in range(COUNT)
    ]  # fmt: skip
    x, (ids, shares) = activations(5, HIDDEN).clamp(-1, 1), routed(5)
    ids[1, 0] = -1
    callables = [
        tuple(lambda x, w=w: functional.linear(x, w.to(x.dtype)) for w in expert)
        for expert in weights
    ]
    got = experts.one_by_one(x.double(), ids, shares, callables)
    want = torch.zeros(5, HIDDEN).double()
    for token, place in product_of(range(5), range(CHOSEN)):
        if ids[token, place] < 0:
            continue
        gate, up, down = weights[ids[token, place]]
        row = x[token].double()
        between = functional.silu(gate @ row) * (up @ row)
        want[token] += shares[token, place] * (down @ between)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)


def test_torch_compile_traces_it() -> None:
    _, *joined = layer([("int8", "any")] * COUNT)
    traced = torch.compile(experts.grouped, backend="eager", fullgraph=True)
    x, (ids, shares) = activations(7, HIDDEN), routed(7)
    want = experts.grouped(x, ids, shares, *joined)
    assert torch.equal(traced(x, ids, shares, *joined), want)
    meta = [tensor.to("meta") for tensor in (x, ids, shares, *joined)]
    assert experts.grouped(*meta).shape == want.shape


def test_leading_dimensions_are_kept() -> None:
    _, *joined = layer([("float", "dense")] * COUNT)
    x, (ids, shares) = activations(6, HIDDEN), routed(6)
    want = experts.grouped(x, ids, shares, *joined)
    got = experts.grouped(
        x.reshape(2, 3, HIDDEN), ids.reshape(2, 3, 2), shares.reshape(2, 3, 2), *joined
    )
    assert torch.equal(got.reshape(want.shape), want)


def test_what_does_not_fit_is_refused() -> None:
    linears, block, places = layer([("int8", "2:4")] * COUNT)
    x, (ids, shares) = activations(2, HIDDEN), routed(2)
    outside = ids.clone()
    outside[1, 1] = COUNT
    swapped = experts.join([expert[::-1] for expert in linears])
    far = places.clone()
    far[:, :, 0] = block.numel()
    damaged = block.clone()
    damaged[places[:, 0, 0]] ^= 1
    cases = [
        ((x, outside, shares, block, places), "an argument is out of range"),
        ((x, ids, shares, *swapped), "an argument is out of range"),
        ((x[:, :64], ids, shares, block, places), "an argument is out of range"),
        ((x, ids, shares, block, far), "the panels are damaged"),
        ((x, ids, shares, damaged, places), "the panels are damaged"),
        ((x, ids[:1], shares, block, places), "ids and shares must have as many"),
        ((x, ids, shares[:, :1], block, places), "ids and shares must have as many"),
        ((x, ids, shares, block, places.flatten()[:-1]), "places must be"),
    ]
    for arguments, sentence in cases:
        with pytest.raises(RuntimeError, match=sentence):
            experts.grouped(*arguments)


def test_experts_are_aligned_in_one_block() -> None:
    linears, block, places = layer([("int4", "any"), ("float", "any")])
    assert places[:, :, 0].remainder(experts.ALIGNMENT).eq(0).all()
    flat = [weight for expert in linears for weight in expert]
    for weight, (start, size) in zip(flat, places.reshape(-1, 2), strict=True):
        assert torch.equal(block[start : start + size], weight)
