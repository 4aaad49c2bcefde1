"""Wanda's variant; what every method promises stands in test_contract.py."""

from __future__ import annotations

import pytest
import torch

from gblm.errors import UsageError
from gblm.methods import make_method
from gblm.methods.wanda import keep_by_share
from gblm.patterns import NM, Block, Unstructured


def kept_by_published_code(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Oracle: wanda's lib/prune.py row by row, but for a budget that pays for nothing."""

    def cut(alpha: float) -> torch.Tensor:
        pruned = torch.zeros_like(score, dtype=torch.bool)
        for i, row in enumerate(score):
            ordered = row.sort(stable=True).values
            affordable = ordered[ordered.cumsum(0) <= row.sum() * alpha]
            if len(affordable):
                pruned[i] = row <= affordable[-1]
        return pruned

    alpha, interval = 0.4, [0.0, 0.8]
    pruned = cut(alpha)
    while abs(pruned.float().mean() - sparsity) > 0.001 and interval[1] - interval[0] >= 0.001:
        if pruned.float().mean() > sparsity:
            alpha_new, interval[1] = (alpha + interval[0]) / 2, alpha
        else:
            alpha_new, interval[0] = (alpha + interval[1]) / 2, alpha
        alpha = alpha_new
        pruned = cut(alpha)
    return ~pruned


def random_score(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, 1, generator=generator) * 3
    return torch.randn(rows, columns, generator=generator).abs() ** spread


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_variant_is_the_published_bisection(sparsity: float, seed: int) -> None:
    score = random_score(24, 64, seed)
    assert torch.equal(keep_by_share(score, sparsity), kept_by_published_code(score, sparsity))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6])
def test_variant_meets_the_sparsity_with_budgets_that_differ(sparsity: float) -> None:
    weight, stats = random_score(128, 256), {"act_norm": torch.rand(256) + 0.1}
    method = make_method("wanda", {"variant": True})
    pruned = method.prune(weight, stats, Unstructured(sparsity))
    assert abs(float((~pruned.mask).float().mean()) - sparsity) <= 0.001
    assert len(pruned.mask.sum(dim=1).unique()) > 1
    assert torch.equal(pruned.weight, torch.where(pruned.mask, weight, torch.zeros(())))


def test_a_row_keeps_everything_when_its_budget_pays_for_nothing() -> None:
    score = torch.tensor([[5.0, 5.0, 0.1, 0.2], [9.0, 9.0, 9.0, 9.0]])
    mask = keep_by_share(score, 0.25)
    assert mask.tolist() == [[True, True, False, False], [True, True, True, True]]


def test_a_row_of_zeros_goes() -> None:
    assert not keep_by_share(torch.zeros(2, 8), 0.5).any()


@pytest.mark.parametrize("pattern", [NM(2, 4), Block(0.5, 4, 4)])
def test_variant_refuses_patterns_with_places(pattern: NM | Block) -> None:
    variant, plain = make_method("wanda", {"variant": True}), make_method("wanda", {})
    message = f"wanda's variant cannot follow the pattern {pattern}"
    with pytest.raises(UsageError, match=message):
        variant.check_pattern(pattern)
    with pytest.raises(UsageError, match=message):
        variant.prune(torch.ones(4, 8), {"act_norm": torch.ones(8)}, pattern)
    variant.check_pattern(Unstructured(0.5))
    plain.check_pattern(pattern)
    make_method("magnitude", {}).check_pattern(pattern)


def test_no_variant_is_plain_wanda() -> None:
    weight, stats = random_score(8, 16), {"act_norm": torch.rand(16)}
    off = make_method("wanda", {"variant": False}).prune(weight, stats, Unstructured(0.5))
    plain = make_method("wanda", {}).prune(weight, stats, Unstructured(0.5))
    assert torch.equal(off.mask, plain.mask)
    assert (plain.mask.sum(dim=1) == 8).all()


@pytest.mark.parametrize("value", [2, "yes"])
def test_variant_is_true_or_false(value: object) -> None:
    with pytest.raises(UsageError, match="variant"):
        make_method("wanda", {"variant": value})


def test_variant_says_when_a_sparsity_is_out_of_reach(caplog: pytest.LogCaptureFixture) -> None:
    method, stats = make_method("wanda", {"variant": True}), {"act_norm": torch.ones(256)}
    method.prune(random_score(128, 256), stats, Unstructured(0.99), "layers.0.q_proj")
    assert "layers.0.q_proj: wanda's variant reached sparsity" in caplog.text
    caplog.clear()
    method.prune(random_score(128, 256), stats, Unstructured(0.5))
    assert not caplog.text
