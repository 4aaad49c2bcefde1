"""What a side is asked to do, what was seen of it, and its metrics: the same for all engines.

TTFT is the time from sending to the first token. TPOT is (end to end − TTFT) / (tokens − 1) of one
request. ITL is each gap between tokens. So `vllm bench serve` defines them; other tools' differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
# Metric → unit; metrics over requests have their quantile behind the name.
UNITS = {
    "ttft_ms": "ms", "tpot_ms": "ms", "itl_ms": "ms", "e2e_ms": "ms", "requests_per_s": "1/s",
    "output_tok_s": "tok/s", "total_tok_s": "tok/s", "decode_tok_s": "tok/s",
    "cpu_ms_per_token": "ms", "memory_mb": "MB", "load_s": "s",
    "steal": "", "other_load": "", "read_limit_gb_s": "GB/s",
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """A load is what a side is asked to do in a round; lengths are in tokens.

    `concurrency` requests are in flight: another one is sent as soon as one is done.
    """

    num_prompts: int
    prompt_len: int
    output_len: int
    concurrency: int = 1

    @property
    def words(self) -> str:
        """Name the load as records do."""
        return (
            f"{self.num_prompts} prompts of {self.prompt_len} + {self.output_len} tokens, "
            f"concurrency {self.concurrency}"
        )


@dataclass(frozen=True)
class Request:
    """A request that succeeded; all times are in seconds, all lengths in tokens.

    It started on the clock of its load and had its last token after `latency`; `itls` are the gaps
    between its tokens. Where the tool does not tell, `ttft` is None and `itls` are empty.
    """

    start: float
    latency: float
    input_len: int
    output_len: int
    ttft: float | None = None
    itls: tuple[float, ...] = ()

    @property
    def tpot(self) -> float | None:
        """Give the seconds per token after the first; None for one token or an unknown TTFT."""
        if self.ttft is None or self.output_len < 2:
            return None
        return (self.latency - self.ttft) / (self.output_len - 1)


@dataclass
class Seen:
    """This is what one side did under one load.

    `requests` are those that succeeded, in the order of the prompts, and `failed` counts the
    others; it all took `seconds`. `preemptions` are requests thrown out for want of cache, `cached`
    is the share of prompt tokens from the prefix cache; None if not known. `prompts` is
    "GENERATOR:FINGERPRINT", equal within one generator; `extra` are further metrics.
    """

    requests: Sequence[Request]
    seconds: float
    failed: int = 0
    preemptions: float | None = None
    cached: float | None = None
    prompts: str = ""
    noise: Mapping[str, Any] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)


def metrics_of(seen: Seen) -> dict[str, float]:
    """Give all metrics of a run that its tool can tell, by name."""
    requests, seconds = seen.requests, seen.seconds
    tpots = [r.tpot for r in requests if r.tpot is not None]
    found = {
        **_quantiles("ttft_ms", [r.ttft for r in requests if r.ttft is not None]),
        **_quantiles("tpot_ms", tpots),
        **_quantiles("itl_ms", [gap for r in requests for gap in r.itls]),
        **_quantiles("e2e_ms", [r.latency for r in requests]),
        "requests_per_s": len(requests) / seconds,
        "output_tok_s": sum(r.output_len for r in requests) / seconds,
        "total_tok_s": sum(r.input_len + r.output_len for r in requests) / seconds,
    }
    if tpots:
        # Of one stream after its first token.
        found["decode_tok_s"] = 1 / statistics.median(tpots)
    noise = {key: seen.noise[key] for key in ("steal", "other_load", "read_limit_gb_s")
             if seen.noise.get(key) is not None}  # fmt: skip
    return found | seen.extra | noise


def unit_of(metric: str) -> str:
    """Find the unit of a metric, with or without its quantile."""
    name, _, last = metric.rpartition("_")
    return UNITS[name if last in QUANTILES else metric]


def _quantiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = 1e3 * np.quantile(seconds, list(QUANTILES.values()))
    return dict(zip((f"{name}_{word}" for word in QUANTILES), values.tolist(), strict=True))
