"""vLLM under a load: `vllm bench serve`, `latency`, `throughput`, or GuideLLM.

Each tool's result becomes the same list of requests; here is no load generator of our own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gblm.bench import guidellm
from gblm.bench.noise import measured
from gblm.bench.requests import Request
from gblm.bench.scrape import Target
from gblm.bench.server import RunningServer, running_server
from gblm.bench.serving import RESULT, run_vllm_bench
from gblm.bench.sides import Side
from gblm.bench.validity import Asked, Seen
from gblm.errors import UsageError

PREEMPTIONS = "vllm:num_preemptions_total"
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
CACHE_OPTIONS = ("--enable-prefix-caching", "--no-enable-prefix-caching")
# Iterations that `vllm bench latency` runs before it measures.
WARM_UP = 2


@dataclass(frozen=True)
class Context:
    """What all runs of a comparison share.

    Attributes:
        work: a folder for results.
        log: the servers' output.
        options: for vLLM.
        backend: for packed weights; the best one if None.
        seed: of the prompts.
    """

    work: Path
    log: Path
    options: tuple[str, ...] = ()
    backend: str | None = None
    seed: int = 0

    @property
    def vllm_options(self) -> tuple[str, ...]:
        """The user's, and no prefix cache: with one, repeated prompts cost next to nothing."""
        if any(option.partition("=")[0] in CACHE_OPTIONS for option in self.options):
            return self.options
        return (*self.options, "--no-enable-prefix-caching")


def serve(side: Side, loads: Sequence[Asked], context: Context) -> list[Seen]:
    """`vllm bench serve`: one server, one load after the other."""

    def generate(url: str, asked: Asked) -> Seen:
        words = serve_options(url, side, asked, context)
        seen = seen_of(run_vllm_bench(words, context.work / RESULT))
        seen.prompts = fingerprint(side, asked, context)
        return seen

    return served(side, loads, context, generate)


def guided(side: Side, loads: Sequence[Asked], context: Context) -> list[Seen]:
    """GuideLLM in the place of `vllm bench serve`."""

    def generate(url: str, asked: Asked) -> Seen:
        return guidellm.load(url, side.path, asked, context.seed, context.work / "guidellm.json")

    return served(side, loads, context, generate)


def served(
    side: Side,
    loads: Sequence[Asked],
    context: Context,
    generate: Callable[[str, Asked], Seen],
) -> list[Seen]:
    """Start the model's server once, and put each load on it; with what the server counted."""
    found = []
    with running_server(
        side.path, side.backend(context.backend), context.vllm_options, context.log
    ) as server:
        for asked in loads:
            before = counters(server)
            with measured(psutil.Process(server.process.pid)) as meter:
                seen = generate(server.url, asked)
            after = counters(server)
            seen.preemptions = after[PREEMPTIONS] - before[PREEMPTIONS]
            queries = after[QUERIES] - before[QUERIES]
            seen.cached = (after[HITS] - before[HITS]) / queries if queries else 0.0
            seen.noise = meter.evidence()
            memory = server.memory_bytes()
            seen.extra = {
                "load_s": server.ready_seconds,
                "memory_mb": memory / 1e6,
                "peak_memory_mb": (memory + server.given_back_bytes()) / 1e6,
            }
            found.append(seen)
    return found


def serve_options(url: str, side: Side, asked: Asked, context: Context) -> list[str]:
    """The words of `vllm bench`."""
    words = [
        "serve", "--base-url", url, "--model", str(side.path), "--tokenizer", str(side.path),
        "--served-model-name", "model", "--dataset-name", "random",
        "--random-input-len", str(asked.input_len), "--random-output-len", str(asked.output_len),
        "--random-range-ratio", "0", "--num-prompts", str(asked.num_prompts),
        "--num-warmups", "1", "--ignore-eos", "--seed", str(context.seed), "--disable-tqdm",
        "--temperature", "0", "--save-result", "--save-detailed",
        "--result-dir", str(context.work), "--result-filename", RESULT,
    ]  # fmt: skip
    if asked.concurrency is not None:
        words += ["--max-concurrency", str(asked.concurrency)]
    if asked.request_rate is not None:
        words += ["--request-rate", str(asked.request_rate)]
    return words


def seen_of(result: dict[str, Any]) -> Seen:
    """What `vllm bench serve --save-detailed` wrote; failed requests are counted and left out."""
    fields = ("start_times", "latencies", "input_lens", "output_lens", "ttfts", "itls", "errors")
    requests = [
        Request(start, latency, int(input_len), int(output_len), ttft, tuple(itls))
        for start, latency, input_len, output_len, ttft, itls, error in zip(
            *(result[name] for name in fields), strict=True
        )
        if not error
    ]
    return Seen(requests, float(result["duration"]), failed=int(result["failed"]))


def counters(server: RunningServer) -> dict[str, float]:
    """The counters that the checks need, summed over engines."""
    from prometheus_client.parser import text_string_to_metric_families

    text = Target.of("server", server.url).fetch()
    found = dict.fromkeys((PREEMPTIONS, HITS, QUERIES), 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in found:
                found[sample.name] += sample.value
    return found


def fingerprint(side: Side, asked: Asked, context: Context) -> str:
    """Of the random prompts: the same tokenizer, lengths and seed give the same ones."""
    digest = hashlib.sha256(repr((asked.num_prompts, asked.input_len, context.seed)).encode())
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        path = side.path / name
        if path.exists():
            digest.update(path.read_bytes())
    return f"vllm:{digest.hexdigest()}"


def latency(side: Side, loads: Sequence[Asked], context: Context) -> list[Seen]:
    """`vllm bench latency`: batches without a server; each request takes as long as its batch."""
    found = []
    for asked in loads:
        batch = asked.concurrency or 1
        batches = math.ceil(asked.num_prompts / batch)
        words = ["latency", *_model(side, asked, context), "--batch-size", str(batch),
                 "--num-iters", str(batches), "--num-iters-warmup", str(WARM_UP)]  # fmt: skip
        with measured() as meter:
            result = run_vllm_bench(words, context.work / RESULT)
        requests, clock = [], 0.0
        for seconds in result["latencies"]:
            one = Request(clock, float(seconds), asked.input_len, asked.output_len)
            requests += [one] * batch
            clock += float(seconds)
        found.append(Seen(requests[: asked.num_prompts], clock, noise=meter.evidence()))
    return found


def throughput(side: Side, loads: Sequence[Asked], context: Context) -> list[Seen]:
    """`vllm bench throughput`: all requests at once, without a server; totals only."""
    found = []
    for asked in loads:
        words = ["throughput", *_model(side, asked, context), "--num-prompts",
                 str(asked.num_prompts), "--dataset-name", "random",
                 # Its own defaults stand above --input-len and --output-len.
                 "--random-input-len", str(asked.input_len),
                 "--random-output-len", str(asked.output_len),
                 "--random-range-ratio", "0"]  # fmt: skip
        with measured() as meter:
            result = run_vllm_bench(words, context.work / RESULT)
        extra = {
            "requests_per_s": float(result["requests_per_second"]),
            "total_tok_s": float(result["tokens_per_second"]),
        }
        found.append(
            Seen((), float(result["elapsed_time"]), completed=int(result["num_requests"]),
                 noise=meter.evidence(), extra=extra)
        )  # fmt: skip
    return found


def _model(side: Side, asked: Asked, context: Context) -> list[str]:
    return ["--model", str(side.path), "--input-len", str(asked.input_len), "--output-len",
            str(asked.output_len), "--seed", str(context.seed), "--output-json",
            str(context.work / RESULT), *context.vllm_options]  # fmt: skip


Tool = Callable[[Side, Sequence[Asked], Context], list[Seen]]
TOOLS: dict[str, Tool] = {
    "serve": serve, "guidellm": guided, "latency": latency, "throughput": throughput,
}  # fmt: skip
# Those that start a server, to which requests can come at a rate.
WITH_SERVER = ("serve", "guidellm")


def tool_of(name: str) -> Tool:
    """A tool by name.

    Raises:
        UsageError: there is none.
    """
    if name not in TOOLS:
        raise UsageError(f"--with {name!r} is unknown: choose from {', '.join(TOOLS)}.")
    return TOOLS[name]
