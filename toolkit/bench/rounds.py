"""Interleaved rounds over linears, and the row that each of them gets in the record."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gblm.bench.linears import Clock, Linear
from gblm.bench.paired import Times, percentile, round_medians, share_of_limit, speedup, spread
from gblm.formats import Shape
from gblm.kernels import native

BASELINES = ("torch_bf16", "vllm_bf16", "vllm_w8a8")
# A block is the calls of one linear in one round.
BLOCK_SECONDS, MIN_CALLS, MAX_CALLS = 0.02, 3, 1000
READS, OVERHEAD_CALLS = 3, 500


def measure_case(
    linears: list[Linear], shape: Shape, tokens: int, rounds: int, clock: Clock, memory: Tensor
) -> dict[str, Any]:
    """All linears of one shape with so many tokens: the read limit and a row for each."""
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    times, limits = measure(linears, x, rounds, clock, memory)
    return {
        "shape": list(shape),
        "tokens": tokens,
        "read_limit_gb_s": spread([limit / 1e9 for limit in limits]),
        "rows": summarise(linears, times, shape, tokens),
    }


def add_shares(cases: list[dict[str, Any]]) -> float:
    """Give each row its share of the read limit: the fastest round of reading in any case.

    A limit is what the machine can do, so a round that other work slowed down must not lower it.

    Returns:
        The limit in GB/s.
    """
    limit: float = max(case["read_limit_gb_s"]["max"] for case in cases)
    for row in (row for case in cases for row in case["rows"]):
        seconds = [us / 1e6 for us in row["us_rounds"]]
        row["share_of_read_limit"] = share_of_limit(seconds, row["bytes"], 1e9 * limit)
    return limit


def measure(
    linears: Sequence[Linear], x: Tensor, rounds: int, clock: Clock, memory: Tensor
) -> tuple[dict[str, list[list[float]]], list[float]]:
    """Interleaved rounds.

    Returns:
        Seconds of the calls by linear and round; the read limit of each round in bytes/s.
    """
    counts = {linear.name: _warm_up(linear, x, clock) for linear in linears}
    times: dict[str, list[list[float]]] = {linear.name: [] for linear in linears}
    limits = []
    for number in range(rounds):
        limits.append(_read_limit(memory, clock))
        # The order alternates, so that drift of the machine hits all alike.
        for linear in linears if number % 2 == 0 else reversed(linears):
            times[linear.name].append(linear.time(x, counts[linear.name], clock))
    return times, limits


def summarise(
    linears: Sequence[Linear], times: Times, shape: Shape, tokens: int
) -> list[dict[str, Any]]:
    """One row per linear: time, bandwidth, speed-ups paired by round."""
    rows = []
    for linear in linears:
        medians = round_medians(times[linear.name])
        seconds = statistics.median(medians)
        against = [name for name in BASELINES if name in times and name != linear.name]
        ratios = {name: speedup(times, linear.name, name) for name in against}
        if (control := linear.control) and control in times and control != linear.name:
            ratios["dense"] = speedup(times, linear.name, control)
        rows.append({
            "linear": linear.name,
            "backend": linear.backend,
            "spec": linear.spec,
            "bytes": linear.size,
            "bits_per_weight": 8 * linear.size / (shape[0] * shape[1]),
            "us": 1e6 * seconds,
            "us_p5": 1e6 * percentile(times[linear.name], 0.05),
            "us_rounds": [1e6 * median for median in medians],
            "calls": sum(map(len, times[linear.name])),
            "gb_s": linear.size / seconds / 1e9,
            "gflop_s": 2 * tokens * shape[0] * shape[1] / seconds / 1e9,
            "speedup": ratios,
        })  # fmt: skip
    return rows


def call_overhead(
    linears: list[Linear], columns: int, rounds: int, clock: Clock
) -> dict[str, dict[str, float]]:
    """Microseconds of a call on a weight so small that only the call itself counts."""
    x = torch.randn(1, columns).bfloat16()
    found: dict[str, list[float]] = {linear.name: [] for linear in linears}
    for number in range(rounds + 1):
        for linear in linears:
            call, began = linear.copies[0], clock()
            for _ in range(OVERHEAD_CALLS):
                call(x)
            # The first round warms up.
            if number:
                found[linear.name].append(1e6 * (clock() - began) / OVERHEAD_CALLS)
    return {name: spread(values) for name, values in found.items()}


def _warm_up(linear: Linear, x: Tensor, clock: Clock) -> int:
    """Call every copy once (oneDNN compiles for each), and give the calls that fill a block."""
    calls = len(linear.copies) if linear.backend == "vllm" else 1
    linear.time(x, calls, clock)
    seconds = max(1e-7, statistics.median(linear.time(x, MIN_CALLS, clock)))
    return min(MAX_CALLS, max(MIN_CALLS, round(BLOCK_SECONDS / seconds)))


def _read_limit(memory: Tensor, clock: Clock) -> float:
    """Bytes per second that the threads read together; by the same clock as the linears."""
    seconds = []
    for _ in range(READS):
        began = clock()
        native.read_seconds(memory)
        seconds.append(clock() - began)
    return memory.numel() / statistics.median(seconds)
