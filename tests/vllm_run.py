"""vLLM in a process of its own: greedy tokens and log-probs of a model folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

PROMPTS = 8
SCRIPT = Path(__file__).parent / "serve" / "generate.py"
ENGINES = SCRIPT.with_name("engines.py")
Answer = dict[str, Any]


def generate(
    folder: Path, backend: str | None = None, **settings: object
) -> tuple[list[dict], str]:
    """Per prompt the greedy tokens and the likeliest ones' log-probs; and what vLLM printed."""
    rows, log = generate_each([(folder, backend, settings)])
    return rows[0], log


def generate_each(
    jobs: Sequence[tuple[Path, str | None, dict[str, object]]],
) -> tuple[list[list[dict]], str]:
    """As `generate`, for several folders in one process; after a refusal the others get no rows.

    Args:
        jobs: folder, backend and settings of `LLM`.
    """
    asked = [
        {"folder": str(folder), "backend": backend, "settings": settings}
        for folder, backend, settings in jobs
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(asked)],
        capture_output=True, text=True, env=environment(), timeout=300 + 100 * len(jobs),
        check=False,
    )  # fmt: skip
    rows: list[list[dict]] = [[] for _ in jobs]
    for line in done.stdout.splitlines():
        if line.startswith("TOKENS "):
            row = json.loads(line[7:])
            rows[row.pop("job")].append(row)
    return rows, done.stdout + done.stderr


def environment(**variables: str) -> dict[str, str]:
    """For an engine without a process of its own."""
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1" if (os.cpu_count() or 1) > 1 else "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    env.pop("GBLM_BACKEND", None)
    return env | variables


def answers(
    engines: list[dict[str, Any]], ranks: int = 1, timeout: float = 500, **variables: str
) -> tuple[list[Answer], str]:
    """What each of some engines answers, see engines.py; and what the first rank's vLLM printed.

    Ranks are processes that start the same engines, as under torchrun: vLLM's own executors import
    it in new processes for every engine, which takes longer than all the rest.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(ranks) as pool:
        # The name of the files where ranks meet becomes that of their shared memory.
        group = {"WORLD_SIZE": str(ranks), "MEETING": f"{folder}/{Path(folder).name}"}
        if ranks > 1:
            group |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

        def run(rank: int) -> str:
            path = Path(folder) / f"log-{rank}"
            env = environment(**group, RANK=str(rank), **variables)
            del env["VLLM_CPU_KVCACHE_SPACE"]  # it would win over the engines' own settings
            with path.open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, str(ENGINES), json.dumps(engines)],
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=env,
                )  # fmt: skip
                try:
                    process.wait(timeout)
                except subprocess.TimeoutExpired:
                    log.write(f"no answer within {timeout} s")
                finally:
                    # Workers of a core that is killed wait for it.
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            return path.read_text()

        log = next(pool.map(run, range(ranks)))
    return [json.loads(x[7:]) for x in log.splitlines() if x.startswith("ANSWER ")], log


def farthest(got: Answer, want: Answer) -> float:
    """Largest `drift` of all rounds of two answers."""
    rounds = want.keys() - {"counters"}
    assert got.keys() == want.keys()
    return max(drift(got[name], want[name]) for name in rounds)


def is_same(got: Answer, want: Answer) -> bool:
    """Whether all tokens and log-probs of two answers are equal."""
    return all(got[name] == want[name] for name in want if name != "counters")


def drift(got: list[dict], want: list[dict]) -> float:
    """Largest difference in the log-prob of a token of `want`; up to where `got` takes another one.

    There it is counted, too; after it the texts are different ones.
    """
    assert len(got) == len(want) == PROMPTS
    found = 0.0
    for one, other in zip(got, want, strict=True):
        for step, token in enumerate(other["tokens"]):
            here, there = (row["steps"][step].get(str(token)) for row in (one, other))
            assert here is not None, f"token {step} is none of the likeliest"
            found = max(found, abs(here - there))
            if one["tokens"][step] != token:
                break
    return found


def skip_without(backend: str) -> None:
    """The kernels of `cpu` are compiled, and need AVX."""
    from gblm.kernels import native

    if backend == "cpu" and (why := native.refusal()):
        pytest.skip(why)
