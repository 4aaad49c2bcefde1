"""A server's /metrics: one bounded GET, vLLM's counters and histograms in it, and their growth.

The server is not trusted: none of its words reach a message. Names are those of
vllm/v1/metrics/loggers.py, version 0.32; prometheus_client parses the text.
"""

from __future__ import annotations

import http.client
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gblm.errors import GblmError, InputError, MachineError
from gblm.network import exchange, read_key, split_address, warn_of_plain_key

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from prometheus_client.samples import Sample

TTFT = "vllm:time_to_first_token_seconds"
TPOT = "vllm:request_time_per_output_token_seconds"
ITL = "vllm:inter_token_latency_seconds"
E2E = "vllm:e2e_request_latency_seconds"
PROMPT = "vllm:request_prompt_tokens"
OUTPUT = "vllm:request_generation_tokens"
HISTOGRAMS = (TTFT, TPOT, ITL, E2E, PROMPT, OUTPUT)

GENERATED = "vllm:generation_tokens_total"
FINISHED = "vllm:request_success_total"
REJECTED = "vllm:admission_rejections_total"
# Of the API server, not of the engine; it alone sees requests that never reach the engine.
HTTP = "http_requests_total"
# Counter → the label whose values are counted apart.
COUNTERS = {GENERATED: "", FINISHED: "finished_reason", REJECTED: "", HTTP: "status"}
START = "process_start_time_seconds"

SECONDS = 10.0
# vLLM's metrics of one engine are some 100 KB.
MAX_BYTES = 16 * 2**20

Series = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Target:
    """A target says where one server's metrics are; the key is sent as a bearer token.

    Messages call the server by its name, A or B.
    """

    name: str
    url: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, url: str, key_file: Path | None = None) -> Target:
        """Check a server's address, and read its key.

        Args:
            name: A or B.
            url: of the server, or of its metrics.
            key_file: holds the API key.

        Raises:
            UsageError: this is not an http or https address, or it has more than host and path.
            InputError: the file holds no key.
        """
        parts = split_address(f"server {name}", url)
        key = None if key_file is None else read_key(key_file)
        if key is not None:
            warn_of_plain_key(f"server {name}", parts)
        path = parts.path.rstrip("/").removesuffix("/metrics")
        return cls(name, f"{parts.scheme}://{parts.netloc}{path}/metrics", key)

    def fetch(self, seconds: float = SECONDS) -> str:
        """Fetch the text of the metrics.

        Args:
            seconds: for everything from connecting to the last byte.

        Raises:
            MachineError: there is no answer, not in time, or it is not 200.
            InputError: the answer is too large or not UTF-8.
        """
        limit = time.monotonic() + seconds
        try:
            status, body = exchange(self.url, self.key, limit, MAX_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= limit or isinstance(error, TimeoutError):
                raise self._late(seconds) from error
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise MachineError(
                f"server {self.name} cannot be reached at {self.url}: {reason}."
            ) from error
        if time.monotonic() >= limit:
            raise self._late(seconds)
        if status != 200:
            raise self._refused(status)
        if len(body) > MAX_BYTES:
            raise InputError(
                f"server {self.name}: {self.url} gives more than {MAX_BYTES >> 20} MiB; "
                "that is not vLLM's metrics."
            )
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"server {self.name}: {self.url} is not UTF-8 text.") from error

    def _late(self, seconds: float) -> MachineError:
        return MachineError(f"server {self.name}: {self.url} did not answer within {seconds:g} s.")

    def _refused(self, status: int) -> GblmError:
        if 300 <= status < 400:
            hint = "redirects are not followed: give the final address"
        elif status in (401, 403):
            hint = "give the API key with --api-key-file"
        else:
            hint = "is this the address of a vLLM server?"
        return MachineError(f"server {self.name}: {self.url} answers HTTP {status}; {hint}.")


class RestartError(Exception):
    """A counter went down or is gone, so its growth is unknown."""


class Quantile(NamedTuple):
    """This is an interpolated quantile and the bucket it lies in; infinite in the last bucket."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Histogram:
    """A histogram counts observations in buckets, each for itself, and keeps their sum.

    The upper bounds of the buckets rise, and the last one is infinite.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float

    @property
    def count(self) -> float:
        """Count the observations."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Give the exact mean, as the sum is kept beside the buckets; None without observations."""
        return self.total / self.count if self.count else None

    def __add__(self, other: Histogram) -> Histogram:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Histogram(self.bounds, counts, self.total + other.total)

    def quantile(self, share: float) -> Quantile | None:
        """Interpolate linearly in the bucket that holds the quantile, as Prometheus does.

        This is as coarse as the buckets: nothing is known about where in its bucket the quantile
        lies. vLLM's have bounds at 10, 25, 50, 75 and 100 ms for tokens (all below 10 ms is one
        bucket), at 100, 250, 500 ms for first tokens, at 0.3, 0.5, 0.8, 1 s for requests.

        Args:
            share: of the observations that are not above the quantile, in (0, 1).

        Returns:
            None without observations.
        """
        wanted, seen, low = share * self.count, 0.0, 0.0
        if not self.count:
            return None
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count and seen + count >= wanted:
                break
            seen, low = seen + count, bound
        if math.isinf(bound):
            return Quantile(bound, low, bound)
        return Quantile(low + (bound - low) * (wanted - seen) / count, low, bound)


@dataclass(frozen=True)
class Growth:
    """The growth says what happened on one server between two times.

    Counters are increases by name and the value of the label ("" without one), histograms hold the
    observations made meanwhile.
    """

    seconds: float
    counters: Mapping[tuple[str, str], float]
    histograms: Mapping[str, Histogram]

    def finished(self) -> float:
        """Count the requests that ended, for whatever reason."""
        return sum(n for (name, _), n in self.counters.items() if name == FINISHED)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot holds a server's counters at one time, a series for each set of labels."""

    seconds: float
    series: Mapping[Series, float]
    bounds: Mapping[str, tuple[float, ...]]
    started: float | None

    @classmethod
    def parse(cls, text: str, seconds: float) -> Snapshot:
        """Read an answer of /metrics.

        Args:
            text: in Prometheus' text format.
            seconds: when it came, by a clock that never goes back.

        Raises:
            InputError: it is not in that format, or not of a vLLM server.
            MachineError: prometheus_client is not installed.
        """
        series: dict[Series, float] = {}
        started = None
        for sample in samples(text):
            if sample.name == START:
                started = sample.value
            elif _is_counted(sample):
                if not 0 <= sample.value < math.inf:
                    raise InputError(f"{sample.name} is not a count.")
                series[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        names = {name for name, _ in series}
        needed = {GENERATED, FINISHED, *(f"{name}_bucket" for name in HISTOGRAMS)}
        if missing := sorted(needed - names):
            raise InputError(
                f"there is no {missing[0]}; this must be a vLLM server (0.32 or newer) that runs "
                "without --disable-log-stats."
            )
        return cls(seconds, series, {name: _bounds(name, series) for name in HISTOGRAMS}, started)

    def growth_since(self, before: Snapshot) -> Growth:
        """Subtract all earlier counters; engines and models are summed.

        Raises:
            RestartError: the server was started anew in between.
        """
        lost = [key for key, value in before.series.items() if self.series.get(key, -1) < value]
        if lost or (before.started, before.bounds) != (self.started, self.bounds):
            raise RestartError
        grown = {key: value - before.series.get(key, 0) for key, value in self.series.items()}
        counters: dict[tuple[str, str], float] = defaultdict(float)
        for (name, labels), value in grown.items():
            if name in COUNTERS:
                counters[name, dict(labels).get(COUNTERS[name], "")] += value
        return Growth(
            self.seconds - before.seconds,
            dict(counters),
            {name: _histogram(name, bounds, grown) for name, bounds in self.bounds.items()},
        )


def samples(text: str) -> Iterator[Sample]:
    """Read Prometheus' text format.

    Raises:
        InputError: it is another.
        MachineError: prometheus_client is not installed.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise MachineError(
            "reading /metrics needs `prometheus_client`: pip install 'gblm-toolkit[bench]'."
        ) from error
    try:
        families: list[Metric] = list(text_string_to_metric_families(text))
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise InputError("this is not Prometheus' text format.") from error
    for family in families:
        yield from family.samples


def _is_counted(sample: Sample) -> bool:
    parts = ("_bucket", "_sum")
    return sample.name in COUNTERS or any(
        sample.name == name + part for name in HISTOGRAMS for part in parts
    )


def _bounds(name: str, series: Mapping[Series, float]) -> tuple[float, ...]:
    words = {dict(labels).get("le", "") for key, labels in series if key == f"{name}_bucket"}
    try:
        bounds = tuple(sorted(map(float, words)))
    except ValueError:
        bounds = ()
    if not bounds or bounds[-1] != math.inf:
        raise InputError(f"{name} lacks its bucket without a bound.")
    return bounds


def _histogram(name: str, bounds: tuple[float, ...], grown: Mapping[Series, float]) -> Histogram:
    cumulative: dict[float, float] = defaultdict(float)
    total = 0.0
    for (sample, labels), value in grown.items():
        if sample == f"{name}_bucket":
            cumulative[float(dict(labels)["le"])] += value
        elif sample == f"{name}_sum":
            total += value
    below = (0.0, *(cumulative[bound] for bound in bounds[:-1]))
    # A scrape may fall into an observation: a bucket then lags behind the one below it.
    counts = tuple(max(0.0, cumulative[b] - low) for b, low in zip(bounds, below, strict=True))
    return Histogram(bounds, counts, total)
