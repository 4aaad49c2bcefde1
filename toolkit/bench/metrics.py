"""A server's /metrics: one bounded GET, vLLM's counters in it, and their growth.

The server is not trusted: none of its words reach a message. Names are those of
vllm/v1/metrics/loggers.py, version 0.32; prometheus_client parses the text.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gblm.errors import InputError, MachineError
from gblm.network import get, read_key, server_address

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from prometheus_client.samples import Sample

TTFT = "vllm:time_to_first_token_seconds"
TPOT = "vllm:request_time_per_output_token_seconds"
ITL = "vllm:inter_token_latency_seconds"
E2E = "vllm:e2e_request_latency_seconds"
PROMPT = "vllm:request_prompt_tokens"
OUTPUT = "vllm:request_generation_tokens"
# Histograms, of which only what gives the mean is read: it is exact, and no quantile is.
MEANS = (TTFT, TPOT, ITL, E2E, PROMPT, OUTPUT)

GENERATED = "vllm:generation_tokens_total"
FINISHED = "vllm:request_success_total"
# Of the API server, not of the engine; it alone sees requests that never reach the engine.
HTTP = "http_requests_total"
# Counter → the label whose values are counted apart.
COUNTERS = {GENERATED: "", FINISHED: "finished_reason", HTTP: "status"} | {
    f"{name}_{part}": "" for name in MEANS for part in ("sum", "count")
}
START = "process_start_time_seconds"

SECONDS = 10.0
# vLLM's metrics of one engine are some 100 KB.
MAX_BYTES = 16 * 2**20

# A counter's name and the value of its label, "" without one → its value over all engines.
Counts = Mapping[tuple[str, str], float]


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

        Raises:
            UsageError: this is not an http or https address, or it has more than host and path.
            InputError: the file holds no key.
        """
        key = None if key_file is None else read_key(key_file)
        return cls(name, server_address(f"server {name}", url, key, "/metrics") + "/metrics", key)

    def fetch(self, seconds: float = SECONDS) -> str:
        """Fetch the text of the metrics.

        Args:
            seconds: for everything from connecting to the last byte.

        Raises:
            MachineError: there is no answer, not in time, or it is not 200.
            InputError: the answer is too large or not UTF-8.
        """
        body = get(f"server {self.name}", self.url, self.key, seconds, MAX_BYTES)
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"server {self.name}: {self.url} is not UTF-8 text.") from error


@dataclass(frozen=True)
class Growth:
    """The growth says by how much each counter of one server grew between two times."""

    seconds: float
    counters: Counts

    def of(self, name: str, label: str = "") -> float:
        """Count what begins with a label; all of a counter if that is "", 0 if there is none."""
        grown = self.counters.items()
        return sum(n for (known, word), n in grown if known == name and word.startswith(label))


@dataclass(frozen=True)
class Snapshot:
    """A snapshot holds a server's counters at one time."""

    seconds: float
    counters: Counts
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
        counters: dict[tuple[str, str], float] = defaultdict(float)
        started = None
        for sample in samples(text):
            if sample.name == START:
                started = sample.value
            elif sample.name in COUNTERS:
                if not 0 <= sample.value < math.inf:
                    raise InputError(f"{sample.name} is not a count.")
                label = sample.labels.get(COUNTERS[sample.name], "")
                counters[sample.name, label] += sample.value
        if missing := sorted(COUNTERS.keys() - {HTTP} - {name for name, _ in counters}):
            raise InputError(
                f"there is no {missing[0]}; this must be a vLLM server (0.32 or newer) that runs "
                "without --disable-log-stats."
            )
        return cls(seconds, dict(counters), started)

    def growth_since(self, before: Snapshot) -> Growth | None:
        """Subtract all earlier counters.

        Returns:
            None where a counter went down or is gone: the server was started anew in between.
        """
        lost = [key for key, value in before.counters.items() if self.counters.get(key, -1) < value]
        if lost or before.started != self.started:
            return None
        grown = {key: value - before.counters.get(key, 0) for key, value in self.counters.items()}
        return Growth(self.seconds - before.seconds, grown)


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
