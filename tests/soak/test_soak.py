"""What `make soak` computes from what it reads."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("httpx", reason="httpx: make dev installs it, with vLLM")
from faults import in_flight
from soak_load import slope

SECONDS = [5.0 * i for i in range(180)]
NOISE = np.random.default_rng(0).normal(0, 2e6, 180)


def test_the_slope_of_memory_that_grows_is_found() -> None:
    found = slope(SECONDS, list(3e9 + 1e6 * np.array(SECONDS) / 60 + NOISE))
    assert found["low"] < 1 < found["high"]
    assert found["low"] > 0


def test_memory_that_stays_has_an_interval_around_zero() -> None:
    found = slope(SECONDS, list(3e9 + NOISE))
    assert found["low"] < 0 < found["high"]
    assert found["high"] - found["low"] < 1


def test_slow_waves_widen_the_interval() -> None:
    """Neighbours that are alike are no independent samples."""
    waves = 20e6 * np.sin(np.array(SECONDS) / 60)
    found = slope(SECONDS, list(3e9 + waves))
    assert found["low"] < 0 < found["high"]


def test_requests_that_run_and_wait_are_counted() -> None:
    text = (
        '# HELP vllm:num_requests_running x\nvllm:num_requests_running{engine="0"} 3.0\n'
        'vllm:num_requests_waiting{engine="0"} 2.0\nvllm:num_requests_waiting_by_reason{x="y"} 2.0'
    )
    assert in_flight(text) == 5
