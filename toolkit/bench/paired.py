"""Statistics of interleaved rounds: medians within a round, ratios paired by round, their spread.

Works on plain numbers: times[name][round] is the list of the seconds of that round's calls.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

DRAWS, CONFIDENCE = 10_000, 0.95
Times = Mapping[str, Sequence[Sequence[float]]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def round_medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """One median per round."""
    return [statistics.median(calls) for calls in rounds]


def speedup(times: Times, name: str, baseline: str) -> dict[str, float]:
    """How often faster than the baseline: the ratio of medians of each round, and its spread."""
    pairs = zip(round_medians(times[baseline]), round_medians(times[name]), strict=True)
    return spread([theirs / ours for theirs, ours in pairs])


def bootstrap_median(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """The median, and the interval that CONFIDENCE of the medians of resampled values lie in.

    Percentile bootstrap (Efron 1979): DRAWS samples with replacement. Of fewer than six values the
    interval is all but their range.

    Args:
        values: such as ratios that were paired by round.
        seed: of the draws.
    """
    found = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(found), size=(DRAWS, len(found)))
    medians = np.median(found[picks], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"median": float(np.median(found)), "low": float(low), "high": float(high)}


def share_of_limit(medians: Sequence[float], size: int, limit: float) -> dict[str, float]:
    """Bytes per second of each round over a limit, and its spread.

    Args:
        medians: seconds, one per round.
        size: bytes that a call must read.
        limit: bytes per second.
    """
    return spread([size / seconds / limit for seconds in medians])


def percentile(rounds: Sequence[Sequence[float]], share: float) -> float:
    """The smallest value that at least this share of all calls does not exceed."""
    calls = sorted(seconds for calls in rounds for seconds in calls)
    return calls[max(1, math.ceil(share * len(calls))) - 1]
