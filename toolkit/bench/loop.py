"""A model in an engine without a server: a process of its own that runs requests when told to.

`LoopSide` starts the process and talks to it, one JSON line for each load; `serve` is what runs
inside, with the engine's own code. Engines are imported inside alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from gblm.bench.requests import Load, Request, Seen
from gblm.bench.sides import Side, child_environment, last_error, memory_mb, size_of, stop
from gblm.errors import MachineError, UsageError

# Engine → the module that runs its loop in a process of its own.
LOOPS = {
    "vllm-offline": "gblm.bench.loops",
    "transformers": "gblm.bench.loops",
    "onnx": "gblm.export.onnx.decoder",
    "llama.cpp": "gblm.bench.loops",
}
MARK = b"GBLM-LOOP "
BATCHED = "vllm-offline"


class LoopSide(Side):
    """A side that runs in transformers, ONNX Runtime, llama.cpp, or vLLM without its server."""

    def check(self) -> None:
        """Refuse loads of several requests at once."""
        if self.engine != BATCHED and any(load.concurrency > 1 for load in self.setup.loads):
            raise UsageError(
                f"side {self.name!r}: {self.engine} runs one request at a time here; give "
                f"--concurrency 1, or run the model in {BATCHED} or vllm."
            )

    def start(self) -> None:
        """Start the process and wait until it has loaded the model."""
        log, setup = self.setup.log, self.setup
        self._log_start = size_of(log)
        settings = {
            "context": max(load.prompt_len + load.output_len for load in setup.loads) + 8,
            "sequences": max(load.concurrency for load in setup.loads),
            "engine": self.engine, "threads": setup.threads, "backend": self.backend,
            "options": setup.options,
        }  # fmt: skip
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", LOOPS[self.engine], str(self.path),
                 json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream,
                start_new_session=True, env=child_environment(setup.options),
            )  # fmt: skip
        try:
            self._load_seconds = float(self._answer()["load_s"])
        except BaseException:
            self.stop()
            raise

    def load(self, load: Load) -> Seen:
        """Have the process run a warm-up request and the load."""
        if self._process.stdin is None:
            raise RuntimeError("the loop has no standard input")
        try:
            self._process.stdin.write(json.dumps(asdict(load)).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        said = self._answer()
        requests = [Request(**{**row, "itls": tuple(row["itls"])}) for row in said["requests"]]
        seconds = max((request.start + request.latency for request in requests), default=0.0)
        return Seen(
            requests,
            seconds,
            prompts=said["prompts"],
            extra={
                "cpu_ms_per_token": 1e3 * said["cpu_s"] / (load.num_prompts * load.output_len),
                "load_s": self._load_seconds,
                "memory_mb": memory_mb(self._process.pid),
            },
        )

    def stop(self) -> None:
        """End the process."""
        stop(self._process)

    @property
    def process(self) -> psutil.Process:
        """Find the process that runs the loop."""
        return psutil.Process(self._process.pid)

    def facts(self) -> dict[str, Any]:
        """Add the threads that were asked for."""
        return super().facts() | {"threads": self.setup.threads}

    def _answer(self) -> dict[str, Any]:
        """Wait for the next answer of the process; engines print other lines, too."""
        if self._process.stdout is None:
            raise RuntimeError("the loop has no standard output")
        for line in self._process.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found
        raise self._ended()

    def _ended(self) -> MachineError:
        code, last = self._process.wait(), last_error(self.setup.log, self._log_start)
        return MachineError(f"{self.name}: {self.engine} ended with code {code}: {last}")


class Engine(ABC):
    """An engine is what runs inside the process."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Count the tokens that the model knows."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], output_len: int, concurrency: int
    ) -> list[Request]:
        """Decode every prompt to the full length; the end-of-text token is one like others."""


def request_of(began: float, prompt_len: int, times: list[float], clock: float) -> Request:
    """Make a request of the times of its tokens, in seconds of the clock that its load began at."""
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    return Request(began - clock, times[-1] - began, prompt_len, len(times), times[0] - began, gaps)


class Decoder(Engine):
    """An engine that runs one request after the other, token by token, with a cache."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all tokens."""

    @abstractmethod
    def run(self, tokens: Sequence[int]) -> int:
        """Append tokens; gives the most likely next one."""

    def generate(
        self, prompts: Sequence[Sequence[int]], output_len: int, concurrency: int
    ) -> list[Request]:
        """Run one prompt after the other, greedily."""
        clock = time.perf_counter()
        return [self._one(prompt, output_len, clock) for prompt in prompts]

    def _one(self, prompt: Sequence[int], output_len: int, clock: float) -> Request:
        self.reset()
        began = time.perf_counter()
        token = self.run(prompt)
        times = [time.perf_counter()]
        for _ in range(output_len - 1):
            token = self.run([token])
            times.append(time.perf_counter())
        return request_of(began, len(prompt), times, clock)


def serve(open_engine: Callable[[Path, dict[str, Any]], Engine]) -> None:
    """Run the main program of a loop: load the model, then answer each line of standard input.

    Args:
        open_engine: takes the model's path and the settings of `LoopSide.start`: "context" are the
            tokens of the longest request, "sequences" the requests at once.
    """
    path, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Engines print on standard output; only our lines may reach the pipe that is read.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    began = time.perf_counter()
    engine = open_engine(path, settings)
    engine.generate([[0]], 2, 1)
    _say(pipe, {"load_s": time.perf_counter() - began})
    for line in sys.stdin:
        load = Load(**json.loads(line))
        tokens = prompts(engine.vocabulary, load)
        rows, width = tokens.tolist(), load.concurrency
        engine.generate(rows[:width], load.output_len, width)
        cpu = time.process_time()
        requests = engine.generate(rows, load.output_len, width)
        _say(pipe, {
            "requests": [asdict(request) for request in requests],
            "cpu_s": time.process_time() - cpu,
            "prompts": f"loop:{hashlib.sha256(tokens.tobytes()).hexdigest()}",
        })  # fmt: skip


def prompts(vocabulary: int, load: Load) -> NDArray[np.int64]:
    """Draw random tokens [num_prompts, prompt_len] int64, for all sides the same."""
    shape = (load.num_prompts, load.prompt_len)
    return np.random.default_rng(0).integers(vocabulary, size=shape, dtype=np.int64)


def _say(pipe: Any, answer: dict[str, Any]) -> None:
    pipe.write(MARK + json.dumps(answer).encode() + b"\n")
    pipe.flush()
