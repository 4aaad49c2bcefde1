"""What every method promises, over METHODS × patterns."""

from __future__ import annotations

import pytest
import torch

from gblm.errors import UsageError
from gblm.methods import METHODS, make_method
from gblm.patterns import NM, parse

PATTERNS = ["0.5", "0.7", "2:4", "4:8", "1:4"]


@pytest.fixture
def stats() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "act_norm": torch.rand(32, generator=generator) + 0.1,
        "grad_norm": torch.rand(24, 32, generator=generator) * 1e-3,
    }


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", METHODS)
def test_prune_keeps_exact_count_and_untouched_values(
    name: str, pattern: str, stats: dict[str, torch.Tensor]
) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    rule = parse(pattern)
    pruned = make_method(name, {}).prune(weight, stats, rule)
    rule.check_mask(name, pruned.mask)
    per_row = 32 - int(32 * rule.sparsity)
    expected = 24 * 32 - int(24 * 32 * rule.sparsity) if name == "magnitude" else 24 * per_row
    assert int(pruned.mask.sum()) == (24 * per_row if isinstance(rule, NM) else expected)
    assert torch.equal(pruned.weight[pruned.mask], weight[pruned.mask])
    assert not pruned.weight[~pruned.mask].any()


def test_magnitude_score_is_the_absolute_weight(stats: dict[str, torch.Tensor]) -> None:
    weight = torch.randn(24, 32)
    assert torch.equal(make_method("magnitude", {}).score(weight, stats), weight.abs())


def test_wanda_score_follows_the_formula(stats: dict[str, torch.Tensor]) -> None:
    weight = torch.randn(24, 32)
    score = make_method("wanda", {}).score(weight, stats)
    for i in range(24):
        for j in range(32):
            assert score[i, j] == weight[i, j].abs() * stats["act_norm"][j]


def test_gblm_score_follows_the_formula(stats: dict[str, torch.Tensor]) -> None:
    weight = torch.randn(24, 32)
    score = make_method("gblm", {"alpha": 10.0}).score(weight, stats)
    want = weight.abs() * (stats["act_norm"] + 10.0 * stats["grad_norm"])
    torch.testing.assert_close(score, want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gblm_with_zero_alpha_is_wanda(pattern: str, stats: dict[str, torch.Tensor]) -> None:
    weight = torch.randn(24, 32)
    rule = parse(pattern)
    wanda = make_method("wanda", {}).prune(weight, stats, rule)
    gblm = make_method("gblm", {"alpha": 0.0}).prune(weight, stats, rule)
    assert torch.equal(wanda.weight, gblm.weight)
    assert torch.equal(wanda.mask, gblm.mask)


def test_gradients_change_the_choice(stats: dict[str, torch.Tensor]) -> None:
    weight, rule = torch.randn(24, 32), parse("2:4")
    strong = dict(stats, grad_norm=torch.rand(24, 32) * 10)
    wanda = make_method("wanda", {}).prune(weight, stats, rule)
    gblm = make_method("gblm", {}).prune(weight, strong, rule)
    assert not torch.equal(wanda.mask, gblm.mask)


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'wunda' is unknown: choose from magnitude, wanda, gblm"):
        make_method("wunda", {})


def test_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="takes alpha, gradient_norm"):
        make_method("gblm", {"beta": 1})
    with pytest.raises(UsageError, match="takes no options"):
        make_method("wanda", {"alpha": 1.0})


@pytest.mark.parametrize("options", [{"gradient_norm": "l3"}, {"alpha": -1.0}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        make_method("gblm", options)
