"""Two servers' growth over the same intervals: ratios, how sure they are, verdicts, caveats.

Ratios are those of the whole window (sum over sum); the intervals only say how sure they are. They
are drawn anew 1000 times, with replacement and for both servers at once, in blocks of neighbours,
as one burst of traffic fills several of them (circular block bootstrap, Politis & Romano 1992). The
spread of the draws is a standard error, Student's t with the number of blocks makes it the 95 %
confidence interval: the plain percentiles of so few intervals are much too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gblm.bench.counters import (
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

LATENCIES = {"ttft": TTFT, "tpot": TPOT, "itl": ITL, "e2e": E2E}
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
MIN_REQUESTS, MIN_INTERVALS = 30, 8
DRAWS, CONFIDENCE = 1000, 0.95
# Loads that differ by more make latencies incomparable.
ALIKE = 1.2
# Below this share of begun requests that end, those that do are no fair sample of all.
ENDING = 0.9

Pairs = Sequence[tuple[Growth, Growth]]
Columns = NDArray[np.float64]


def compare(pairs: Pairs) -> dict[str, Any]:
    """All metrics of A and B.

    Args:
        pairs: growth of A and of B, one pair per valid interval, in order of time.

    Returns:
        "load" of both, "metrics" with a verdict each, "caveats".
    """
    load = {"a": _load([a for a, _ in pairs]), "b": _load([b for _, b in pairs])}
    metrics = {metric: _latency(pairs, name) for metric, name in LATENCIES.items()}
    metrics["throughput"] = _throughput(pairs)
    metrics["aborted"] = _share(pairs, FINISHED, "abort", "aborts", "requests that ended")
    metrics["failed"] = _share(pairs, FINISHED, "error", "fails", "requests that ended")
    metrics["http_5xx"] = _share(pairs, HTTP, "5", "answers 5xx", "HTTP requests")
    return {"load": load, "metrics": metrics, "caveats": _caveats(load, pairs)}


def resample(columns: Columns, seed: int = 0) -> Columns:
    """Sums over intervals that are drawn anew in blocks of neighbours.

    Args:
        columns: [intervals, columns]; the columns of one interval stay together.
        seed: of the draws.

    Returns:
        [DRAWS, columns].
    """
    count, block = len(columns), _block(len(columns))
    blocks = -(-count // block)
    starts = np.random.default_rng(seed).integers(count, size=(DRAWS, blocks, 1))
    picks = ((starts + np.arange(block)) % count).reshape(DRAWS, -1)[:, :count]
    sums: Columns = columns[picks].sum(axis=1)
    return sums


def ratio_interval(columns: Columns) -> tuple[float, float, float] | None:
    """The ratio (n / d) / (N / D) and its confidence interval.

    Args:
        columns: [intervals, 4]: n, d, N, D.

    Returns:
        Ratio, low, high; None where one of the four sums is zero. Draws with a zero are left out.
    """
    whole, drawn = columns.sum(axis=0), resample(columns)
    if not whole.all():
        return None
    n, d, other_n, other_d = drawn[drawn.all(axis=1)].T
    ratio = float(whole[0] / whole[1] / (whole[2] / whole[3]))
    half = _half_width(np.log(n / d / (other_n / other_d)), len(columns))
    return ratio, ratio * math.exp(-half), ratio * math.exp(half)


def _block(intervals: int) -> int:
    """Neighbours that are drawn together."""
    return max(1, round(math.pow(intervals, 1 / 3)))


def _half_width(draws: Columns, intervals: int) -> float:
    """Half a confidence interval, from the draws of a statistic."""
    blocks = intervals / _block(intervals)
    error = float(draws.std()) * math.sqrt(blocks / (blocks - 1))
    return student(blocks - 1) * error


def student(freedom: float) -> float:
    """Student's t that CONFIDENCE lies within: Abramowitz & Stegun 26.7.5, 1 % off at 3 degrees."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _load(growths: Sequence[Growth]) -> dict[str, Any]:
    """What was asked of one server."""
    seconds = sum(growth.seconds for growth in growths)
    finished = sum(growth.finished() for growth in growths)
    reasons = sorted({label for g in growths for name, label in g.counters if name == FINISHED})
    return {
        "seconds": seconds,
        "begun": _merged(growths, TTFT).count,
        "finished": finished,
        "finished_by_reason": {reason: _total(growths, FINISHED, reason) for reason in reasons},
        "rejected": _total(growths, REJECTED, ""),
        "requests_per_s": finished / seconds,
        "prompt_tokens": _merged(growths, PROMPT).mean,
        "generated_tokens": _merged(growths, OUTPUT).mean,
    }


def _latency(pairs: Pairs, name: str) -> dict[str, Any]:
    """One histogram of seconds; a ratio above 1 says that B's mean is shorter."""
    sides = {"a": [a for a, _ in pairs], "b": [b for _, b in pairs]}
    row = {side: _summary(_merged(growths, name)) for side, growths in sides.items()}
    both = [(a.histograms[name], b.histograms[name]) for a, b in pairs]
    columns = np.array([[a.total, a.count, b.total, b.count] for a, b in both])
    # Tokens of one request are no independent observations: requests are what counts.
    counted = columns[:, [1, 3]] if name != ITL else _ended(pairs)
    return {"unit": "s", **row, **_verdict(columns, counted, "is faster", "is slower")}


def _throughput(pairs: Pairs) -> dict[str, Any]:
    """Generated tokens per second; a ratio above 1 says that B generates more."""
    tokens = [[_total([side], GENERATED, "") for side in pair] for pair in pairs]
    columns = np.array(
        [[t[1], b.seconds, t[0], a.seconds] for t, (a, b) in zip(tokens, pairs, strict=True)]
    )
    n, d, other_n, other_d = columns.sum(axis=0)
    return {
        "unit": "tok/s",
        "a": {"mean": float(other_n / other_d)},
        "b": {"mean": float(n / d)},
        **_verdict(columns, _ended(pairs), "generates more", "generates less"),
    }


def _verdict(columns: Columns, counted: Columns, better: str, worse: str) -> dict[str, Any]:
    """Ratio, its interval, and what they say.

    Args:
        columns: as `ratio_interval` takes them.
        counted: [intervals, 2]: requests of A and B.
        better: what B does if the ratio is above 1.
        worse: what B does if it is below.
    """
    few = _too_few(counted)
    found = None if few else ratio_interval(columns)
    if found is None:
        verdict = few or "no ratio: a sum is zero"
        return {"ratio": None, "low": None, "high": None, "verdict": verdict}
    ratio, low, high = found
    if low > 1:
        verdict = f"B {better} by {ratio:.2f}x ({low:.2f}–{high:.2f})"
    elif high < 1:
        verdict = f"B {worse} by {1 / ratio:.2f}x ({1 / high:.2f}–{1 / low:.2f})"
    else:
        verdict = f"no difference that this window shows ({ratio:.2f}x, {low:.2f}–{high:.2f})"
    return {"ratio": ratio, "low": low, "high": high, "verdict": verdict}


def _share(pairs: Pairs, name: str, label: str, verb: str, of: str) -> dict[str, Any]:
    """How large a part of a counter one label's values are, and the difference B − A in points."""
    columns = np.array([[n for side in pair for n in _parts(side, name, label)] for pair in pairs])
    bad_a, all_a, bad_b, all_b = map(float, columns.sum(axis=0))
    row: dict[str, Any] = {
        "unit": "%",
        "a": {"count": bad_a, "of": all_a, "mean": 100 * bad_a / all_a if all_a else None},
        "b": {"count": bad_b, "of": all_b, "mean": 100 * bad_b / all_b if all_b else None},
    }
    few = _too_few(columns[:, [1, 3]], of)
    if few:
        return {**row, "points": None, "low": None, "high": None, "verdict": few}
    drawn = resample(columns)
    drawn = drawn[(drawn[:, 1] > 0) & (drawn[:, 3] > 0)]
    half = _half_width(100 * (drawn[:, 2] / drawn[:, 3] - drawn[:, 0] / drawn[:, 1]), len(columns))
    points = row["b"]["mean"] - row["a"]["mean"]
    low, high = points - half, points + half
    more = "more" if low > 0 else "less" if high < 0 else None
    if more:
        edges = sorted((abs(low), abs(high)))
        verdict = (
            f"B {verb} {more} often, by {abs(points):.2f} points ({edges[0]:.2f}–{edges[1]:.2f})"
        )
    else:
        verdict = f"no difference that this window shows ({points:+.2f} points)"
    return {**row, "points": points, "low": low, "high": high, "verdict": verdict}


def _too_few(counted: Columns, of: str = "requests") -> str | None:
    fewest = int(counted.sum(axis=0).min())
    if fewest < MIN_REQUESTS:
        return f"too few {of}: {fewest} of at least {MIN_REQUESTS}"
    filled = int((counted > 0).all(axis=1).sum())
    if filled < MIN_INTERVALS:
        return f"too few intervals with {of} on both: {filled} of at least {MIN_INTERVALS}"
    return None


def _parts(growth: Growth, name: str, label: str) -> tuple[float, float]:
    """The count of one label (a status: of all that begin so), and of all that could have been."""
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


def _summary(histogram: Histogram) -> dict[str, Any]:
    found = {word: histogram.quantile(share) for word, share in QUANTILES.items()}
    quantiles = {word: q and q._asdict() for word, q in found.items()}
    return {"count": histogram.count, "mean": histogram.mean, **quantiles}


def _caveats(load: dict[str, dict[str, Any]], pairs: Pairs) -> list[str]:
    """What makes the verdicts less than they look."""
    found = []
    for key, words in {
        "requests_per_s": "requests per second",
        "prompt_tokens": "prompt tokens per request",
        "generated_tokens": "generated tokens per request",
    }.items():
        a, b = load["a"][key], load["b"][key]
        if a and b and max(a, b) > ALIKE * min(a, b):
            found.append(
                f"{words} differ by more than 20 % (A {a:.4g}, B {b:.4g}): latencies are not "
                "comparable."
            )
    for side, values in load.items():
        if values["finished"] < ENDING * values["begun"]:
            found.append(
                f"{side.upper()}: {values['begun']:.0f} requests gave a first token but only "
                f"{values['finished']:.0f} ended: the window is short beside a request, or clients "
                "hung up, which vLLM counts nowhere; TPOT and end-to-end latency miss these."
            )
    a, b = pairs[0]
    if any(a.histograms[name].bounds != b.histograms[name].bounds for name in a.histograms):
        found.append("the servers' histograms have different buckets: do not compare quantiles.")
    return found
