"""Reasons why the figures of a run do not stand. A figure without evidence is not printed.

Each check takes what was asked and what was seen, and gives sentences; none means that it holds.
Noise of the machine is judged by `gblm.bench.noise`: it condemns a round, not a side.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gblm.bench.requests import Load, Request, Seen

# Below this share of the rate or concurrency asked for, the load was another one.
RATE, CONCURRENCY = 0.9, 0.7
# More prompt tokens than this share from the prefix cache make first tokens look too fast.
CACHED = 0.01


def check_work(load: Load, seen: Seen) -> list[str]:
    """Say what is wrong with the work of one side by itself."""
    done = len(seen.requests)
    if seen.failed or done != load.num_prompts:
        return [f"{done} of {load.num_prompts} requests succeeded"]
    return [
        *_lengths(load, seen.requests),
        *_rate(load, seen),
        *_concurrency(load, seen),
        *_server(seen),
    ]


def check_alike(sides: Mapping[str, Seen]) -> list[str]:
    """Say what is wrong between the sides of one round: they must have had equal work."""
    reasons = []
    generators: dict[str, dict[str, Seen]] = {}
    for side, seen in sides.items():
        generators.setdefault(seen.prompts.partition(":")[0], {})[side] = seen
    for own in generators.values():
        reasons += _different("prompts", {side: seen.prompts for side, seen in own.items()})
        inputs = {side: [r.input_len for r in seen.requests] for side, seen in own.items()}
        reasons += _different("prompt lengths", inputs)
    outputs = {side: [r.output_len for r in seen.requests] for side, seen in sides.items()}
    return reasons + _different("output lengths", outputs)


def _lengths(load: Load, requests: Sequence[Request]) -> Iterable[str]:
    wrong = [r.output_len for r in requests if r.output_len != load.output_len]
    if wrong:
        yield (
            f"{len(wrong)} of {len(requests)} answers have another length than the "
            f"{load.output_len} tokens asked for, such as {wrong[0]}"
        )


def _rate(load: Load, seen: Seen) -> Iterable[str]:
    """Check that the generator was not late and the server did not fall behind."""
    rate, requests = load.request_rate, seen.requests
    if rate is None or len(requests) < 2:
        return
    starts = sorted(r.start for r in requests)
    sending = starts[-1] - starts[0]
    sent = (len(starts) - 1) / sending if sending > 0 else float("inf")
    # The last requests still run when nothing is sent any more.
    tail = statistics.median(r.latency for r in requests)
    done = len(requests) / max(seen.seconds - tail, 1e-9)
    if sent < RATE * rate:
        yield f"{rate:g} requests/s were asked for, {sent:.2f} were sent"
    elif done < RATE * rate:
        yield (
            f"{rate:g} requests/s were asked for, {done:.2f} were finished: the server falls "
            "behind, so latencies grow with the length of the run"
        )


def _concurrency(load: Load, seen: Seen) -> Iterable[str]:
    if load.concurrency is None or load.request_rate is not None or not seen.requests:
        return
    wanted = min(load.concurrency, load.num_prompts)
    mean = sum(r.latency for r in seen.requests) / seen.seconds
    if mean < CONCURRENCY * wanted:
        yield (
            f"{wanted} requests in flight were asked for, on average there were {mean:.2f}; raise "
            "--num-prompts"
        )


def _server(seen: Seen) -> Iterable[str]:
    if seen.preemptions:
        yield (
            f"{seen.preemptions:.0f} preemptions: the key-value cache is too small for this load"
        )
    if seen.cached is not None and seen.cached > CACHED:
        yield f"{seen.cached:.0%} of the prompt tokens came from the prefix cache"


def _different(what: str, values: Mapping[str, Any]) -> list[str]:
    """Name the first side and one that differs; sides that do not tell do not count."""
    told = [(side, value) for side, value in values.items() if value]
    for side, value in told[1:]:
        if value != told[0][1]:
            return [f"{told[0][0]} and {side} had different {what}"]
    return []
