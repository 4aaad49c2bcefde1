"""What a load generator saw of every request, and the metrics of a run: one code for all engines.

TTFT: from sending to the first token. TPOT: (end to end − TTFT) / (tokens − 1), of one request.
ITL: each gap between tokens. So `vllm bench serve` defines them; other tools' differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gblm.errors import UsageError

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
Metrics = dict[str, float]


@dataclass(frozen=True)
class Request:
    """One request that succeeded; seconds.

    Attributes:
        start: when it was sent, on the clock of its run.
        latency: until its last token.
        input_len: prompt tokens.
        output_len: generated tokens.
        ttft: None where the tool does not tell.
        itls: gaps between its tokens; empty where the tool does not tell.
    """

    start: float
    latency: float
    input_len: int
    output_len: int
    ttft: float | None = None
    itls: tuple[float, ...] = ()

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first one; None for one token or an unknown TTFT."""
        if self.ttft is None or self.output_len < 2:
            return None
        return (self.latency - self.ttft) / (self.output_len - 1)


@dataclass(frozen=True)
class Slo:
    """Limits that a request must hold to count for goodput; milliseconds, None is no limit."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """A name of PRESETS, or limits such as "ttft:500,tpot:30".

        Raises:
            UsageError: it is neither.
        """
        if text in PRESETS:
            return PRESETS[text]
        limits: dict[str, float] = {}
        for piece in text.split(","):
            key, _, value = piece.strip().partition(":")
            try:
                limit = float(value)
            except ValueError:
                limit = math.nan
            if key not in ("ttft", "tpot", "e2e") or key in limits or not 0 < limit < math.inf:
                raise UsageError(
                    f"--slo {text!r}: {piece!r} is no limit such as ttft:500 (ttft, tpot or e2e, "
                    f"milliseconds); presets: {', '.join(PRESETS)}."
                )
            limits[key] = limit
        return cls(**limits)

    def holds(self, request: Request) -> bool:
        """Whether one request keeps every limit; what is not known keeps none."""
        found = ((self.ttft, request.ttft), (self.tpot, request.tpot), (self.e2e, request.latency))
        return all(
            limit is None or (value is not None and 1e3 * value <= limit) for limit, value in found
        )


# The p99 limits of MLPerf Inference's server and interactive scenarios (loadgen/mlperf.conf).
PRESETS = {
    "mlperf-llama2-70b": Slo(2000, 200),
    "mlperf-llama2-70b-interactive": Slo(450, 40),
    "mlperf-llama3.1-8b": Slo(2000, 100),
    "mlperf-llama3.1-8b-interactive": Slo(500, 30),
    "mlperf-llama3.1-405b": Slo(6000, 175),
    "mlperf-llama3.1-405b-interactive": Slo(4500, 80),
    "mlperf-mixtral-8x7b": Slo(2000, 200),
}


def metrics_of(requests: Sequence[Request], seconds: float, slo: Slo | None = None) -> Metrics:
    """The metrics of one run; those that its tool cannot tell are left out.

    Args:
        requests: at least one.
        seconds: from the first one sent to the last one done.
        slo: for goodput.
    """
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
        found["tok_s_per_user"] = 1 / quantile(tpots, 0.5)
    if slo is not None:
        good = sum(map(slo.holds, requests))
        found["goodput_requests_per_s"] = good / seconds
        found["slo_share"] = good / len(requests)
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the ordered values, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _quantiles(name: str, seconds: Sequence[float]) -> Metrics:
    if not seconds:
        return {}
    return {f"{name}_{word}": 1e3 * quantile(seconds, share) for word, share in QUANTILES.items()}
