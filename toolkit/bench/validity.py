"""Reasons why the figures of a run do not stand. A figure without evidence is not printed.

Each check takes what was asked and what was seen, and returns sentences; none means that it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gblm.bench.requests import Request, quantile

# Below this share of the rate or concurrency asked for, the load was another one.
RATE, CONCURRENCY = 0.9, 0.7
# More prompt tokens than this share from the prefix cache make first tokens look too fast.
CACHED = 0.01


@dataclass(frozen=True)
class Asked:
    """One load.

    Attributes:
        num_prompts: requests.
        input_len: prompt tokens of each.
        output_len: tokens to generate for each.
        concurrency: requests in flight at most; None is no limit.
        request_rate: requests per second; None sends as soon as there is room.
    """

    num_prompts: int
    input_len: int
    output_len: int
    concurrency: int | None = 1
    request_rate: float | None = None


@dataclass
class Seen:
    """What one run gave.

    Attributes:
        requests: that succeeded, in the order of the prompts.
        seconds: from the first one sent to the last one done.
        failed: requests that did not succeed.
        completed: requests that did, where the tool tells no more of them than that.
        preemptions: requests that the server threw out for want of cache; None if not known.
        cached: share of the prompt tokens that came from the prefix cache; None if not known.
        prompts: "GENERATOR:FINGERPRINT" of the prompts; within one generator they must be equal.
        noise: of `gblm.bench.noise.Meter`.
        extra: further metrics, such as memory.
    """

    requests: Sequence[Request]
    seconds: float
    failed: int = 0
    completed: int | None = None
    preemptions: float | None = None
    cached: float | None = None
    prompts: str = ""
    noise: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """How much noise a run may have, as shares of the machine's CPU time."""

    steal: float = 0.02
    other_load: float = 0.10


def check_run(asked: Asked, seen: Seen, limits: Limits) -> list[str]:
    """What is wrong with one run by itself."""
    done = len(seen.requests) if seen.completed is None else seen.completed
    if seen.failed or done != asked.num_prompts:
        return [f"{done} of {asked.num_prompts} requests succeeded"]
    return [
        *_lengths(asked, seen.requests),
        *_rate(asked, seen),
        *_concurrency(asked, seen),
        *_server(seen),
        *_noise(seen.noise, limits),
    ]


def check_alike(runs: Mapping[str, Seen]) -> list[str]:
    """What is wrong between the sides of one round and load: they must have had equal work.

    Args:
        runs: by side.
    """
    reasons = []
    generators: dict[str, dict[str, Seen]] = {}
    for side, seen in runs.items():
        generators.setdefault(seen.prompts.partition(":")[0], {})[side] = seen
    for own in generators.values():
        reasons += _different("prompts", {side: seen.prompts for side, seen in own.items()})
        inputs = {side: [r.input_len for r in seen.requests] for side, seen in own.items()}
        reasons += _different("prompt lengths", inputs)
    outputs = {side: [r.output_len for r in seen.requests] for side, seen in runs.items()}
    return reasons + _different("output lengths", outputs)


def _lengths(asked: Asked, requests: Sequence[Request]) -> Iterable[str]:
    wrong = [r.output_len for r in requests if r.output_len != asked.output_len]
    if wrong:
        yield (
            f"{len(wrong)} of {len(requests)} answers have another length than the "
            f"{asked.output_len} tokens asked for, such as {wrong[0]}"
        )


def _rate(asked: Asked, seen: Seen) -> Iterable[str]:
    """Neither may the generator be late, nor the server fall behind."""
    rate, requests = asked.request_rate, seen.requests
    if rate is None or len(requests) < 2:
        return
    starts = sorted(r.start for r in requests)
    sending = starts[-1] - starts[0]
    sent = (len(starts) - 1) / sending if sending > 0 else float("inf")
    # The last requests still run when nothing is sent any more.
    tail = quantile([r.latency for r in requests], 0.5)
    done = len(requests) / max(seen.seconds - tail, 1e-9)
    if sent < RATE * rate:
        yield f"{rate:g} requests/s were asked for, {sent:.2f} were sent"
    elif done < RATE * rate:
        yield (
            f"{rate:g} requests/s were asked for, {done:.2f} were finished: the server falls "
            "behind, so latencies grow with the length of the run"
        )


def _concurrency(asked: Asked, seen: Seen) -> Iterable[str]:
    if asked.concurrency is None or asked.request_rate is not None or not seen.requests:
        return
    wanted = min(asked.concurrency, asked.num_prompts)
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


def _noise(noise: Mapping[str, Any], limits: Limits) -> Iterable[str]:
    for key, limit, words in (
        ("steal", limits.steal, "of the CPU time was stolen by the hypervisor"),
        ("other_load", limits.other_load, "of the CPU time went to other processes"),
    ):
        share = noise.get(key, 0.0)
        if share > limit:
            yield f"{share:.1%} {words} (at most {limit:.0%})"
    if count := noise.get("cpu_throttles"):
        yield f"heat throttled the CPU {count} times"
    if seconds := noise.get("gpu_throttle_s"):
        yield f"a GPU ran slower for heat for {seconds:.3g} s"


def _different(what: str, values: Mapping[str, Any]) -> list[str]:
    """A sentence on the first side and one that differs; sides that do not tell do not count."""
    told = [(side, value) for side, value in values.items() if value]
    for side, value in told[1:]:
        if value != told[0][1]:
            return [f"{told[0][0]} and {side} had different {what}"]
    return []
