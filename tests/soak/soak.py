"""A long soak of `gblm serve`, faults of every kind, and damaged folders by the thousand.

    python tests/soak/soak.py [--minutes 15] [--cases 10000] [--steps serving endings fuzz watch]

Serves SmolLM2, pruned to 2:4 and packed, in bf16. Each step puts its result, with where and when it
was measured, into benchmarks/results/soak.json as soon as it is known; the exit code is 1 when one
did not keep what docs/reliability.md says.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bad_requests
import faults
import pages
from soak_load import SPREAD, load_for, one_run, resident_bytes, sampled, slope, warm_up

from gblm.bench.metrics import Target
from gblm.bench.server import RunningServer, running_server
from gblm.bench.watch import LOAD, watch
from gblm.fetch import fetch
from gblm.model.folder import resolve
from gblm.provenance import provenance
from gblm.prune import prune
from gblm.recipe import Recipe
from gblm.record import Record, Verdict

HERE = Path(__file__).resolve().parent
RECORD = HERE.parents[1] / "benchmarks" / "results" / "soak.json"
CONTEXT, NAME = 1024, "model"
OPTIONS = ("--enforce-eager", "--max-model-len", str(CONTEXT))
SHUTDOWN_SECONDS, RED_SECONDS = 30, 10.0
# Tokens of each request that SIGTERM meets: as many as take so long.
LEAST_TOKENS, MOST_TOKENS, DRAIN_SECONDS = 4, 64, 8.0
STORMS = 3
# Threads that wait by spinning stand still when they share cores with other work.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
LONG = ("runs", "samples")  # only in the record
AT_ONCE, CHUNK = 4, 2500  # processes, and cases in each: a crash ends only its own
# The canary's traffic: prompt and generated tokens, requests in flight on each server.
KIND, CONCURRENCY, SECONDS, ROUNDS = (64, 32), 4, 120.0, 24
Side = tuple[str, Path]


@dataclass(frozen=True)
class Soak:
    """What to run: minutes of load with so many requests in flight, and so many damaged folders."""

    dense: Path
    packed: Path
    minutes: float
    concurrency: int
    cases: int
    log: Path

    @contextmanager
    def serve(self, folder: Path | None = None) -> Iterator[RunningServer]:
        """A server of the packed model, or of another folder."""
        with running_server(
            folder or self.packed, None, OPTIONS, self.log, SHUTDOWN_SECONDS
        ) as server:
            yield server


def serving(soak: Soak) -> Iterator[tuple[str, dict[str, Any]]]:
    """One server: load, then clients that misbehave."""
    with soak.serve() as server:
        tokens = faults.greedy(server.url, NAME)
        yield "load", load(soak, server, tokens)
        yield "storms", storms(soak, server, tokens)


def endings(soak: Soak) -> Iterator[tuple[str, dict[str, Any]]]:
    """One server whose engine is killed, and the next one, which SIGTERM ends."""
    with soak.serve() as server:
        tokens = faults.greedy(server.url, NAME)
        killed = kill(soak, server)
    with soak.serve() as server:
        same = faults.greedy(server.url, NAME) == tokens
        yield "kill", {**killed, "same_tokens_after": same, "kept": killed["kept"] and same}
        yield "sigterm", sigterm(soak, server)


def load(soak: Soak, server: RunningServer, tokens: list[int]) -> dict[str, Any]:
    """Mixed requests for a quarter of an hour; none may fail, memory may not grow."""
    rates = warm_up(server.url, soak.packed, soak.concurrency)
    with sampled(server.url, server.process.pid) as samples:
        runs = load_for(server.url, soak.packed, rates, soak.minutes, soak.concurrency)
    same = faults.greedy(server.url, NAME) == tokens
    memory = slope(samples.seconds, samples.resident)
    failed = sum(run["failed"] for run in runs)
    return {
        "minutes": round(samples.seconds[-1] / 60, 2),
        "concurrency": soak.concurrency,
        "spread": SPREAD,
        "requests": sum(run["requests"] for run in runs),
        "failed": failed,
        "in_flight_mean": round(sum(samples.in_flight) / len(samples.in_flight), 1),
        "in_flight_max": max(samples.in_flight),
        "load_average_mean": round(sum(samples.load) / len(samples.load), 1),
        "memory": memory,
        "same_tokens_after": same,
        "runs": runs,
        "samples": vars(samples),
        "kept": failed == 0 and same and memory["low"] <= 0,
    }


def storms(soak: Soak, server: RunningServer, tokens: list[int]) -> dict[str, Any]:
    """Clients that hang up and requests that are wrong, with healthy requests between."""
    url, bad = server.url, bad_requests.bad_requests(NAME, CONTEXT)
    before = resident_bytes(server.process.pid)
    aborts = [faults.abort_storm(url, NAME, soak.concurrency, 16) for _ in range(STORMS)]
    same = [faults.greedy(url, NAME) == tokens]
    statuses, healthy = {}, 0
    for one in bad:
        statuses |= bad_requests.refuse_all(url, [one])
        healthy += faults.greedy(url, NAME) == tokens
    storm = Counter(bad_requests.bad_storm(url, bad, soak.concurrency, 10))
    same.append(faults.greedy(url, NAME) == tokens)
    after = resident_bytes(server.process.pid)
    refused = all(status in bad_requests.REFUSED for status in (*statuses.values(), *storm))
    gone = all(row["stayed"] == row["stayed_complete"] for row in aborts)
    return {
        "aborts": aborts,
        "bad": statuses,
        "healthy_between": healthy,
        "bad_storm": {str(status): count for status, count in sorted(storm.items(), key=str)},
        "same_tokens_after": all(same),
        "resident_mb": [round(before / 1e6, 1), round(after / 1e6, 1)],
        "kept": refused and gone and healthy == len(bad) and all(same)
        and not any(row["running_after"] for row in aborts),
    }  # fmt: skip


def sigterm(soak: Soak, server: RunningServer) -> dict[str, Any]:
    """SIGTERM while so many requests are answered."""
    count = soak.concurrency
    seconds = faults.seconds_for(server.url, NAME, count, LEAST_TOKENS)
    # The drain must fit into the shutdown timeout on a slow machine, too.
    tokens = max(LEAST_TOKENS, min(MOST_TOKENS, int(LEAST_TOKENS * DRAIN_SECONDS / seconds)))
    found = faults.sigterm_under_load(server.url, server.process, NAME, count, tokens)
    kept = found["complete"] == found["in_flight"] == soak.concurrency and found["exit_code"] == 0
    in_time = found["seconds_to_last_answer"] <= SHUTDOWN_SECONDS
    return {
        **found,
        "tokens": tokens,
        "shutdown_timeout": SHUTDOWN_SECONDS,
        "kept": kept and in_time,
    }


def kill(soak: Soak, server: RunningServer) -> dict[str, Any]:
    """SIGKILL of the engine while so many requests are answered."""
    found = faults.kill_engine(server.url, server.process, NAME, soak.concurrency)
    red = found["seconds_to_red_health"] <= RED_SECONDS
    return {**found, "kept": red and found["exit_code"] > 0 and found["processes_left"] == 0}


def fuzz(soak: Soak) -> Iterator[tuple[str, dict[str, Any]]]:
    """Damaged folders without an engine, in processes of their own."""
    firsts = range(0, soak.cases, CHUNK)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        chunks = list(pool.map(lambda first: _fuzz(first, min(CHUNK, soak.cases - first)), firsts))
    found = [one for chunk in chunks for one in chunk["found"]]
    counts = ("cases", "refused", "loaded unchanged", "loaded as stored", "seconds")
    yield (
        "fuzz",
        {
            **{key: round(sum(chunk.get(key, 0) for chunk in chunks), 1) for key in counts},
            "folders": chunks[0].get("folders"),
            "found": found,
            "kept": not found,
        },
    )


def _fuzz(first: int, cases: int) -> dict[str, Any]:
    words = ["--first", str(first), "--cases", str(cases)]
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz.py"), *words],
        check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    crashed = {"found": [f"cases from {first}: ended with code {done.returncode}"]}
    counts: dict[str, Any] = json.loads(done.stdout) if done.stdout else crashed
    return counts


def watched(a: Side, b: Side) -> dict[str, Any]:
    """Load a dense server and its candidate alike, and watch them."""
    sides = dict(zip("ab", (a, b), strict=True))
    with ThreadPoolExecutor(len(sides)) as pool:
        first = list(pool.map(lambda s: traffic(*s, 4 * CONCURRENCY), sides.values()))
        count = int(SECONDS * min(row["requests_per_s"] for row in first))
        begun = threading.Event()
        seen = pool.submit(watch, Target.of("A", a[0]), Target.of("B", b[0]), SECONDS * 1.5, ROUNDS,
                           lambda *_: begun.set)  # fmt: skip
        begun.wait(60)
        with ThreadPoolExecutor(len(sides)) as loads:
            rows = list(loads.map(lambda s: traffic(*s, count), sides.values()))
        found = seen.result()
    own = dict(zip(sides, rows, strict=True))
    metrics = {metric: agreement(found, own, metric) for metric in ("ttft", "tpot")}
    return {
        "requests": count,
        "concurrency": CONCURRENCY,
        "load_generators": own,
        "metrics": metrics,
        "notes": list(found.verdict.notes),
        "window": found.provenance["settings"],
        "kept": all(row["agrees"] for row in metrics.values()),
    }


def traffic(url: str, folder: Path, count: int) -> dict[str, Any]:
    """What a load generator measures of the canary's traffic."""
    return one_run(url, folder, KIND, count, CONCURRENCY, 0)


def agreement(record: Record, own: dict[str, dict[str, Any]], metric: str) -> dict[str, Any]:
    """One metric of both; the generators' ratio must lie in the interval of the watched one."""
    key = f"mean_{metric}_ms"
    ratio = own["a"][key] / own["b"][key]
    found = record.ratio("A", LOAD, f"{metric}_ms_mean", "B")
    return {
        "watched_ms": {s.lower(): record.value(s, LOAD, f"{metric}_ms_mean") for s in "AB"},
        "generators_ms": {side: own[side][key] for side in "ab"},
        "ratio": found and found.median, "low": found and found.low, "high": found and found.high,
        "generators_ratio": ratio,
        "agrees": found is not None and found.low <= ratio <= found.high,
    }  # fmt: skip


def canary(soak: Soak) -> Iterator[tuple[str, dict[str, Any]]]:
    """A dense server and a packed one, watched under the same load."""
    with soak.serve(soak.dense) as dense, soak.serve() as packed:
        yield "watch", watched((dense.url, soak.dense), (packed.url, soak.packed))


STEPS = {"serving": serving, "endings": endings, "fuzz": fuzz, "watch": canary}


def save(name: str, result: dict[str, Any], origin: dict[str, Any]) -> None:
    """Put a step's result into the record as facts of a side, in the place of an older one."""
    steps = {**(Record.read(RECORD).sides if RECORD.exists() else {}), name: result}
    reasons = [
        f"{step} did not keep what it should" for step, of in steps.items() if not of["kept"]
    ]
    record = Record(
        kind="soak", sides=steps, rows=(), verdict=Verdict(not reasons, tuple(reasons)),
        provenance=origin | {"threads": THREADS}, command=pages.made_by("tests/soak"),
    )  # fmt: skip
    pages.save(record, RECORD)


def main() -> None:
    """Run the chosen steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--cases", type=int, default=10_000, help="damaged folders")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--model", help="dense folder; fetched if not given")
    parser.add_argument("--packed", type=Path, help="folder of the pruned model, made before")
    chosen = parser.parse_args()
    os.environ.update(THREADS)
    origin = provenance()  # before the record is written, which would leave the checkout dirty
    dense, kept = resolve(chosen.model) if chosen.model else fetch("smollm2"), True
    with tempfile.TemporaryDirectory() as work:
        packed = chosen.packed or Path(work) / "packed"
        if not chosen.packed:
            prune(Recipe(model=str(dense), method="magnitude", calibration=None), packed)
        log = Path(tempfile.gettempdir()) / "gblm-soak-servers.log"
        soak = Soak(dense, packed, chosen.minutes, chosen.concurrency, chosen.cases, log)
        for step in chosen.steps:
            before, began = os.getloadavg()[0], time.monotonic()
            for name, result in STEPS[step](soak):
                facts = {
                    "load_average": [round(before, 1), round(os.getloadavg()[0], 1)],
                    "step_seconds": round(time.monotonic() - began, 1),
                    "provenance": origin,
                }
                save(name, result | facts, origin)
                kept = kept and result["kept"]
                few = {key: value for key, value in result.items() if key not in LONG}
                print(name, json.dumps(few), flush=True)
                before, began = os.getloadavg()[0], time.monotonic()
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
