"""Two servers' growth over the same intervals: rows of a record, ratios, verdicts, caveats.

Ratios are those of the whole window (sum over sum); the intervals only say how sure they are. Each
block of neighbouring intervals is left out once (jackknife, Quenouille 1956), as one burst of
traffic fills several neighbours; how much the ratio then moves gives its standard error, and
Student's t with the number of blocks the 95 % confidence interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gblm.bench.metrics import (
    E2E,
    FINISHED,
    GENERATED,
    HTTP,
    ITL,
    OUTPUT,
    PROMPT,
    REJECTED,
    TPOT,
    TTFT,
    Growth,
    Histogram,
)
from gblm.bench.requests import QUANTILES
from gblm.record import CONFIDENCE, Row

LOAD = "live traffic"
LATENCIES = {"ttft_ms": TTFT, "tpot_ms": TPOT, "itl_ms": ITL, "e2e_ms": E2E}
# Metric → counter, label, what it is counted of.
SHARES = {
    "aborted_percent": (FINISHED, "abort", "requests that ended"),
    "failed_percent": (FINISHED, "error", "requests that ended"),
    "http_5xx_percent": (HTTP, "5", "HTTP requests"),
}
SPEEDUP, POINTS = "_speedup", "_points"
MIN_REQUESTS, MIN_INTERVALS = 30, 8
# Loads that differ by more make latencies incomparable.
ALIKE = 1.2
# Below this share of begun requests that end, those that do are no fair sample of all.
ENDING = 0.9

Pairs = Sequence[tuple[Growth, Growth]]
Columns = NDArray[np.float64]


def compare(pairs: Pairs) -> tuple[list[Row], dict[str, dict[str, Any]], list[str]]:
    """Compare B with A.

    Args:
        pairs: growth of A and of B, one pair per valid interval, in order of time.

    Returns:
        The rows: each server's figures, and under B the ratio to A of every metric with its
        confidence interval ("ttft_ms_speedup", above 1: B is faster; "failed_percent_points": B's
        share less A's). What was asked of each server. Sentences: a verdict on every metric, then
        what to mind.
    """
    servers = {"A": [a for a, _ in pairs], "B": [b for _, b in pairs]}
    facts = {side: _load(growths) for side, growths in servers.items()}
    rows, verdicts = [], []
    for metric, name in LATENCIES.items():
        for side, growths in servers.items():
            rows += _latency_rows(side, metric, _merged(growths, name))
        both = [(a.histograms[name], b.histograms[name]) for a, b in pairs]
        columns = np.array([[a.total, a.count, b.total, b.count] for a, b in both])
        # Tokens of one request are no independent observations: requests are what counts.
        counted = columns[:, [1, 3]] if name != ITL else _ended(pairs)
        verdicts.append(_speedup(rows, metric, columns, counted, ("is faster", "is slower")))
    for side, growths in servers.items():
        speed = _total(growths, GENERATED, "") / facts[side]["seconds"]
        rows.append(Row(side, LOAD, "output_tok_s", "tok/s", speed))
    columns = np.array([[_total([b], GENERATED, ""), b.seconds, _total([a], GENERATED, ""),
                         a.seconds] for a, b in pairs])  # fmt: skip
    words = ("generates more", "generates less")
    verdicts.append(_speedup(rows, "output_tok_s", columns, _ended(pairs), words))
    verdicts += [_share(rows, metric, pairs) for metric in SHARES]
    return rows, facts, [*verdicts, *_caveats(facts, pairs)]


def ratio_interval(columns: Columns) -> tuple[float, float, float] | None:
    """Give the ratio (n / d) / (N / D) and its confidence interval.

    Args:
        columns: [intervals, 4]: n, d, N, D.

    Returns:
        Ratio, low, high; None where one of the four sums is zero, or is without some block.
    """
    blocks = _blocks(columns)
    rest = columns.sum(axis=0) - blocks
    if not columns.sum(axis=0).all() or not (rest > 0).all():
        return None
    middle, half = _jackknife(columns, lambda s: math.log(s[0] / s[1] / (s[2] / s[3])))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def student(freedom: float) -> float:
    """Compute Student's t for CONFIDENCE by Abramowitz & Stegun 26.7.5: 1 % off at 3 degrees."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _jackknife(columns: Columns, statistic: Callable[[Columns], float]) -> tuple[float, float]:
    """Give a statistic of the column sums, and half of its confidence interval."""
    whole, blocks = columns.sum(axis=0), _blocks(columns)
    without = np.array([statistic(whole - block) for block in blocks])
    count = len(blocks)
    error = math.sqrt((count - 1) * float(without.var()))
    return statistic(whole), student(count - 1) * error


def _blocks(columns: Columns) -> Columns:
    """Sum blocks of neighbours, each as long as the cube root of all: [blocks, columns]."""
    size = max(1, round(math.pow(len(columns), 1 / 3)))
    parts = np.array_split(columns, len(columns) // size)
    return np.array([part.sum(axis=0) for part in parts])


def _load(growths: Sequence[Growth]) -> dict[str, Any]:
    """Describe what was asked of one server."""
    seconds = sum(growth.seconds for growth in growths)
    finished = sum(growth.finished() for growth in growths)
    return {
        "seconds": seconds,
        "begun": _merged(growths, TTFT).count,
        "finished": finished,
        "rejected": _total(growths, REJECTED, ""),
        "requests_per_s": finished / seconds,
        "prompt_tokens": _merged(growths, PROMPT).mean,
        "generated_tokens": _merged(growths, OUTPUT).mean,
    }


def _latency_rows(side: str, metric: str, histogram: Histogram) -> list[Row]:
    """Make the rows of mean and quantiles in ms; a quantile's interval is its bucket."""
    if histogram.mean is None:
        return []
    rows = [Row(side, LOAD, f"{metric}_mean", "ms", 1e3 * histogram.mean)]
    for word, share in QUANTILES.items():
        found = histogram.quantile(share)
        # Nothing is known of the last bucket but where it begins.
        if found is not None and math.isfinite(found.high):
            value, low, high = (1e3 * each for each in found)
            rows.append(Row(side, LOAD, f"{metric}_{word}", "ms", value, interval=(low, high)))
    return rows


def _speedup(
    rows: list[Row], metric: str, columns: Columns, counted: Columns, words: tuple[str, str]
) -> str:
    """Add the ratio of one metric to the rows, and say what it means.

    Args:
        rows: to add to.
        metric: for the name.
        columns: as `ratio_interval` takes them, so that above 1 is better.
        counted: [intervals, 2]: requests of A and B.
        words: what B does if the ratio is above 1, and if it is below.
    """
    few = _too_few(counted)
    found = None if few else ratio_interval(columns)
    if found is None:
        return f"{metric}: {few or 'no ratio, as a sum is zero'}"
    ratio, low, high = found
    rows.append(Row("B", LOAD, metric + SPEEDUP, "x", ratio, interval=(low, high)))
    if low > 1:
        return f"{metric}: B {words[0]} by {ratio:.2f}x ({low:.2f}–{high:.2f})"
    if high < 1:
        return f"{metric}: B {words[1]} by {1 / ratio:.2f}x ({1 / high:.2f}–{1 / low:.2f})"
    return f"{metric}: no difference that this window shows ({ratio:.2f}x, {low:.2f}–{high:.2f})"


def _share(rows: list[Row], metric: str, pairs: Pairs) -> str:
    """Add how large a part of a counter one label's values are, and the difference B − A."""
    name, label, of = SHARES[metric]
    columns = np.array([[n for side in pair for n in _parts(side, name, label)] for pair in pairs])
    bad_a, all_a, bad_b, all_b = map(float, columns.sum(axis=0))
    for side, bad, all_ in (("A", bad_a, all_a), ("B", bad_b, all_b)):
        rows.append(Row(side, LOAD, metric, "%", 100 * bad / all_ if all_ else None))
    blocks = _blocks(columns)
    few = _too_few(columns[:, [1, 3]], of)
    if few or not ((columns.sum(axis=0) - blocks)[:, [1, 3]] > 0).all():
        return f"{metric}: {few or f'too few {of}'}"
    points, half = _jackknife(columns, lambda s: float(100 * (s[2] / s[3] - s[0] / s[1])))
    low, high = points - half, points + half
    rows.append(Row("B", LOAD, metric + POINTS, "%", points, interval=(low, high)))
    if low <= 0 <= high:
        return f"{metric}: no difference that this window shows ({points:+.2f} points)"
    edges = sorted((abs(low), abs(high)))
    more = "higher" if low > 0 else "lower"
    return f"{metric}: B is {more} by {abs(points):.2f} points ({edges[0]:.2f}–{edges[1]:.2f})"


def _too_few(counted: Columns, of: str = "requests") -> str | None:
    fewest = int(counted.sum(axis=0).min())
    if fewest < MIN_REQUESTS:
        return f"too few {of}: {fewest} of at least {MIN_REQUESTS}"
    filled = int((counted > 0).all(axis=1).sum())
    if filled < MIN_INTERVALS:
        return f"too few intervals with {of} on both: {filled} of at least {MIN_INTERVALS}"
    return None


def _parts(growth: Growth, name: str, label: str) -> tuple[float, float]:
    """Count one label (a status: all that begin so), and all that could have had it."""
    found = {word: n for (counter, word), n in growth.counters.items() if counter == name}
    if name != HTTP:
        return found.get(label, 0.0), sum(found.values())
    # Clients' own errors (4xx) say nothing about the server.
    bad = sum(n for status, n in found.items() if status.startswith(label))
    return bad, bad + sum(n for status, n in found.items() if status.startswith("2"))


def _ended(pairs: Pairs) -> Columns:
    return np.array([[a.finished(), b.finished()] for a, b in pairs])


def _total(growths: Sequence[Growth], name: str, label: str) -> float:
    return sum(growth.counters.get((name, label), 0.0) for growth in growths)


def _merged(growths: Sequence[Growth], name: str) -> Histogram:
    first, *others = (growth.histograms[name] for growth in growths)
    for other in others:
        first = first + other
    return first


def _caveats(facts: dict[str, dict[str, Any]], pairs: Pairs) -> list[str]:
    """Say what makes the verdicts less than they look."""
    found = []
    for key, words in {
        "requests_per_s": "requests per second",
        "prompt_tokens": "prompt tokens per request",
        "generated_tokens": "generated tokens per request",
    }.items():
        a, b = facts["A"][key], facts["B"][key]
        if a and b and max(a, b) > ALIKE * min(a, b):
            found.append(
                f"{words} differ by more than 20 % (A {a:.4g}, B {b:.4g}): latencies are not "
                "comparable."
            )
    for side, values in facts.items():
        if values["finished"] < ENDING * values["begun"]:
            found.append(
                f"{side}: {values['begun']:.0f} requests gave a first token but only "
                f"{values['finished']:.0f} ended: the window is short beside a request, or clients "
                "hung up, which vLLM counts nowhere; TPOT and end-to-end latency miss these."
            )
    a, b = pairs[0]
    if any(a.histograms[name].bounds != b.histograms[name].bounds for name in a.histograms):
        found.append("the servers' histograms have different buckets: do not compare quantiles.")
    return found
