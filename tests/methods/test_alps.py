"""ALPS; what every method promises stands in test_contract.py."""

from __future__ import annotations

import pytest
import torch

from gblm.errors import InputError
from gblm.methods import make_method
from gblm.methods.refit import Refit
from gblm.sparse.patterns import parse
from gblm.sparse.weights import SparseWeight


def problem(rows: int = 48, cols: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [rows, cols] and the Hessian of inputs with a few strong directions."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    spectrum = torch.logspace(0, -2, cols).unsqueeze(1)
    mix = spectrum * torch.randn(cols, cols, generator=generator) / cols**0.5
    inputs = torch.randn(8 * cols, cols, generator=generator) @ (0.1 * torch.eye(cols) + mix)
    inputs *= torch.linspace(0.3, 3, cols)
    return weight, 2 * inputs.t() @ inputs


def prune(
    name: str, weight: torch.Tensor, hessian: torch.Tensor, pattern: str, **options: object
) -> SparseWeight:
    method = make_method(name, options)
    return method.prune(weight, method.prepare({"hessian": hessian}), parse(pattern))


def error(pruned: SparseWeight, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = (pruned.weight - weight).double()
    return float((difference @ hessian.double() * difference).sum())


@pytest.mark.parametrize("pattern", ["0.5", "0.8", "2:4", "4:8", "8:16"])
def test_output_error_is_below_that_of_other_masks(pattern: str) -> None:
    weight, hessian = problem()
    ours = error(prune("alps", weight, hessian, pattern), weight, hessian)
    magnitude = prune("magnitude", weight, hessian, pattern)
    refitted = error(Refit().apply(weight, magnitude, hessian), weight, hessian)
    assert ours < 0.8 * refitted
    assert ours < 1.01 * error(prune("sparsegpt", weight, hessian, pattern), weight, hessian)


def test_iterations_are_worth_more_than_the_refit() -> None:
    weight, hessian = problem()
    one = error(prune("alps", weight, hessian, "2:4", max_iterations=1), weight, hessian)
    assert error(prune("alps", weight, hessian, "2:4"), weight, hessian) < 0.8 * one


def test_little_is_left_to_refit() -> None:
    weight, hessian = problem()
    pruned = prune("alps", weight, hessian, "2:4")
    again = Refit(iterations=96).apply(weight, pruned, hessian)
    assert error(again, weight, hessian) > 0.98 * error(pruned, weight, hessian)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_uncorrelated_inputs_come_near_the_optimum(pattern: str) -> None:
    weight, _ = problem()
    norms = torch.linspace(0.5, 2, 96)
    hessian, rule = norms.square().diag(), parse(pattern)
    pruned = prune("alps", weight, hessian, pattern)
    best = SparseWeight.cut(weight, rule.keep(weight.square() * norms.square(), "matrix"))
    least = error(best, weight, hessian)
    assert least <= error(pruned, weight, hessian) < 1.03 * least
    kept = torch.where(pruned.mask, weight, 0)
    torch.testing.assert_close(pruned.weight, kept, rtol=1e-4, atol=1e-5)


def test_scale_of_the_hessian_makes_no_difference() -> None:
    weight, hessian = problem()
    one, other = (prune("alps", weight, h, "2:4") for h in (hessian, hessian * 2**20))
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    weight, hessian = problem()
    half = prune("alps", weight.to(dtype), hessian, "2:4")
    full = prune("alps", weight.to(dtype).float(), hessian, "2:4")
    assert torch.equal(half.mask, full.mask)
    assert torch.equal(half.weight, full.weight.to(dtype))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_inputs_that_are_always_zero_go_first(pattern: str) -> None:
    weight, hessian = problem()
    dead = [1, 2, 5, 95]
    hessian[dead], hessian[:, dead] = 0, 0
    pruned = prune("alps", weight, hessian, pattern)
    assert not pruned.mask[:, dead].any()
    assert int(pruned.mask.sum()) == 48 * 48


def test_dead_inputs_beyond_the_budget_are_kept_as_zeros() -> None:
    pruned = prune("alps", torch.randn(4, 8), torch.zeros(8, 8), "2:4")
    # All scores tie, so the lowest index goes first.
    assert pruned.mask.tolist() == [[False, False, True, True] * 2] * 4
    assert torch.equal(pruned.weight, torch.zeros(4, 8))


def test_inputs_are_not_changed() -> None:
    weight, hessian = problem()
    before = weight.clone(), hessian.clone()
    prune("alps", weight, hessian, "2:4")
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_prepare_scales_and_decomposes() -> None:
    _, hessian = problem()
    made = make_method("alps", {}).prepare({"hessian": hessian, "other": torch.ones(1)})
    scaled, vectors = made["scaled"], made["eigenvectors"]
    torch.testing.assert_close(scaled.diagonal(), torch.ones(96))
    torch.testing.assert_close(vectors * made["eigenvalues"] @ vectors.t(), scaled)
    undone = scaled * made["scale"] * made["scale"].unsqueeze(1)
    undone.diagonal().sub_(0.01 * hessian.diagonal().mean())
    torch.testing.assert_close(undone, hessian, rtol=1e-4, atol=1.0)
    assert "hessian" not in made
    assert "other" in made


def test_a_hessian_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(InputError, match="q_proj: the Hessian has no eigendecomposition"):
        make_method("alps", {}).prepare({"hessian": torch.full((8, 8), torch.nan)}, "q_proj")
