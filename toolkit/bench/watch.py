"""Watch two live servers: read both /metrics again and again, compare what happened in between.

No request is sent to a model: the traffic is what the servers' users send. The time is cut into
rounds, which pair up as those of every record: a ratio is the median over the rounds. A figure is
that of the whole window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from gblm.bench.metrics import (
    E2E,
    FINISHED,
    GENERATED,
    HTTP,
    ITL,
    OUTPUT,
    PROMPT,
    TPOT,
    TTFT,
    Growth,
    Snapshot,
    Target,
)
from gblm.errors import GblmError, MachineError, UsageError
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance
from gblm.record import Record, Row, Verdict

LOAD = "live traffic"
# The median of fewer rounds has no 95 % interval; fewer requests are too few for a mean.
MIN_ROUNDS, MIN_REQUESTS = 6, 30
# Loads that differ by more make latencies incomparable.
ALIKE = 1.2
# Below this share of begun requests that end, those that do are no fair sample of all.
ENDING = 0.9

Part = Callable[[Growth], float]
Pairs = Sequence[tuple[Growth, Growth]]


@dataclass(frozen=True)
class Metric:
    """A metric is `scale` times one part of what grew on a server over another.

    `better` says what a good server has of it, "" where that is not to be judged.
    """

    unit: str
    scale: float
    above: Part
    below: Part
    better: str = ""


def _mean(name: str, unit: str, scale: float = 1, better: str = "") -> Metric:
    """Take the mean of a histogram, which its sum and count give exactly."""
    return Metric(unit, scale, lambda g: g.of(f"{name}_sum"), lambda g: g.of(f"{name}_count"),
                  better)  # fmt: skip


def _share(name: str, label: str, every: Sequence[str] = ("",)) -> Metric:
    """Take how much of a counter some labels are, in per cent."""
    return Metric(
        "%", 100, lambda g: g.of(name, label), lambda g: sum(g.of(name, e) for e in every)
    )


METRICS = {
    "ttft_ms_mean": _mean(TTFT, "ms", 1e3, "less"),
    "tpot_ms_mean": _mean(TPOT, "ms", 1e3, "less"),
    "itl_ms_mean": _mean(ITL, "ms", 1e3, "less"),
    "e2e_ms_mean": _mean(E2E, "ms", 1e3, "less"),
    "output_tok_s": Metric("tok/s", 1, lambda g: g.of(GENERATED), lambda g: g.seconds, "more"),
    "requests_per_s": Metric("1/s", 1, lambda g: g.of(FINISHED), lambda g: g.seconds),
    "prompt_tokens": _mean(PROMPT, "tokens"),
    "generated_tokens": _mean(OUTPUT, "tokens"),
    "aborted_percent": _share(FINISHED, "abort"),
    "failed_percent": _share(FINISHED, "error"),
    # Clients' own errors (4xx) say nothing about the server.
    "http_5xx_percent": _share(HTTP, "5", ("2", "5")),
}


def watch(
    a: Target, b: Target, duration: float, rounds: int, progress: Progress = no_progress
) -> Record:
    """Compare two live vLLM servers.

    A reading that fails is left out: the round then reaches to the next one that succeeds, so that
    a server too busy to answer does not lose its slowest minutes. A round in which a server
    restarted counts for neither.

    Args:
        a: the server to compare with.
        b: the candidate.
        duration: for how long they are watched, in seconds.
        rounds: how many parts that is cut into.
        progress: for a progress bar.

    Returns:
        The record. It is not valid where too few requests ended; else it has a sentence on every
        metric that says how good a server is.

    Raises:
        UsageError: there are too few rounds, or both addresses are the same.
        MachineError: a server cannot be reached at the start, or no round is valid.
        InputError: what it answers is not vLLM's metrics.
    """
    if rounds < MIN_ROUNDS:
        raise UsageError(f"--rounds {rounds}: give at least {MIN_ROUNDS}, for a 95 % interval.")
    if a.url == b.url:
        raise UsageError(f"A and B are the same server: {a.url}.")
    origin = {**provenance(), "settings": {"duration": duration, "rounds": rounds}}
    pairs, problems = _readings(a, b, duration / rounds, rounds, progress)
    if not pairs:
        raise MachineError(f"no round of this window can be used: {'; '.join(problems)}.")
    return compare({"A": a.url, "B": b.url}, pairs, problems, origin)


def compare(
    urls: Mapping[str, str], pairs: Pairs, problems: Sequence[str], origin: Mapping[str, Any]
) -> Record:
    """Make the record of what happened on both servers in each round, and of what went wrong."""
    by_side = dict(zip(urls, zip(*pairs, strict=True), strict=True))
    sides = {
        side: {
            "url": url,
            "begun": sum(growth.of(f"{TTFT}_count") for growth in by_side[side]),
            "finished": sum(growth.of(FINISHED) for growth in by_side[side]),
        }
        for side, url in urls.items()
    }
    reasons = tuple(
        f"server {side}: {facts['finished']:.0f} requests ended, at least {MIN_REQUESTS} are needed"
        for side, facts in sides.items()
        if facts["finished"] < MIN_REQUESTS
    )
    rows = () if reasons else tuple(row for name in METRICS for row in _rows(name, by_side))
    record = Record("watch", sides, rows, "A", Verdict(not reasons, reasons), origin)
    notes = (*_sentences(record), *_caveats(record), *problems)
    return replace(record, verdict=replace(record.verdict, notes=notes))


def _rows(name: str, by_side: Mapping[str, Sequence[Growth]]) -> Iterator[Row]:
    """Give a metric of both servers; a round counts where both have something to divide by."""
    metric = METRICS[name]
    pairs = zip(*by_side.values(), strict=True)
    counted = [all(map(metric.below, pair)) for pair in pairs]
    for side, growths in by_side.items():
        below = sum(map(metric.below, growths))
        if below:
            value = metric.scale * sum(map(metric.above, growths)) / below
            rounds = tuple(
                metric.scale * metric.above(growth) / metric.below(growth)
                for growth, counts in zip(growths, counted, strict=True)
                if counts
            )
            yield Row(side, LOAD, name, metric.unit, value, rounds)


def _sentences(record: Record) -> Iterator[str]:
    """Say which server is better by each metric that judges one."""
    for name in record.metrics:
        if METRICS[name].better:
            yield f"{name}: {_judged(record, name)}"


def _judged(record: Record, name: str) -> str:
    ratio = record.ratio("B", LOAD, name)
    if ratio is None or len(ratio.rounds) < MIN_ROUNDS:
        return "no verdict, as there are too few rounds with requests on both"
    found = f"B has {ratio.median:.2f} times A's ({ratio.low:.2f}–{ratio.high:.2f})"
    if ratio.low <= 1 <= ratio.high:
        return f"no difference that this window shows; {found}"
    good = (ratio.median < 1) == (METRICS[name].better == "less")
    return f"B is {'better' if good else 'worse'}; {found}"


def _caveats(record: Record) -> Iterator[str]:
    """Say what makes the verdicts less than they look."""
    for name in ("requests_per_s", "prompt_tokens", "generated_tokens"):
        a, b = (record.value(side, LOAD, name) for side in record.sides)
        if a and b and max(a, b) > ALIKE * min(a, b):
            yield (
                f"{name} differ by more than 20 % (A {a:.4g}, B {b:.4g}): latencies are not "
                "comparable."
            )
    for side, facts in record.sides.items():
        if facts["finished"] < ENDING * facts["begun"]:
            yield (
                f"{side}: {facts['begun']:.0f} requests gave a first token but only "
                f"{facts['finished']:.0f} ended: the window is short beside a request, or clients "
                "hung up, which vLLM counts nowhere; TPOT and end-to-end latency miss these."
            )


def _readings(
    a: Target, b: Target, seconds: float, rounds: int, progress: Progress
) -> tuple[list[tuple[Growth, Growth]], list[str]]:
    """Read both servers all the time.

    Returns:
        What happened in each valid round, and sentences on what went wrong. A round ends with a
        reading that succeeds; the first one must.
    """
    pairs: list[tuple[Growth, Growth]] = []
    problems: list[str] = []
    last = None
    step = progress("readings", rounds + 1)
    with ThreadPoolExecutor(2) as pool:
        for _ in _ticks(seconds, rounds):
            clock = datetime.now(UTC).isoformat(timespec="seconds")
            now = list(pool.map(_read, (a, b)))
            errors = [answer for answer in now if isinstance(answer, GblmError)]
            if errors and last is None:
                raise errors[0]
            problems += [f"{clock}: {str(error).rstrip('.')}" for error in errors]
            first, second = now
            if isinstance(first, Snapshot) and isinstance(second, Snapshot):
                if last is not None:
                    grown = (first.growth_since(last[0]), second.growth_since(last[1]))
                    problems += _restarts(clock, grown)
                    if grown[0] is not None and grown[1] is not None:
                        pairs.append((grown[0], grown[1]))
                last = (first, second)
            step()
    return pairs, problems


def _restarts(clock: str, grown: Sequence[Growth | None]) -> list[str]:
    return [
        f"before {clock}: server {side} restarted, or is several behind one address; this round "
        "does not count"
        for side, growth in zip("AB", grown, strict=True)
        if growth is None
    ]


def _ticks(seconds: float, rounds: int) -> Iterator[None]:
    """Return at the time of each reading; one that is missed by a whole round is skipped."""
    began = time.monotonic()
    for number in range(rounds + 1):
        wait = began + number * seconds - time.monotonic()
        if wait > -seconds or number == rounds:
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
