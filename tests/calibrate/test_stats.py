from __future__ import annotations

import pytest
import torch

from gblm.calibrate.stats import STATS, ActNorm, Hessian


def test_act_norm_adds_up_as_the_published_code() -> None:
    x = torch.randn(6, 9, 8)
    stat, scaler, seen = ActNorm(), torch.zeros(8), 0
    for batch in x.split([1, 2, 3]):
        stat.update(batch, len(batch))
        scaler *= seen / (seen + len(batch))
        seen += len(batch)
        scaler += torch.norm(batch.reshape(-1, 8).t(), p=2, dim=1) ** 2 / seen
    assert torch.equal(stat.value(), scaler.sqrt())


@pytest.mark.parametrize("size", [1, 3, 4, 10, 16])
def test_hessian_follows_the_formula(size: int) -> None:
    x = torch.randn(5, 7, size)
    stat = Hessian()
    for sample in x:
        stat.update(sample, 1)
        value = stat.value()  # reading in between does no harm
    want = 2 / 5 * torch.einsum("sti,stj->ij", x, x)
    torch.testing.assert_close(value, want)
    assert stat.value().dtype == torch.float32


@pytest.mark.parametrize("name", STATS)
def test_streaming_equals_one_batch(name: str) -> None:
    x = torch.randn(6, 9, 4)
    whole, parts = STATS[name](), STATS[name]()
    whole.update(x, len(x))
    for piece in x.split([1, 2, 3]):
        parts.update(piece, len(piece))
    assert parts.num_samples == 6
    torch.testing.assert_close(parts.value(), whole.value())


@pytest.mark.parametrize("name", STATS)
def test_samples_without_tokens_count(name: str) -> None:
    """As an expert sees them: it is the mean over all samples, some of which give nothing."""
    x = torch.randn(9, 4)
    some, padded = STATS[name](), STATS[name]()
    some.update(x[:0], 1)
    some.update(x, 2)
    some.update(x[:0], 3)
    padded.update(torch.cat([x, torch.zeros(45, 4)]).reshape(6, 9, 4), 6)
    assert some.num_samples == 6
    torch.testing.assert_close(some.value(), padded.value())


@pytest.mark.parametrize("name", STATS)
def test_means_of_several_processes_join(name: str) -> None:
    x = torch.randn(6, 9, 8)
    whole, ranks = STATS[name](), [STATS[name](), STATS[name]()]
    whole.update(x, len(x))
    for rank, part in zip(ranks, x.split([2, 4]), strict=True):
        rank.update(part, len(part))
    joined = STATS[name]()
    joined.num_samples = 6
    joined.mean = sum(rank.mean * rank.num_samples for rank in ranks) / 6
    torch.testing.assert_close(joined.value(), whole.value())


@pytest.mark.parametrize(("name", "want"), [("act_norm", 6400.0), ("hessian", 2 * 6400.0**2)])
def test_half_precision_inputs_do_not_overflow(name: str, want: float) -> None:
    stat = STATS[name]()
    stat.update(torch.full((1, 4096, 2), 100.0, dtype=torch.float16), 1)
    torch.testing.assert_close(stat.value().flatten()[:2], torch.full((2,), want))
