"""DSnoT; what every method promises stands in test_contract.py."""

from __future__ import annotations

import pytest
import torch

from gblm.errors import UsageError
from gblm.methods import make_method
from gblm.patterns import Block, parse

PATTERNS = ["0.5", "0.7", "2:4", "4:8", "8:16"]


def problem(rows: int = 32, cols: int = 64) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weight and the statistics of one sample whose inputs have means."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    inputs = torch.randn(256, cols, generator=generator) + torch.randn(cols, generator=generator)
    return weight, {
        "act_norm": inputs.square().sum(dim=0).sqrt(),
        "act_mean": inputs.sum(dim=0),
        "act_var": (inputs - inputs.mean(dim=0)).square().sum(dim=0),
    }


def expected_error(weight: torch.Tensor, mask: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return ((weight * ~mask) @ mean).abs()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_expected_errors_fall_and_counts_stay(pattern: str) -> None:
    weight, stats = problem()
    rule = parse(pattern)
    wanda = make_method("wanda", {}).prune(weight, stats, rule).mask
    pruned = make_method("dsnot", {}).prune(weight, stats, rule)
    before, after = (expected_error(weight, m, stats["act_mean"]) for m in (wanda, pruned.mask))
    assert (after <= before + 1e-3).all()
    assert after.mean() < 0.5 * before.mean()
    assert torch.equal(pruned.mask.sum(dim=1), wanda.sum(dim=1))
    rule.check_mask("weight", pruned.mask)
    groups = (m.reshape(32, -1, getattr(rule, "unit", 64)).sum(-1) for m in (wanda, pruned.mask))
    assert torch.equal(*groups)


def test_one_cycle_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, -0.5, 4.0, 5.0, 6.0]])
    stats = {"act_norm": torch.ones(6), "act_mean": torch.ones(6), "act_var": torch.ones(6)}
    stats["act_mean"][1] = 2
    wanda, swapped = [[False] * 3 + [True] * 3], [[False, True, False, False, True, True]]

    def mask() -> list[list[bool]]:
        made = make_method("dsnot", {"max_cycles": 1}).prune(weight, stats, parse("0.5"))
        return made.mask.tolist()  # type: ignore[no-any-return]

    # ε = 1 + 4 − 0.5: the second would grow, but no kept product is below zero.
    assert mask() == wanda
    # −12 for the 4 would leave ε = −11.5.
    weight[0, 3], stats["act_mean"][3] = -4, 3
    assert mask() == wanda
    # −1 for the 4 leaves ε = −0.5.
    stats["act_mean"][3] = 0.25
    assert mask() == swapped
    # All six are one group of 3:6.
    made = make_method("dsnot", {"max_cycles": 1}).prune(weight, stats, parse("3:6"))
    assert made.mask.tolist() == swapped


def test_what_goes_for_a_weight_has_the_opposite_sign() -> None:
    weight = torch.tensor([[1.0, 2.0, -0.5, 4.0, -5.0, 6.0]])
    stats = {"act_norm": torch.ones(6), "act_var": torch.ones(6)}
    stats["act_mean"] = torch.tensor([1.0, 2.0, 1.0, 0.25, 0.1, 1.0])
    # ε = 4.5. For the second the 4 could go, whose score is lower, and leave 1.5; the −5 leaves 0.
    made = make_method("dsnot", {"max_cycles": 1}).prune(weight, stats, parse("0.5"))
    assert made.mask.tolist() == [[False, True, False, True, False, True]]


def test_growth_weighs_by_the_variance() -> None:
    # ε = 1 + 2; the second counts more, unless its variance is larger.
    weight = torch.tensor([[1.0, 2.0, -4.0, 8.0]])
    stats = {"act_norm": torch.ones(4), "act_var": torch.ones(4)}
    stats["act_mean"] = torch.tensor([1.0, 1.0, 0.25, 1.0])
    method = make_method("dsnot", {"max_cycles": 1})
    assert method.prune(weight, stats, parse("0.5")).mask.tolist() == [[False, True, False, True]]
    stats["act_var"] = torch.tensor([1.0, 3.0, 1.0, 1.0])
    assert method.prune(weight, stats, parse("0.5")).mask.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", [{"max_cycles": 0}, {"threshold": 1e9}])
def test_without_exchanges_it_is_wanda(pattern: str, options: dict[str, float]) -> None:
    weight, stats = problem()
    wanda = make_method("wanda", {}).prune(weight, stats, parse(pattern))
    ours = make_method("dsnot", options).prune(weight, stats, parse(pattern))
    assert torch.equal(ours.mask, wanda.mask)
    other = make_method("dsnot", {}).prune(weight, stats, parse(pattern))
    assert not torch.equal(other.mask, wanda.mask)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dead_and_constant_inputs_and_ties_do_no_harm(pattern: str) -> None:
    weight, stats = problem()
    weight = weight.sign()  # many ties
    for name in stats:
        stats[name][:8] = 0  # always zero
    stats["act_var"][8:12] = 0  # always the same
    rule = parse(pattern)
    pruned = make_method("dsnot", {}).prune(weight, stats, rule)
    rule.check_mask("weight", pruned.mask)
    wanda = make_method("wanda", {}).prune(weight, stats, rule).mask
    assert torch.equal(pruned.mask.sum(dim=1), wanda.sum(dim=1))
    before, after = (expected_error(weight, m, stats["act_mean"]) for m in (wanda, pruned.mask))
    assert after.mean() < before.mean()


def test_dense_stays_dense_and_blocks_are_refused() -> None:
    weight, stats = problem()
    assert make_method("dsnot", {}).prune(weight, stats, parse("dense")).mask.all()
    with pytest.raises(UsageError, match=r"dsnot cannot follow the pattern 8x8@0\.5"):
        make_method("dsnot", {}).prune(weight, stats, Block(0.5, 8, 8))
