"""Metrics of requests: each against its definition, spelled out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm.bench.requests import PRESETS, Request, Slo, metrics_of, quantile
from gblm.errors import UsageError


def request(ttft: float, gaps: tuple[float, ...], start: float = 0.0) -> Request:
    return Request(start, ttft + sum(gaps), 10, 1 + len(gaps), ttft, gaps)


def test_every_metric_is_what_its_definition_says() -> None:
    requests = [request(0.1, (0.02, 0.04)), request(0.3, (0.05, 0.05), start=1.0)]
    found = metrics_of(requests, 2.0)
    assert found["ttft_ms_p50"] == pytest.approx(200)
    assert found["tpot_ms_p50"] == pytest.approx((30 + 50) / 2)
    assert found["tok_s_per_user"] == pytest.approx(1000 / 40)
    assert found["itl_ms_p50"] == pytest.approx(45)
    assert found["e2e_ms_p99"] == pytest.approx(160 + 0.99 * 240)
    assert found["requests_per_s"] == 1.0
    assert found["output_tok_s"] == 3.0
    assert found["total_tok_s"] == 13.0
    assert "goodput_requests_per_s" not in found


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=30), st.sampled_from([0, 0.5, 0.9, 0.99, 1])
)
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)), abs=1e-9)


def test_goodput_counts_the_requests_that_hold_every_limit() -> None:
    fast, slow_start, slow_tokens = (
        request(0.1, (0.02,) * 5), request(0.9, (0.02,) * 5), request(0.1, (0.09,) * 5),
    )  # fmt: skip
    found = metrics_of([fast, slow_start, slow_tokens], 2.0, Slo(ttft=500, tpot=30))
    assert found["goodput_requests_per_s"] == 0.5
    assert found["slo_share"] == pytest.approx(1 / 3)
    assert metrics_of([fast, slow_start], 2.0, Slo(e2e=500))["slo_share"] == 0.5


def test_what_a_tool_does_not_tell_is_left_out_and_holds_no_limit() -> None:
    silent = Request(0.0, 1.0, 10, 4)
    found = metrics_of([silent], 1.0, Slo(tpot=30))
    assert found["slo_share"] == 0
    assert not [name for name in found if name.startswith(("ttft", "tpot", "itl"))]
    assert metrics_of([Request(0.0, 1.0, 10, 1, 1.0)], 1.0).get("tok_s_per_user") is None


def test_limits_are_parsed_and_mlperfs_have_names() -> None:
    assert Slo.parse("ttft:500, tpot:30") == Slo(500, 30)
    assert (
        Slo.parse("mlperf-llama3.1-8b-interactive")
        == Slo(500, 30)
        == PRESETS["mlperf-llama3.1-8b-interactive"]
    )


@pytest.mark.parametrize(
    "text",
    ["", "ttft", "ttft:", "ttft:x", "ttft:-1", "ttft:inf", "itl:3", "ttft:1,ttft:2", "mlperf"],
)
def test_limits_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="presets: mlperf-llama2-70b"):
        Slo.parse(text)
