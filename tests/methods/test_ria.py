"""RIA; what every method promises stands in test_contract.py."""

from __future__ import annotations

import pytest
import torch

from gblm.methods import make_method
from gblm.patterns import parse


def random_case() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    return weight, {"act_norm": torch.rand(8, generator=generator) + 0.1}


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_score_follows_the_formula(exponent: float) -> None:
    weight, stats = random_case()
    score = make_method("ria", {"exponent": exponent}).score(weight, stats)
    rows, columns = weight.abs().sum(1).tolist(), weight.abs().sum(0).tolist()
    for i in range(6):
        for j in range(8):
            size, norm = abs(float(weight[i, j])), float(stats["act_norm"][j])
            want = (size / columns[j] + size / rows[i]) * norm**exponent
            assert float(score[i, j]) == pytest.approx(want, rel=1e-5)


def test_the_exponent_is_a_half_by_default() -> None:
    assert make_method("ria", {}) == make_method("ria", {"exponent": 0.5})


def test_an_unstructured_budget_is_the_matrix() -> None:
    weight, stats = random_case()
    method = make_method("ria", {})
    kept = method.prune(weight, stats, parse("0.5")).mask
    best = method.score(weight, stats).flatten().topk(24).indices
    assert kept.flatten()[best].all()
    assert int(kept.sum()) == 24
    assert len(kept.sum(dim=1).unique()) > 1


def test_rows_columns_and_inputs_of_zeros_score_zero() -> None:
    weight, stats = random_case()
    weight[2], weight[:, 5], stats["act_norm"][3] = 0, 0, 0
    score = make_method("ria", {}).score(weight, stats)
    assert score.isfinite().all()
    zero = torch.zeros(6, 8, dtype=torch.bool)
    zero[2], zero[:, 5], zero[:, 3] = True, True, True
    assert torch.equal(score == 0, zero)


def test_ties_prune_the_lowest_index_first() -> None:
    pruned = make_method("ria", {}).prune(
        torch.ones(2, 4), {"act_norm": torch.ones(4)}, parse("2:4")
    )
    assert pruned.mask.tolist() == [[False, False, True, True]] * 2
