"""SparseGPT; what every method promises stands in test_contract.py."""

from __future__ import annotations

import logging

import pytest
import torch

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


def problem(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight [rows, cols], correlated inputs [tokens, cols] and their Hessian."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    mix = torch.eye(cols) + torch.randn(cols, cols, generator=generator) / cols**0.5
    inputs = torch.randn(4 * cols, cols, generator=generator) @ mix
    return weight, inputs, 2 * inputs.t() @ inputs


def published_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    damped = hessian.clone()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def choice(score: torch.Tensor, pattern: Pattern, start: int, stop: int) -> torch.Tensor:
    """Oracle: what goes of a block of columns, with exact cumulative budgets."""
    rows = score.shape[0]
    budget = int(rows * stop * pattern.sparsity) - int(rows * start * pattern.sparsity)
    drop = torch.zeros(score.numel(), dtype=torch.bool)
    drop[score.flatten().sort(stable=True).indices[:budget]] = True
    return drop.reshape(score.shape)


def published(
    weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Oracle: `fasterprune` of the published code, column by column; weight and keep mask."""
    weight, factor = weight.clone(), published_factor(hessian, 0.01)
    drop = torch.zeros_like(weight, dtype=torch.bool)
    for i1 in range(0, weight.shape[1], block):
        i2 = min(i1 + block, weight.shape[1])
        w1, u1, d1 = weight[:, i1:i2].clone(), factor[i1:i2, i1:i2], drop[:, i1:i2]
        errors = torch.zeros_like(w1)
        if not isinstance(pattern, NM):
            d1[:] = choice(w1**2 / u1.diagonal() ** 2, pattern, i1, i2)
        for i in range(i2 - i1):
            if isinstance(pattern, NM) and i % pattern.group_m == 0:
                group = slice(i, i + pattern.group_m)
                d1[:, group] = ~pattern.keep(w1[:, group] ** 2 / u1.diagonal()[group] ** 2, "row")
            quantized = w1[:, i].masked_fill(d1[:, i], 0)
            errors[:, i] = (w1[:, i] - quantized) / u1[i, i]
            w1[:, i:] -= errors[:, i : i + 1] @ u1[i : i + 1, i:]
            w1[:, i] = quantized
        weight[:, i1:i2] = w1
        weight[:, i2:] -= errors @ factor[i1:i2, i2:]
    return weight, ~drop


@pytest.mark.parametrize("shape", [(24, 300), (7, 129), (40, 20), (1, 64), (16, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.5, 0.9])
def test_unstructured_equals_the_plain_algorithm(shape: tuple[int, int], sparsity: float) -> None:
    weight, _, hessian = problem(*shape)
    pruned = prune(weight, hessian, Unstructured(sparsity))
    want, mask = published(weight, hessian, Unstructured(sparsity))
    assert torch.equal(pruned.mask, mask)
    torch.testing.assert_close(pruned.weight, want, rtol=1e-4, atol=1e-4)


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
    weight, _, hessian = problem(24, cols)
    pruned = prune(weight, hessian, parse(pattern))
    want, mask = published(weight, hessian, parse(pattern), block)
    parse(pattern).check_mask("weight", pruned.mask)
    assert torch.equal(pruned.mask, mask)
    torch.testing.assert_close(pruned.weight, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "3:6", "8:16"])
@pytest.mark.parametrize("block_size", [1, 4, 8, 10, 33, 1000])
def test_every_block_size_works(pattern: str, block_size: int) -> None:
    weight, _, hessian = problem(16, 48)
    rule = parse(pattern)
    pruned = prune(weight, hessian, rule, block_size=block_size)
    rule.check_mask("weight", pruned.mask)
    assert int((~pruned.mask).sum()) == 16 * 48 // 2
    if isinstance(rule, NM):
        assert torch.equal(pruned.mask, prune(weight, hessian, rule).mask)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.33])
@pytest.mark.parametrize("shape", [(9, 131), (10, 259), (3, 7)])
def test_count_over_the_matrix_is_exact(shape: tuple[int, int], sparsity: float) -> None:
    weight, _, hessian = problem(*shape)
    pruned = prune(weight, hessian, Unstructured(sparsity), block_size=16)
    assert int((~pruned.mask).sum()) == int(shape[0] * shape[1] * sparsity)


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
    weight, inputs, _ = problem(32, 96)
    torch.manual_seed(0)
    inputs = inputs + torch.randn(len(inputs), 8) @ torch.randn(8, 96)  # a few strong directions
    rule, hessian = parse(pattern), 2 * inputs.t() @ inputs
    stats = {"act_norm": inputs.square().sum(0).sqrt()}
    wanda = make_method("wanda", {}).prune(weight, stats, rule).weight
    ours = prune(weight, hessian, rule).weight
    error, other = (((weight - w) @ inputs.t()).square().sum() for w in (ours, wanda))
    assert error < 0.5 * other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    weight, _, hessian = problem(24, 160)
    half = prune(weight.to(dtype), hessian, NM(2, 4))
    full = prune(weight.to(dtype).float(), hessian, NM(2, 4))
    assert torch.equal(half.mask, full.mask)
    assert torch.equal(half.weight, full.weight.to(dtype))


def test_scale_of_the_hessian_makes_no_difference() -> None:
    weight, _, hessian = problem(24, 64)
    one, other = (prune(weight, h, NM(2, 4)) for h in (hessian, hessian * 2**20))
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_inputs_that_are_always_zero_go_first(pattern: Pattern) -> None:
    weight, inputs, _ = problem(8, 16)
    inputs[:, [1, 2, 5, 15]] = 0
    pruned = prune(weight, 2 * inputs.t() @ inputs, pattern)
    assert not pruned.mask[:, [1, 2, 5, 15]].any()
    assert int(pruned.mask.sum()) == 64


def test_dead_inputs_beyond_the_budget_are_kept_as_zeros() -> None:
    pruned = prune(torch.randn(4, 8), torch.zeros(8, 8), NM(2, 4))
    assert int(pruned.mask.sum()) == 16
    assert torch.equal(pruned.weight, torch.zeros(4, 8))


def test_inputs_are_not_changed() -> None:
    weight, _, hessian = problem(1, 32)  # one row: its transpose is the same memory
    hessian[3], hessian[:, 3] = 0, 0
    before = weight.clone(), hessian.clone()
    prune(weight, hessian, NM(2, 4))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def indefinite(lowest: float) -> torch.Tensor:
    """Symmetric, its mean diagonal 1 and its lowest eigenvalue `lowest`."""
    values = torch.full((16,), (16 - lowest) / 15)
    values[0] = lowest
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    return basis @ values.diag() @ basis.t()


@pytest.mark.parametrize(
    ("lowest", "damping", "tried"),
    [(-0.05, 0.01, [0.1]), (-0.5, 0.01, [0.1, 1]), (-0.5, 0.3, [1])],
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
