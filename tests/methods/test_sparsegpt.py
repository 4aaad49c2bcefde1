"""SparseGPT; what every method promises stands in test_contract.py."""

from __future__ import annotations

import logging

import pytest
import torch
from correlated import output_error, problem
from plain import update_columns

from gblm.errors import InputError
from gblm.methods import make_method
from gblm.methods.sparsegpt import _rule
from gblm.sparse.patterns import NM, Pattern, Unstructured, parse
from gblm.sparse.weights import SparseWeight


def prune(
    weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern, **options: object
) -> SparseWeight:
    method = make_method("sparsegpt", options)
    return method.prune(weight, method.prepare({"hessian": hessian}), pattern)


def choose(score: torch.Tensor, pattern: Pattern, first: int) -> torch.Tensor:
    """Oracle: what goes of a group, or of a block of columns with exact cumulative budgets."""
    if isinstance(pattern, NM):
        return ~pattern.keep(score, "row")
    rows, columns = score.shape
    before, after = (int(rows * c * pattern.sparsity) for c in (first, first + columns))
    drop = torch.zeros(score.numel(), dtype=torch.bool)
    drop[score.flatten().sort(stable=True).indices[: after - before]] = True
    return drop.reshape(score.shape)


def check(shape: tuple[int, int], pattern: Pattern, block: int = 128) -> None:
    """A pruned weight is that of the plain algorithm with the choice above."""
    weight, hessian = problem(*shape)
    pruned = prune(weight, hessian, pattern)
    want = update_columns(weight.clone(), hessian.clone(), pattern, choose, block)
    pattern.check_mask("weight", pruned.mask)
    assert torch.equal(pruned.mask, want != 0)
    torch.testing.assert_close(pruned.weight, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(24, 300), (7, 129), (40, 20), (1, 64), (16, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.5, 0.9])
def test_unstructured_equals_the_plain_algorithm(shape: tuple[int, int], sparsity: float) -> None:
    check(shape, Unstructured(sparsity))


@pytest.mark.parametrize(
    ("pattern", "cols", "block"),
    [
        ("2:4", 300, 128),
        ("1:4", 64, 128),
        ("4:8", 264, 128),
        ("8:16", 272, 128),
        ("2:5", 500, 125),
        ("7:24", 120, 120),
        ("30:64", 320, 128),
    ],
)
def test_structured_equals_the_plain_algorithm(pattern: str, cols: int, block: int) -> None:
    check((24, cols), parse(pattern), block)


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "3:6", "8:16"])
@pytest.mark.parametrize("block_size", [1, 4, 8, 10, 33, 1000])
def test_every_block_size_works(pattern: str, block_size: int) -> None:
    weight, hessian = problem(16, 48)
    rule = parse(pattern)
    pruned = prune(weight, hessian, rule, block_size=block_size)
    rule.check_mask("weight", pruned.mask)
    assert int((~pruned.mask).sum()) == 16 * 48 // 2
    if isinstance(rule, NM):
        assert torch.equal(pruned.mask, prune(weight, hessian, rule).mask)


def test_count_is_exact_when_scores_tie() -> None:
    pruned = prune(torch.ones(6, 20), torch.eye(20), Unstructured(0.5))
    assert int(pruned.mask.sum()) == 60
    pruned = prune(torch.ones(6, 20), torch.eye(20), NM(2, 4))
    assert torch.equal(pruned.mask, NM(2, 4).keep(torch.ones(6, 20), "row"))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 5), NM(8, 16), NM(20, 64)])
def test_choice_in_a_group_is_that_of_the_pattern(pattern: NM) -> None:
    size = pattern.group_m
    score = torch.randint(0, 4, (200, size)).float()
    score[0], score[1, ::2] = torch.inf, 1e-40
    rule = _rule(pattern, torch.device("cpu"))
    drop = rule.choose(score.t().contiguous(), 0, size)
    assert torch.equal(~drop.t(), pattern.keep(score, "row"))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_output_error_is_lower_than_wandas(pattern: str) -> None:
    weight, hessian = problem(32, 96, strong=8)
    stats = {"act_norm": hessian.diagonal().sqrt()}
    wanda = make_method("wanda", {}).prune(weight, stats, parse(pattern))
    ours = prune(weight, hessian, parse(pattern))
    assert output_error(weight, ours, hessian) < 0.5 * output_error(weight, wanda, hessian)


def test_a_single_row_is_not_changed() -> None:
    weight, hessian = problem(1, 32)  # one row: its transpose is the same memory
    before = weight.clone()
    prune(weight, hessian, NM(2, 4))
    assert torch.equal(weight, before)


def indefinite(lowest: float) -> torch.Tensor:
    """Symmetric, its mean diagonal 1 and its lowest eigenvalue `lowest`."""
    values = torch.full((16,), (16 - lowest) / 15)
    values[0] = lowest
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    return basis @ values.diag() @ basis.t()


@pytest.mark.parametrize(
    ("lowest", "damping", "tried"), [(-0.05, 0.01, [0.1]), (-0.5, 0.01, [0.1, 1]), (-0.5, 0.3, [1])]
)
def test_damping_is_raised_until_the_hessian_is_positive_definite(
    lowest: float, damping: float, tried: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pruned = prune(torch.randn(4, 16), indefinite(lowest), NM(2, 4), damping=damping)
    assert [r.message.split("trying ")[1] for r in caplog.records] == [f"{d:g}" for d in tried]
    assert pruned.weight.isfinite().all()


@pytest.mark.parametrize("hessian", [indefinite(-2.0), torch.full((16, 16), torch.nan)])
def test_a_hopeless_hessian_is_refused(hessian: torch.Tensor) -> None:
    with pytest.raises(InputError, match="q_proj: the Hessian is not positive definite even with"):
        make_method("sparsegpt", {}).prepare({"hessian": hessian}, "q_proj")
