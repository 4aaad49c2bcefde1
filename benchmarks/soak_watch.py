"""`gblm bench watch` beside two live servers, against what their load generators measured."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from soak_load import one_run

from gblm.bench.scrape import Target
from gblm.bench.watch import Window, watch

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
    metrics = {
        metric: _agreement(found["metrics"][metric], own, f"mean_{metric}_ms")
        for metric in ("ttft", "tpot")
    }
    return {
        "requests": count,
        "concurrency": CONCURRENCY,
        "load_generators": own,
        "metrics": metrics,
        "verdicts": {name: row["verdict"] for name, row in found["metrics"].items()},
        "caveats": found["caveats"],
        "problems": found["problems"],
        "window": found["window"],
        "kept": all(row["agrees"] for row in metrics.values()),
    }


def _traffic(url: str, folder: Path, count: int) -> dict[str, Any]:
    return one_run(url, folder, KIND, count, CONCURRENCY, 0)


def _agreement(row: dict[str, Any], own: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    """One metric of both; the generators' ratio must lie in the interval of the watched one."""
    ratio = own["a"][key] / own["b"][key]
    return {
        "watched_ms": {side: 1000 * row[side]["mean"] for side in "ab"},
        "generators_ms": {side: own[side][key] for side in "ab"},
        "ratio": row["ratio"], "low": row["low"], "high": row["high"],
        "generators_ratio": ratio,
        "verdict": row["verdict"],
        "agrees": row["ratio"] is not None and bool(row["low"] <= ratio <= row["high"]),
    }  # fmt: skip
