"""`gblm bench watch` beside two live servers, against what their load generators measured."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from soak_load import one_run

from gblm.bench.compare import LOAD
from gblm.bench.metrics import Target
from gblm.bench.watch import Window, watch
from gblm.record import Record

# The canary's traffic: prompt and generated tokens, requests in flight on each server.
KIND, CONCURRENCY, SECONDS, INTERVAL = (64, 32), 4, 120.0, 5.0
Side = tuple[str, Path]


def watched(a: Side, b: Side) -> dict[str, Any]:
    """Load both servers alike and watch them.

    Args:
        a: URL and folder of the dense one.
        b: of the candidate.
    """
    sides = dict(zip("ab", (a, b), strict=True))
    with ThreadPoolExecutor(len(sides)) as pool:
        first = list(pool.map(lambda s: _traffic(*s, 4 * CONCURRENCY), sides.values()))
        count = int(SECONDS * min(row["requests_per_s"] for row in first))
        begun = threading.Event()
        window = Window(SECONDS * 1.5, INTERVAL)
        seen = pool.submit(watch, Target.of("A", a[0]), Target.of("B", b[0]), window,
                           lambda *_: begun.set)  # fmt: skip
        begun.wait(60)
        with ThreadPoolExecutor(len(sides)) as loads:
            rows = list(loads.map(lambda s: _traffic(*s, count), sides.values()))
        found = seen.result()
    own = dict(zip(sides, rows, strict=True))
    metrics = {metric: _agreement(found, own, metric) for metric in ("ttft", "tpot")}
    return {
        "requests": count,
        "concurrency": CONCURRENCY,
        "load_generators": own,
        "metrics": metrics,
        "notes": list(found.verdict.notes),
        "window": found.provenance["settings"],
        "kept": all(row["agrees"] for row in metrics.values()),
    }


def _traffic(url: str, folder: Path, count: int) -> dict[str, Any]:
    return one_run(url, folder, KIND, count, CONCURRENCY, 0)


def _agreement(record: Record, own: dict[str, dict[str, Any]], metric: str) -> dict[str, Any]:
    """One metric of both; the generators' ratio must lie in the interval of the watched one."""
    key = f"mean_{metric}_ms"
    ratio = own["a"][key] / own["b"][key]
    row = record.row("B", LOAD, f"{metric}_ms_speedup")
    low, high = (row and row.interval) or (None, None)
    return {
        "watched_ms": {s.lower(): record.value(s, LOAD, f"{metric}_ms_mean") for s in "AB"},
        "generators_ms": {side: own[side][key] for side in "ab"},
        "ratio": row and row.value, "low": low, "high": high,
        "generators_ratio": ratio,
        "agrees": low is not None and high is not None and low <= ratio <= high,
    }  # fmt: skip
