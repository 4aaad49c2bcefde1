"""Load for a server by `vllm bench serve` in repeated runs, and its memory meanwhile."""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from faults import in_flight
from vllm.benchmarks import serve as bench

from gblm.bench.requests import Load
from gblm.bench.server import bench_words

# Prompt and generated tokens of the kinds of request, each ± SPREAD.
SHAPES = ((256, 8), (16, 48), (64, 24), (128, 16))
SPREAD = 0.5
STREAMS = 4  # load generators at once, so that kinds mix and some work while another starts
RUN_SECONDS, LEAST_SECONDS = 120.0, 20.0
SAMPLE_SECONDS = 5.0
BLOCKS = 12
# Student's t for 95 % and the 10 degrees of freedom of a line through so many blocks.
STUDENT = 2.228


@dataclass
class Samples:
    """What was read every few seconds: bytes of all processes, requests, the load average."""

    seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)
    load: list[float] = field(default_factory=list)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all below it; pages they share count in each."""
    root = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (root, *root.children(recursive=True)))


@contextmanager
def sampled(url: str, pid: int) -> Iterator[Samples]:
    """Read memory and requests in flight in the background."""
    samples, stop, began = Samples(), threading.Event(), time.monotonic()

    def read() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            running = in_flight(httpx.get(f"{url}/metrics", timeout=60).text)
            samples.seconds.append(round(time.monotonic() - began, 2))
            samples.resident.append(resident_bytes(pid))
            samples.in_flight.append(running)
            samples.load.append(round(os.getloadavg()[0], 2))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def slope(seconds: list[float], resident: list[int]) -> dict[str, Any]:
    """A straight line through the means of blocks of neighbours, which hide that samples are alike.

    Gives MB per minute with the 95 % confidence interval, and how many MB blocks lie off the line.
    """
    times = np.array([block.mean() for block in np.array_split(np.array(seconds) / 60, BLOCKS)])
    means = np.array([block.mean() for block in np.array_split(np.array(resident) / 1e6, BLOCKS)])
    centred = times - times.mean()
    per_minute = float(centred @ means / (centred @ centred))
    rest = means - means.mean() - per_minute * centred
    spread = float(np.sqrt(rest @ rest / (BLOCKS - 2)))
    half = STUDENT * spread / float(np.sqrt(centred @ centred))
    return {
        "mb_per_minute": round(per_minute, 4),
        "low": round(per_minute - half, 4),
        "high": round(per_minute + half, 4),
        "off_the_line_mb": round(spread, 3),
        "first_mb": round(float(means[0]), 1),
        "last_mb": round(float(means[-1]), 1),
    }


def load_for(
    url: str, folder: Path, rates: dict[tuple[int, int], float], minutes: float, concurrency: int
) -> list[dict[str, Any]]:
    """Load a server for so many minutes with all kinds of request; one row per run.

    The rates are those of `warm_up`; so many requests are in flight over all generators.
    """
    end, seeds = time.monotonic() + 60 * minutes, itertools.count(1)

    def stream(number: int) -> list[dict[str, Any]]:
        rows = []
        for turn in itertools.count(number):
            shape = SHAPES[turn % len(SHAPES)]
            seconds = min(RUN_SECONDS, end - time.monotonic())
            if seconds < LEAST_SECONDS:
                return rows
            count = max(1, int(rates[shape] * seconds))
            rows.append(one_run(url, folder, shape, count, concurrency // STREAMS, next(seeds)))
            rates[shape] = rows[-1]["requests_per_s"]
        raise AssertionError

    with ThreadPoolExecutor(STREAMS) as pool:
        return [row for rows in pool.map(stream, range(STREAMS)) for row in rows]


def warm_up(url: str, folder: Path, concurrency: int) -> dict[tuple[int, int], float]:
    """One run of each kind, all at once; requests per second. vLLM touches its cache at start."""
    each = concurrency // STREAMS

    def run(shape: tuple[int, int]) -> float:
        rate: float = one_run(url, folder, shape, each, each, 0)["requests_per_s"]
        return rate

    with ThreadPoolExecutor(STREAMS) as pool:
        return dict(zip(SHAPES, pool.map(run, SHAPES), strict=True))


def one_run(
    url: str, folder: Path, shape: tuple[int, int], count: int, concurrency: int, seed: int
) -> dict[str, Any]:
    """One run of the load generator, and what of it is recorded."""
    load = Load(count, shape[0], shape[1], concurrency)
    with tempfile.TemporaryDirectory() as work:
        words = bench_words(url, folder, load, seed, Path(work))
        found = bench_here([*words, "--random-range-ratio", str(SPREAD)])
    return {
        "prompt_tokens": shape[0],
        "generated_tokens": shape[1],
        "requests": count,
        "completed": found["completed"],
        "failed": count - found["completed"],
        "seconds": round(found["duration"], 1),
        "requests_per_s": found["completed"] / found["duration"],
        "output_tok_s": found["output_throughput"],
        # vLLM's are numpy's, which compare to a bool that JSON does not know.
        **{key: float(found[key]) for key in ("mean_ttft_ms", "mean_tpot_ms", "p99_ttft_ms")},
    }


def bench_here(options: list[str]) -> dict[str, Any]:
    """`vllm bench serve` in this process: its start takes longer than some runs."""
    parser = argparse.ArgumentParser()
    bench.add_cli_args(parser)
    found: dict[str, Any] = bench.main(parser.parse_args(options))
    return found
