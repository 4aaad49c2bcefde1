from __future__ import annotations

import pytest
import torch

from gblm.calibrate.stats import STATS, ActNorm, Hessian


def test_act_norm_adds_up_as_the_published_code() -> None:
    x = torch.randn(6, 9, 8)
    stat, scaler, seen = ActNorm(), torch.zeros(8), 0
    for batch in x.split([1, 2, 3]):
        stat.update(batch)
        scaler *= seen / (seen + len(batch))
        seen += len(batch)
        scaler += torch.norm(batch.reshape(-1, 8).t(), p=2, dim=1) ** 2 / seen
    assert torch.equal(stat.value(), scaler.sqrt())


@pytest.mark.parametrize("size", [1, 3, 4, 10, 16])
def test_hessian_follows_the_formula(size: int) -> None:
    x = torch.randn(5, 7, size)
    stat = Hessian()
    for sample in x:
        stat.update(sample.unsqueeze(0))
        value = stat.value()  # reading in between does no harm
    want = 2 / 5 * torch.einsum("sti,stj->ij", x, x)
    torch.testing.assert_close(value, want)
    assert stat.value().dtype == torch.float32


@pytest.mark.parametrize("name", STATS)
def test_streaming_equals_one_batch(name: str) -> None:
    x = torch.randn(6, 9, 4)
    whole, parts = STATS[name](), STATS[name]()
    whole.update(x)
    for piece in x.split([1, 2, 3]):
        parts.update(piece)
    assert parts.num_samples == 6
    torch.testing.assert_close(parts.value(), whole.value())


@pytest.mark.parametrize("name", STATS)
def test_an_input_without_a_samples_axis_is_one_sample(name: str) -> None:
    x = torch.randn(9, 4)
    plain, wrapped = STATS[name](), STATS[name]()
    plain.update(x)
    wrapped.update(x.unsqueeze(0))
    assert plain.num_samples == 1
    assert torch.equal(plain.value(), wrapped.value())


@pytest.mark.parametrize("name", STATS)
def test_means_of_several_processes_join(name: str) -> None:
    x = torch.randn(6, 9, 8)
    whole, ranks = STATS[name](), [STATS[name](), STATS[name]()]
    whole.update(x)
    for rank, part in zip(ranks, x.split([2, 4]), strict=True):
        rank.update(part)
    joined = STATS[name]()
    joined.num_samples = 6
    joined.mean = sum(rank.mean * rank.num_samples for rank in ranks) / 6
    torch.testing.assert_close(joined.value(), whole.value())


@pytest.mark.parametrize(("name", "want"), [("act_norm", 6400.0), ("hessian", 2 * 6400.0**2)])
def test_half_precision_inputs_do_not_overflow(name: str, want: float) -> None:
    stat = STATS[name]()
    stat.update(torch.full((1, 4096, 2), 100.0, dtype=torch.float16))
    torch.testing.assert_close(stat.value().flatten()[:2], torch.full((2,), want))
