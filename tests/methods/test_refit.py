"""Refit: least squares on the support of a mask."""

from __future__ import annotations

import pytest
import torch
from correlated import problem

from gblm.errors import UsageError
from gblm.methods import make_method
from gblm.methods.refit import Refit, damped
from gblm.sparse.patterns import parse
from gblm.sparse.weights import SparseWeight


def errors(found: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(w − w₀) H (w − w₀)ᵀ per row, in float64, with Refit's own damping."""
    matrix, error = damped(hessian.double(), 0.01)[0], (found - weight).double()
    return ((error @ matrix) * error).sum(dim=1)


def exact(weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Oracle: each row's normal equations on its support, solved in float64."""
    matrix, want = hessian.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    matrix.diagonal().add_(0.01 * hessian.double().diagonal().mean())
    for row, keep in enumerate(mask):
        right = (matrix @ weight[row].double())[keep]
        want[row, keep] = torch.linalg.solve(matrix[keep][:, keep], right)
    return want


@pytest.mark.parametrize("pattern", ["2:4", "0.7"])
def test_enough_iterations_give_the_exact_solution(pattern: str) -> None:
    weight, hessian = problem(16, 48)
    pruned = make_method("magnitude", {}).prune(weight, {}, parse(pattern))
    found = Refit(iterations=96).apply(weight, pruned, hessian)
    want = exact(weight, pruned.mask, hessian)
    assert torch.equal(found.mask, pruned.mask)
    assert not found.weight[~found.mask].any()
    assert not torch.allclose(pruned.weight.double(), want, atol=1e-2)
    torch.testing.assert_close(found.weight.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_no_row_gets_worse_and_more_steps_are_better(method: str, dtype: torch.dtype) -> None:
    weight, hessian = problem(32, 64)
    weight = weight.to(dtype)
    made = make_method(method, {})
    pruned = made.prune(weight, made.prepare({"hessian": hessian}), parse("0.5"))
    before = errors(pruned.weight, weight, hessian)
    for iterations in (1, 3, 12):
        found = Refit(iterations=iterations).apply(weight, pruned, hessian)
        after = errors(found.weight, weight, hessian)
        assert found.weight.dtype == dtype
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < before.sum()
        before = after


def test_a_refitted_weight_stays_where_it_is() -> None:
    weight, hessian = problem(16, 48)
    pruned = make_method("magnitude", {}).prune(weight, {}, parse("2:4"))
    once = Refit(iterations=96).apply(weight, pruned, hessian)
    twice = Refit(iterations=96).apply(weight, once, hessian)
    torch.testing.assert_close(twice.weight, once.weight, rtol=1e-4, atol=1e-4)


def test_the_better_of_two_starts_is_taken_row_by_row() -> None:
    weight, hessian = problem(4, 16)
    cut = make_method("magnitude", {}).prune(weight, {}, parse("2:4"))
    best = exact(weight, cut.mask, hessian).float()
    given = torch.where(torch.tensor([[True], [False], [True], [False]]), best, 100 * cut.weight)
    found = Refit(iterations=1).apply(weight, SparseWeight(given, cut.mask), hessian)
    after = errors(found.weight, weight, hessian)
    limit = torch.minimum(errors(given, weight, hessian), errors(cut.weight, weight, hessian))
    assert (after <= limit * (1 + 1e-5)).all()
    torch.testing.assert_close(found.weight[[0, 2]], best[[0, 2]], rtol=1e-3, atol=1e-3)


def test_rows_that_came_out_worse_stay_at_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(4, 16)
    pruned = make_method("magnitude", {}).prune(weight, {}, parse("2:4"))
    best = exact(weight, pruned.mask, hessian).float()
    good = torch.tensor([[True], [False], [True], [False]])
    found = torch.where(good, best, 100 * pruned.weight)
    monkeypatch.setattr("gblm.methods.refit.conjugate_gradients", lambda *args: found)
    want = torch.where(good, best, pruned.weight)
    assert torch.equal(Refit().apply(weight, pruned, hessian).weight, want)


def test_dead_inputs_get_zeros_and_change_nothing_else() -> None:
    weight, hessian = problem(8, 16)
    hessian[[1, 6]], hessian[:, [1, 6]] = 0, 0
    pruned = SparseWeight(weight.clone(), torch.ones(8, 16, dtype=torch.bool))
    pruned.mask[:, [2, 3]] = False
    pruned.weight[:, [2, 3]] = 0
    found = Refit().apply(weight, pruned, hessian)
    assert not found.weight[:, [1, 6]].any()
    assert torch.equal(found.mask, pruned.mask)
    assert torch.isfinite(found.weight).all()
    assert (found.weight[:, 4:6] != weight[:, 4:6]).any()
    assert not Refit().apply(weight, pruned, torch.zeros(16, 16)).weight.any()


def test_zeros_of_a_dense_row_may_become_weights() -> None:
    weight, hessian = problem(4, 16)
    weight[:, 5] = 0
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[:, :4] = False
    found = Refit(iterations=64).apply(weight, SparseWeight.cut(weight, mask), hessian)
    assert found.weight[:, 5].all()


def test_an_indefinite_hessian_does_no_harm() -> None:
    weight, _ = problem(4, 8)
    hessian = torch.ones(8, 8) * 2 - torch.eye(8)
    pruned = make_method("magnitude", {}).prune(weight, {}, parse("2:4"))
    found = Refit().apply(weight, pruned, hessian)
    before, after = (errors(w, weight, hessian) for w in (pruned.weight, found.weight))
    assert torch.isfinite(found.weight).all()
    assert (after <= before + 1e-4).all()


def test_inputs_are_not_changed() -> None:
    weight, hessian = problem(4, 8)
    pruned = make_method("magnitude", {}).prune(weight, {}, parse("2:4"))
    before = weight.clone(), hessian.clone(), pruned.weight.clone()
    Refit().apply(weight, pruned, hessian)
    for one, other in zip(before, (weight, hessian, pruned.weight), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{"iterations": 0}, {"damping": -0.1}, {"damping": 2.0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Refit(**options)  # type: ignore[arg-type]


def test_shapes_that_differ_are_refused() -> None:
    weight, hessian = problem(4, 8)
    pruned = make_method("magnitude", {}).prune(weight, {}, parse("2:4"))
    with pytest.raises(UsageError, match="q_proj: weight, pruned weight and Hessian differ"):
        Refit().apply(weight, pruned, hessian[:4, :4], "q_proj")
