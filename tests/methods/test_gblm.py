"""GBLM; what every method promises stands in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gblm.methods import make_method
from gblm.sparse.patterns import parse

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, 32, generator=GENERATOR)
GRADIENTS = torch.randn(5, 24, 32, generator=GENERATOR) * 1e-3  # samples, out, in
ACT_NORM = torch.rand(32, generator=GENERATOR) + 0.1
MEANS = {"l1": GRADIENTS.abs().mean(0), "l2": GRADIENTS.square().mean(0).sqrt()}


def stats(norm: str, gradients: Tensor = GRADIENTS) -> dict[str, Tensor]:
    """What calibration hands over."""
    total = gradients.abs().sum(0) if norm == "l1" else gradients.square().sum(0).sqrt()
    return {
        "act_norm": ACT_NORM, "grad_norm": total, "num_samples": torch.tensor(float(len(gradients)))
    }  # fmt: skip


@pytest.mark.parametrize("norm", MEANS)
def test_mean_mode_follows_the_formula(norm: str) -> None:
    method = make_method("gblm", {"alpha": 10.0, "gradient_norm": norm})
    want = WEIGHT.abs() * (ACT_NORM + 10.0 * MEANS[norm])
    torch.testing.assert_close(method.score(WEIGHT, stats(norm)), want)


def test_reference_mode_rounds_as_the_published_code() -> None:
    method, given = make_method("gblm", {"gradient_mode": "reference"}), stats("l2")
    stored = (100.0 * given["grad_norm"]).half()
    assert not torch.equal(stored.float(), 100.0 * given["grad_norm"])
    want = WEIGHT.abs() * ACT_NORM + WEIGHT.abs() * stored.float()
    assert torch.equal(method.score(WEIGHT, given), want)
    huge = given | {"grad_norm": torch.full((24, 32), 1e6)}
    assert method.score(WEIGHT, huge).isfinite().all()


@pytest.mark.parametrize("norm", MEANS)
def test_alpha_means_the_same_for_more_samples(norm: str) -> None:
    once, twice = stats(norm), stats(norm, torch.cat([GRADIENTS, GRADIENTS]))
    mean = make_method("gblm", {"gradient_norm": norm})
    torch.testing.assert_close(mean.score(WEIGHT, once), mean.score(WEIGHT, twice))
    summed = make_method("gblm", {"gradient_norm": norm, "gradient_mode": "reference"})
    assert not torch.allclose(summed.score(WEIGHT, once), summed.score(WEIGHT, twice))


@pytest.mark.parametrize("mode", ["mean", "reference"])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_zero_alpha_is_wanda(pattern: str, mode: str) -> None:
    wanda = make_method("wanda", {}).prune(WEIGHT, stats("l2"), parse(pattern))
    options = {"alpha": 0.0, "gradient_mode": mode}
    gblm = make_method("gblm", options).prune(WEIGHT, stats("l2"), parse(pattern))
    assert torch.equal(wanda.weight, gblm.weight)
    assert torch.equal(wanda.mask, gblm.mask)
