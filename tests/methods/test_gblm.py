"""GBLM and its gradient half; what every method promises stands in test_contract.py."""

from __future__ import annotations

import pytest
import torch

from gblm.methods import make_method
from gblm.sparse.patterns import parse

NORMS = ["l1", "l2"]


def joined(gradients: torch.Tensor, norm: str) -> dict[str, torch.Tensor]:
    """What calibration hands over for gradients [samples, out, in]."""
    total = gradients.abs().sum(0) if norm == "l1" else gradients.square().sum(0).sqrt()
    return {"grad_norm": total, "num_samples": torch.tensor(float(len(gradients)))}


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gradients() -> torch.Tensor:
    return torch.randn(5, 24, 32, generator=torch.Generator().manual_seed(1)) * 1e-3


@pytest.fixture
def act_norm() -> torch.Tensor:
    return torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.1


def test_mean_mode_follows_the_formula(
    weight: torch.Tensor, gradients: torch.Tensor, act_norm: torch.Tensor
) -> None:
    for norm, mean in (
        ("l1", gradients.abs().mean(0)),
        ("l2", gradients.square().mean(0).sqrt()),
    ):
        method = make_method("gblm", {"alpha": 10.0, "gradient_norm": norm})
        score = method.score(weight, {"act_norm": act_norm} | joined(gradients, norm))
        torch.testing.assert_close(score, weight.abs() * (act_norm + 10.0 * mean))


def test_reference_mode_rounds_as_the_published_code(
    weight: torch.Tensor, gradients: torch.Tensor, act_norm: torch.Tensor
) -> None:
    stats = {"act_norm": act_norm, "grad_norm": joined(gradients, "l2")["grad_norm"]}
    score = make_method("gblm", {"gradient_mode": "reference"}).score(weight, stats)
    stored = (100.0 * stats["grad_norm"]).half()
    assert not torch.equal(stored.float(), 100.0 * stats["grad_norm"])
    assert torch.equal(score, weight.abs() * act_norm + weight.abs() * stored.float())


def test_reference_mode_clamps_to_float16(weight: torch.Tensor, act_norm: torch.Tensor) -> None:
    stats = {"act_norm": act_norm, "grad_norm": torch.full((24, 32), 1e6)}
    assert make_method("gblm", {"gradient_mode": "reference"}).score(weight, stats).isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_alpha_means_the_same_for_more_samples(
    weight: torch.Tensor, gradients: torch.Tensor, act_norm: torch.Tensor, norm: str
) -> None:
    once = {"act_norm": act_norm} | joined(gradients, norm)
    twice = {"act_norm": act_norm} | joined(torch.cat([gradients, gradients]), norm)
    mean = make_method("gblm", {"gradient_norm": norm})
    torch.testing.assert_close(mean.score(weight, once), mean.score(weight, twice))
    summed = make_method("gblm", {"gradient_norm": norm, "gradient_mode": "reference"})
    assert not torch.allclose(summed.score(weight, once), summed.score(weight, twice))


@pytest.mark.parametrize("mode", ["mean", "reference"])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_zero_alpha_is_wanda(
    weight: torch.Tensor, gradients: torch.Tensor, act_norm: torch.Tensor, pattern: str, mode: str
) -> None:
    stats = {"act_norm": act_norm} | joined(gradients, "l2")
    wanda = make_method("wanda", {}).prune(weight, stats, parse(pattern))
    options = {"alpha": 0.0, "gradient_mode": mode}
    gblm = make_method("gblm", options).prune(weight, stats, parse(pattern))
    assert torch.equal(wanda.weight, gblm.weight)
    assert torch.equal(wanda.mask, gblm.mask)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_alone_follows_the_formula(
    weight: torch.Tensor, gradients: torch.Tensor, norm: str
) -> None:
    stats = joined(gradients, norm)
    score = make_method("gradient", {"gradient_norm": norm}).score(weight, stats)
    assert torch.equal(score, weight.abs() * stats["grad_norm"])
