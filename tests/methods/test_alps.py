"""ALPS; what every method promises stands in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from correlated import output_error

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


@pytest.mark.parametrize("pattern", ["0.5", "0.8", "2:4", "4:8", "8:16"])
def test_output_error_is_below_that_of_other_masks(pattern: str) -> None:
    weight, hessian = problem()
    ours = output_error(weight, prune("alps", weight, hessian, pattern), hessian)
    magnitude = prune("magnitude", weight, hessian, pattern)
    refitted = Refit().apply(weight, magnitude, hessian)
    assert ours < 0.8 * output_error(weight, refitted, hessian)
    assert ours < 1.01 * output_error(weight, prune("sparsegpt", weight, hessian, pattern), hessian)


def test_iterations_are_worth_more_than_the_refit() -> None:
    weight, hessian = problem()
    one = output_error(weight, prune("alps", weight, hessian, "2:4", max_iterations=1), hessian)
    assert output_error(weight, prune("alps", weight, hessian, "2:4"), hessian) < 0.8 * one


def test_little_is_left_to_refit() -> None:
    weight, hessian = problem()
    pruned = prune("alps", weight, hessian, "2:4")
    again = Refit(iterations=96).apply(weight, pruned, hessian)
    assert output_error(weight, again, hessian) > 0.98 * output_error(weight, pruned, hessian)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_uncorrelated_inputs_come_near_the_optimum(pattern: str) -> None:
    weight, _ = problem()
    norms = torch.linspace(0.5, 2, 96)
    hessian, rule = norms.square().diag(), parse(pattern)
    pruned = prune("alps", weight, hessian, pattern)
    best = SparseWeight.cut(weight, rule.keep(weight.square() * norms.square(), "matrix"))
    least = output_error(weight, best, hessian)
    assert least <= output_error(weight, pruned, hessian) < 1.03 * least
    kept = torch.where(pruned.mask, weight, 0)
    torch.testing.assert_close(pruned.weight, kept, rtol=1e-4, atol=1e-5)


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
