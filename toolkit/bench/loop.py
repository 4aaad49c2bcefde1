"""A decode loop in a process of its own: one request at a time, greedy, with a key-value cache.

`measure` starts it and reads what it saw; `serve` is what runs inside, with an engine's decoder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gblm.bench.noise import measured
from gblm.bench.requests import Request
from gblm.bench.server import child_environment, last_words, run_child
from gblm.bench.sides import LOOPS, Side
from gblm.bench.validity import Asked, Seen
from gblm.errors import MachineError

LIMIT_SECONDS = 3600
MARK = "GBLM-LOOP "


class Decoder(Protocol):
    """A model with a cache."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens that it knows."""

    def reset(self) -> None:
        """Forget all tokens."""

    def run(self, tokens: Sequence[int]) -> int:
        """Append tokens; returns the most likely next one."""


def measure(
    side: Side, loads: Sequence[Asked], seed: int, threads: int | None, backend: str | None
) -> list[Seen]:
    """Load a model in a new process and run every load after a warm-up request.

    Args:
        side: of an engine of LOOPS.
        loads: of one request at a time.
        seed: of the prompts' random tokens.
        threads: of the engine; its own choice if None.
        backend: for packed weights in transformers; the best one if None.

    Raises:
        MachineError: the process failed; its last line is quoted.
    """
    found = []
    for asked in loads:
        chosen = side.backend(backend)
        work = {"asked": asdict(asked), "seed": seed, "threads": threads, "backend": chosen}
        with measured() as meter:
            said = _run(side, work)
        requests = [Request(**{**row, "itls": tuple(row["itls"])}) for row in said["requests"]]
        found.append(
            Seen(
                requests,
                said["seconds"],
                prompts=said["prompts"],
                noise=meter.evidence(),
                extra={key: said[key] for key in ("load_s", "memory_mb", "peak_memory_mb")},
            )
        )
    return found


def _run(side: Side, work: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", LOOPS[side.engine], str(side.path), json.dumps(work)]
    done = run_child(command, f"{side.name}:", LIMIT_SECONDS, child_environment())
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise MachineError(
            f"{side.name}: {side.engine} ended with code {done.returncode}: {last_words(done)}"
        )
    said: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return said


def serve(open_decoder: Callable[[Path, dict[str, Any]], Decoder]) -> None:
    """The main program of a loop: read the work from the command line, print what was seen.

    Args:
        open_decoder: takes the model's path and the work.
    """
    path, work = Path(sys.argv[1]), json.loads(sys.argv[2])
    began = time.perf_counter()
    decoder = open_decoder(path, work)
    decoder.run([0])
    loaded = time.perf_counter() - began
    asked = Asked(**work["asked"])
    tokens = prompts(decoder.vocabulary, asked, work["seed"])
    one_request(decoder, tokens[0].tolist(), asked.output_len)
    began = time.perf_counter()
    requests = [one_request(decoder, row.tolist(), asked.output_len, began) for row in tokens]
    seconds = time.perf_counter() - began
    # Kilobytes on Linux; the most that the process ever held.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    said = {
        "requests": [asdict(request) for request in requests],
        "seconds": seconds,
        "prompts": f"loop:{hashlib.sha256(tokens.tobytes()).hexdigest()}",
        "load_s": loaded,
        "memory_mb": peak,
        "peak_memory_mb": peak,
    }
    print(MARK + json.dumps(said))


def prompts(vocabulary: int, asked: Asked, seed: int) -> NDArray[np.int64]:
    """Random tokens [num_prompts, input_len] int64."""
    shape = (asked.num_prompts, asked.input_len)
    return np.random.default_rng(seed).integers(vocabulary, size=shape, dtype=np.int64)


def one_request(
    decoder: Decoder, prompt: Sequence[int], output_len: int, clock_start: float = 0.0
) -> Request:
    """Decode one prompt to the full length; the end-of-text token is a token like others."""
    decoder.reset()
    began = time.perf_counter()
    token = decoder.run(prompt)
    times = [time.perf_counter()]
    for _ in range(output_len - 1):
        token = decoder.run([token])
        times.append(time.perf_counter())
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    return Request(
        began - clock_start, times[-1] - began, len(prompt), len(times), times[0] - began, gaps
    )
