"""Watch two live servers: read both /metrics again and again, compare what happened in between.

No request is sent to a model: the traffic is what the servers' users send. Ratios are those of the
whole window (sum over sum); the intervals only say how sure they are. Each block of neighbouring
intervals is left out once (jackknife, Quenouille 1956), as one burst of traffic fills several
neighbours; how much the ratio then moves gives its standard error, and Student's t with the number
of blocks the 95 % confidence interval.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
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
    Snapshot,
    Target,
)
from gblm.errors import GblmError, MachineError, UsageError
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance
from gblm.record import CONFIDENCE, Record, Row, Verdict

LOAD = "live traffic"
LATENCIES = {"ttft_ms": TTFT, "tpot_ms": TPOT, "itl_ms": ITL, "e2e_ms": E2E}
# Metric → counter, the labels that count (what begins so), all labels, what it is counted of.
# Clients' own errors (4xx) say nothing about the server.
SHARES = {
    "aborted_percent": (FINISHED, "abort", ("",), "requests that ended"),
    "failed_percent": (FINISHED, "error", ("",), "requests that ended"),
    "http_5xx_percent": (HTTP, "5", ("2", "5"), "HTTP requests"),
}
SPEEDUP, POINTS = "_speedup", "_points"
MIN_REQUESTS, MIN_INTERVALS = 30, 8
# Loads that differ by more make latencies incomparable.
ALIKE = 1.2
# Below this share of begun requests that end, those that do are no fair sample of all.
ENDING = 0.9

Pairs = Sequence[tuple[Growth, Growth]]
Columns = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """The window says for how long the servers are read, and how often, in seconds."""

    duration: float = 600.0
    interval: float = 10.0

    @property
    def intervals(self) -> int:
        """Count the intervals that fit in; what is left over is not watched."""
        return int(self.duration / self.interval + 1e-9)

    def check(self) -> None:
        """Refuse a window that no verdict can come from.

        Raises:
            UsageError: it holds too few intervals.
        """
        if self.intervals < MIN_INTERVALS:
            raise UsageError(
                f"--duration {self.duration:g} holds {self.intervals} intervals of "
                f"{self.interval:g} s; verdicts need at least {MIN_INTERVALS}."
            )


def watch(a: Target, b: Target, window: Window, progress: Progress = no_progress) -> Record:
    """Compare two live vLLM servers over a window.

    A reading that fails is left out: the interval then reaches to the next one that succeeds, so
    that a server too busy to answer does not lose its slowest minutes. An interval in which a
    server restarted counts for neither.

    Args:
        a: the server to compare with.
        b: the candidate.
        window: when they are read.
        progress: for a progress bar.

    Returns:
        The record; the rows and sentences are those of `compare`.

    Raises:
        UsageError: the window is too short, or both addresses are the same.
        MachineError: a server cannot be reached at the start, or no interval is valid.
        InputError: what it answers is not vLLM's metrics.
    """
    window.check()
    if a.url == b.url:
        raise UsageError(f"A and B are the same server: {a.url}.")
    pairs, problems, count = _readings(a, b, window, progress)
    if not pairs:
        raise MachineError(f"no interval of this window can be used: {'; '.join(problems)}.")
    rows, facts, sentences = compare(pairs)
    return Record(
        kind="watch",
        sides={name: {"url": at.url, **facts[name]} for name, at in (("A", a), ("B", b))},
        rows=tuple(rows),
        baseline="A",
        verdict=Verdict(True, notes=(*sentences, *problems)),
        provenance=provenance()
        | {"settings": {**asdict(window), "intervals": count, "valid": len(pairs)}},
    )


def _readings(
    a: Target, b: Target, window: Window, progress: Progress
) -> tuple[list[tuple[Growth, Growth]], list[str], int]:
    """Read both servers all the time.

    Returns:
        What happened in each valid interval; sentences on what went wrong; how many intervals there
        were. An interval ends with a reading that succeeds; the first one must.
    """
    pairs: list[tuple[Growth, Growth]] = []
    problems: list[str] = []
    count, last = 0, None
    step = progress("readings", window.intervals + 1)
    with ThreadPoolExecutor(2) as pool:
        for _ in _ticks(window):
            clock = datetime.now(UTC).isoformat(timespec="seconds")
            now = list(pool.map(_read, (a, b)))
            errors = [answer for answer in now if isinstance(answer, GblmError)]
            if errors and last is None:
                raise errors[0]
            problems += [f"{clock}: {str(error).rstrip('.')}" for error in errors]
            first, second = now
            if isinstance(first, Snapshot) and isinstance(second, Snapshot):
                if last is not None:
                    count += 1
                    grown = (first.growth_since(last[0]), second.growth_since(last[1]))
                    problems += _restarts(clock, grown)
                    if grown[0] is not None and grown[1] is not None:
                        pairs.append((grown[0], grown[1]))
                last = (first, second)
            step()
    return pairs, problems, count


def _restarts(clock: str, grown: Sequence[Growth | None]) -> list[str]:
    return [
        f"before {clock}: server {side} restarted, or is several behind one address; this interval "
        "does not count"
        for side, growth in zip("AB", grown, strict=True)
        if growth is None
    ]


def _ticks(window: Window) -> Iterator[None]:
    """Return at the time of each reading; one that is missed by a whole interval is skipped."""
    began = time.monotonic()
    for number in range(window.intervals + 1):
        wait = began + number * window.interval - time.monotonic()
        if wait > -window.interval or number == window.intervals:
            time.sleep(max(0.0, wait))
            yield


def _read(target: Target) -> Snapshot | GblmError:
    try:
        text = target.fetch()
    except GblmError as error:
        return error
    try:
        return Snapshot.parse(text, time.monotonic())
    except GblmError as error:
        return type(error)(f"server {target.name}, {target.url}: {error}")


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
    facts = {side: _load([pair[index] for pair in pairs]) for index, side in enumerate("AB")}
    ended = _columns(pairs, lambda growth: [growth.of(FINISHED)])
    rows: list[Row] = []
    verdicts = []
    for metric, name in LATENCIES.items():
        columns = _columns(pairs, partial(_sum_and_count, name))
        _means(rows, f"{metric}_mean", "ms", 1e3, columns)
        # Tokens of one request are no independent observations: requests are what counts.
        counted = columns[:, [1, 3]] if name != ITL else ended
        verdicts.append(_speedup(rows, metric, columns, counted, ("is faster", "is slower")))
    columns = _columns(pairs, lambda growth: [growth.of(GENERATED), growth.seconds])
    _means(rows, "output_tok_s", "tok/s", 1, columns)
    words = ("generates more", "generates less")
    verdicts.append(_speedup(rows, "output_tok_s", columns[:, [2, 3, 0, 1]], ended, words))
    verdicts += [_share(rows, metric, pairs) for metric in SHARES]
    return rows, facts, [*verdicts, *_caveats(facts)]


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

    def total(name: str) -> float:
        return sum(growth.of(name) for growth in growths)

    def mean(name: str) -> float | None:
        count = total(f"{name}_count")
        return total(f"{name}_sum") / count if count else None

    seconds, finished = sum(growth.seconds for growth in growths), total(FINISHED)
    return {
        "seconds": seconds,
        "begun": total(f"{TTFT}_count"),
        "finished": finished,
        "rejected": total(REJECTED),
        "requests_per_s": finished / seconds,
        "prompt_tokens": mean(PROMPT),
        "generated_tokens": mean(OUTPUT),
    }


def _columns(pairs: Pairs, parts: Callable[[Growth], list[float]]) -> Columns:
    """Tabulate parts of what happened on both servers: [intervals, A's parts and then B's]."""
    return np.array([parts(a) + parts(b) for a, b in pairs])


def _sum_and_count(name: str, growth: Growth) -> list[float]:
    return [growth.of(f"{name}_sum"), growth.of(f"{name}_count")]


def _means(rows: list[Row], metric: str, unit: str, scale: float, columns: Columns) -> None:
    """Add sum over count of each server, where anything was counted."""
    for side, (total, count) in zip("AB", columns.sum(axis=0).reshape(2, 2), strict=True):
        if count:
            rows.append(Row(side, LOAD, metric, unit, scale * float(total / count)))


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
    """Add how large a part of a counter some labels are, and the difference B − A."""
    name, label, every, of = SHARES[metric]
    columns = _columns(
        pairs, lambda g: [g.of(name, label), sum(g.of(name, each) for each in every)]
    )
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


def _caveats(facts: dict[str, dict[str, Any]]) -> list[str]:
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
    return found
