"""Where the time of a decoded token goes in vLLM, part by part.

    python benchmarks/token_parts.py [--rounds 9] [--modes compiled eager] [--only NAME …]

The 1.1B shape of decoding.py, one thread, one sequence, prompt and answer as long as there. Once an
engine is warm, functions of vLLM and our operator are wrapped in a clock that counts the CPU time
of the engine's thread for the innermost of them: the parts add up to the token, some 0.2 ms of
which are the clock. Every engine is a process of its own, and each round runs all of them. Writes
benchmarks/results/token-parts.json.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from decoding import RESULTS, WORK, Engine, make_folders
from memory import SHAPES, VOCAB
from pages import made_by

from gblm.provenance import provenance

RECORD = RESULTS / "token-parts.json"
SHAPE = "tinyllama"
MODES = ("compiled", "eager")
VALUES, CASES = "int4", ("dense int4", "int4 8:16", "int4 50 %")
LINEARS, HEAD, CALLS = "linears", "output head", "calls"
# Module, function, and the part that its time is, less that of what it calls among these.
WRAPPED = (
    ("vllm.entrypoints.llm", "LLM.generate", "requests"),
    ("vllm.v1.engine.llm_engine", "LLMEngine.step", "outputs"),
    ("vllm.v1.core.sched.scheduler", "Scheduler.schedule", "scheduler"),
    ("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output", "scheduler"),
    ("vllm.v1.worker.gpu_worker", "Worker.execute_model", "inputs"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._model_forward", "layers"),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl.forward", "attention"),
    (
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl.do_kv_cache_update",
        "attention",
    ),
    ("vllm.model_executor.layers.logits_processor", "LogitsProcessor.forward", "logits"),
    ("vllm.v1.worker.gpu_worker", "Worker.sample_tokens", "sampler"),
    ("gblm.serve.vllm_plugin.linear", "SparseLinearMethod.apply", "plugin"),
)


class Clock:
    """CPU time of this thread in nanoseconds, by the innermost part that is running."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._running = ["none"]
        self._since = time.thread_time_ns()

    def wrap(self, function: Callable[..., Any], part: Callable[..., str]) -> Callable[..., Any]:
        """The function, whose time is that of the part which its arguments give."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._running.append(part(*args))
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._running.pop()

        return timed

    def _turn(self) -> None:
        now = time.thread_time_ns()
        self.spent[self._running[-1]] += now - self._since
        self._since = now


def wrap_all(clock: Clock) -> None:
    """Put the clock around vLLM's functions and the operator of packed linears."""
    import torch

    for module, path, part in WRAPPED:
        owner, _, name = path.partition(".")
        found = getattr(importlib.import_module(module), owner)
        setattr(found, name, clock.wrap(getattr(found, name), lambda *_, part=part: part))
    operator = torch.ops.gblm.cpu_linear
    operator.default = clock.wrap(
        operator.default, lambda _x, _panels, rows: HEAD if rows == VOCAB else LINEARS
    )


def milliseconds_of_calls() -> float:
    """What the calls of a token's linears take besides weights: each has 16 rows here."""
    import torch

    from gblm.bench.linears import sparse_weight
    from gblm.kernels import BACKENDS
    from gblm.sparse.formats import from_spec

    hidden, wide, layers, _, _ = SHAPES[SHAPE]
    fmt, total = from_spec("dense/dense/int4:128"), 0.0
    for columns, calls in ((hidden, 3 * layers + 1), (wide, layers)):
        weight = sparse_weight(fmt, torch.randn(16, columns).bfloat16())
        parts = fmt.pack("weight", weight)
        (panels,) = BACKENDS["cpu"].prepare(fmt, parts, (16, columns))
        x = torch.randn(1, columns).bfloat16()
        began = time.thread_time_ns()
        for _ in range(1000):
            torch.ops.gblm.cpu_linear.default(x, panels, 16)
        total += calls * (time.thread_time_ns() - began) / 1e9
    return total


def serve_work(folder: str, compiled: bool) -> None:
    """The engine's process: answer each line of standard input with a token's parts, in ms."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, max_model_len=1024, distributed_executor_backend="uni", dtype="bfloat16",
        enforce_eager=not compiled, enable_prefix_caching=False, max_num_seqs=8,
    )  # fmt: skip
    calls, clock = milliseconds_of_calls(), Clock()
    _, prompt, tokens = WORK["decode 1"]

    def spent(count: int) -> Counter[str]:
        options = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        clock.spent.clear()
        llm.generate([{"prompt_token_ids": list(range(prompt))}], options, use_tqdm=False)
        return Counter(clock.spent)

    spent(2)
    wrap_all(clock)
    for _ in sys.stdin:
        # One token costs the prompt; the others are decoding.
        first, both = spent(1), spent(1 + tokens)
        parts = {part: (both[part] - first[part]) / tokens / 1e6 for part in both if part != "none"}
        print("ANSWER " + json.dumps(parts | {CALLS: calls}), flush=True)


def measure(folders: dict[str, Path], modes: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds of each part by case and mode: the median, and all rounds."""
    with ExitStack() as stack:
        engines = {
            f"{name}, {mode}": stack.enter_context(
                Engine(
                    [sys.executable, __file__, "--engine", str(folder), "--modes", mode], 1
                ).running()
            )
            for mode in modes
            for name, folder in folders.items()
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for index in range(rounds + 1):
            for name, engine in engines.items():
                answer = engine.ask("parts")
                if index:  # the first round warms up
                    found[name].append(answer)
    return {
        name: {
            part: {"ms": statistics.median(r[part] for r in all_rounds),
                   "rounds": [r[part] for r in all_rounds]}
            for part in all_rounds[0]
        }
        for name, all_rounds in found.items()
    }  # fmt: skip


def main() -> None:
    """Make the folders, start the engines, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--only", nargs="+", default=list(CASES), help="names of cases")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-shapes")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.engine:
        serve_work(chosen.engine, chosen.modes == ["compiled"])
        return
    origin, load = provenance(), os.getloadavg()[0]
    made = make_folders(chosen.folder, SHAPE, VALUES)
    folders = {name: made[name] for name in chosen.only}
    cases = measure(folders, chosen.modes, chosen.rounds)
    record = {
        "kind": "token-parts", "command": made_by(), "provenance": origin, "shape": SHAPE,
        "threads": 1, "rounds": chosen.rounds, "load_average_at_start": load,
        "work": WORK["decode 1"], "cases": cases,
    }  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
