from __future__ import annotations

import pytest
import torch

from gblm.calibrate.stats import STATS, ActNorm


def test_act_norm_follows_the_formula() -> None:
    x = torch.randn(5, 7, 3)  # samples, tokens, features
    stat = ActNorm()
    for sample in x:
        stat.update(sample.unsqueeze(0))
    want = (x.square().sum(dim=1).sum(dim=0) / 5).sqrt()
    torch.testing.assert_close(stat.value(), want)


@pytest.mark.parametrize("name", STATS)
def test_streaming_equals_one_batch(name: str) -> None:
    x = torch.randn(6, 9, 4)
    whole, parts = STATS[name](), STATS[name]()
    whole.update(x)
    for piece in x.split([1, 2, 3]):
        parts.update(piece)
    torch.testing.assert_close(parts.value(), whole.value())


def test_half_precision_inputs_do_not_overflow() -> None:
    stat = ActNorm()
    stat.update(torch.full((1, 4096, 2), 100.0, dtype=torch.float16))
    torch.testing.assert_close(stat.value(), torch.full((2,), 6400.0))
