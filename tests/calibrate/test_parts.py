"""Parts against autograd: what each parameter's gradient is, and that masks and formats stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gblm.calibrate.parts import Codes, Floats, SparsePart, sparse_part
from gblm.sparse.weights import SparseWeight

OUT, IN, GROUP = 8, 32, 8


def floats() -> SparseWeight:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator)
    return SparseWeight.cut(weight, torch.rand(OUT, IN, generator=generator) < 0.5)


def codes() -> SparseWeight:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(OUT, IN, generator=generator) < 0.5
    found = torch.randint(-7, 8, (OUT, IN), generator=generator).to(torch.int8) * mask
    scales = (torch.rand(OUT, IN // GROUP, generator=generator) + 0.5).to(torch.bfloat16)
    return SparseWeight.from_codes(found, scales, mask, torch.float32)


@pytest.mark.parametrize("train", ["weights", "scales"])
@pytest.mark.parametrize("make", [floats, codes])
def test_an_untrained_part_gives_its_weight_bit_for_bit(
    make: Callable[[], SparseWeight], train: str
) -> None:
    start = make()
    part = sparse_part(start, train)  # type: ignore[arg-type]
    assert torch.equal(part.give(), start.weight)
    result = part.result(torch.float32)
    assert torch.equal(result.weight, start.weight)
    assert torch.equal(result.mask, start.mask)
    if start.codes is not None:
        assert result.codes is not None
        assert result.scales is not None
        assert torch.equal(result.codes, start.codes)
        assert torch.equal(result.scales, start.scales)


@pytest.mark.parametrize("train", ["weights", "scales"])
def test_gradients_of_floats_and_their_factors_are_those_of_the_weight(train: str) -> None:
    part, grad = Floats(floats(), train), torch.randn(OUT, IN)  # type: ignore[arg-type]
    with torch.no_grad():
        part.rows += 0.1 * torch.randn(OUT, 1)
        part.columns += 0.1 * torch.randn(1, IN)
    parameters = (part.values, part.rows, part.columns)
    values, rows, columns = (p.detach().clone().requires_grad_() for p in parameters)
    dense = torch.zeros(OUT, IN).masked_scatter(part.places.mask(), values)
    (dense * (1 + rows) * (1 + columns)).backward(grad)
    part.take(grad)
    torch.testing.assert_close(part.rows.grad, rows.grad)
    torch.testing.assert_close(part.columns.grad, columns.grad)
    if train == "weights":
        torch.testing.assert_close(part.values.grad, values.grad)
    else:
        assert len(part.parameters) == 2


def through(codes: Tensor) -> Tensor:
    return codes + (codes.round() - codes).detach()


@pytest.mark.parametrize("train", ["weights", "scales"])
def test_gradients_of_codes_pass_their_rounding(train: str) -> None:
    start = codes()
    part, grad = Codes(start, train), torch.randn(OUT, IN)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter, *_ in part.parameters:
            parameter += 0.05 * torch.randn(parameter.shape)
    assert start.scales is not None
    factor = part.factor.detach().clone().requires_grad_()
    exact = start.scales.float() * factor.exp()
    scales = exact + (exact.to(torch.bfloat16).float() - exact).detach()
    each = scales.repeat_interleave(GROUP, dim=1)[start.mask]
    if part.values is None:
        value = start.codes[start.mask] * each  # type: ignore[index]
    else:
        own = part.values.detach().clone().requires_grad_()
        value = through((own / each).clamp(part.low, part.high)) * each
    value.backward(grad[start.mask])
    part.take(grad)
    # The factor's gradient is taken with the scale as it is stored.
    torch.testing.assert_close(part.factor.grad, factor.grad, rtol=2e-2, atol=1e-4)
    if part.values is not None:
        inside = (own / each).detach().abs() < part.high
        assert 0 < int(inside.sum()) <= len(inside)
        torch.testing.assert_close(part.values.grad, own.grad)


def test_trained_codes_stay_in_their_range_and_mask() -> None:
    part = Codes(codes(), "weights")
    assert part.values is not None
    with torch.no_grad():
        part.values += 20 * torch.randn(part.values.shape)
    result = part.result(torch.bfloat16)
    assert result.codes is not None
    assert int(result.codes.abs().max()) == 7
    assert not bool(result.codes[~part.places.mask()].any())
    assert torch.equal(result.mask, codes().mask)


def test_pruned_places_have_no_state() -> None:
    start = floats()
    part: SparsePart = Floats(start, "weights")
    count = sum(p.numel() for p, *_ in part.parameters)
    assert count == int(start.mask.sum()) + OUT + IN
