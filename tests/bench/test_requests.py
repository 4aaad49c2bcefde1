"""Metrics of requests: each against its definition, spelled out."""

from __future__ import annotations

import pytest

from gblm.bench.requests import Load, Request, Seen, metrics_of, unit_of


def request(ttft: float, gaps: tuple[float, ...], start: float = 0.0) -> Request:
    return Request(start, ttft + sum(gaps), 10, 1 + len(gaps), ttft, gaps)


def test_every_metric_is_what_its_definition_says() -> None:
    requests = [request(0.1, (0.02, 0.04)), request(0.3, (0.05, 0.05), start=1.0)]
    found = metrics_of(Seen(requests, 2.0))
    assert found["ttft_ms_p50"] == pytest.approx(200)
    assert found["tpot_ms_p50"] == pytest.approx((30 + 50) / 2)
    assert found["decode_tok_s"] == pytest.approx(1000 / 40)
    assert found["itl_ms_p50"] == pytest.approx(45)
    assert found["e2e_ms_p99"] == pytest.approx(160 + 0.99 * 240)
    assert found["requests_per_s"] == 1.0
    assert found["output_tok_s"] == 3.0
    assert found["total_tok_s"] == 13.0


def test_what_the_tool_measured_besides_and_the_noise_stand_beside_the_rest() -> None:
    noise = {"steal": 0.0, "read_limit_gb_s": None}
    found = metrics_of(Seen([request(0.1, (0.1,))], 1.0, noise=noise, extra={"memory_mb": 5.0}))
    assert (found["memory_mb"], found["steal"]) == (5.0, 0.0)
    assert "read_limit_gb_s" not in found
    assert all(isinstance(unit_of(name), str) for name in found)


def test_what_a_tool_does_not_tell_is_left_out() -> None:
    found = metrics_of(Seen([Request(0.0, 1.0, 10, 4)], 1.0))
    assert not [name for name in found if name.startswith(("ttft", "tpot", "itl"))]
    assert "decode_tok_s" not in metrics_of(Seen([Request(0.0, 1.0, 10, 1, 1.0)], 1.0))


def test_a_load_has_a_name() -> None:
    assert Load(4, 10, 5).words == "4 prompts of 10 + 5 tokens, concurrency 1"
