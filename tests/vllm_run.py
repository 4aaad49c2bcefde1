"""vLLM in a process of its own: greedy tokens and log-probs of model folders."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PROMPTS = 8
SCRIPT = Path(__file__).parent / "serve" / "engines.py"
# What may be asked, in any order: the prompts, the same again, after a sleep, without the adapter;
# and for the log-probs of the prompts themselves.
ASKS = ("first", "again", "awake", "without", "prompts")
Engine = dict[str, Any]


class Answer(NamedTuple):
    """What one engine answers each time that it is asked; nothing where vLLM refuses the folder.

    The log is what vLLM printed on the way: that of the first rank, where there are several.
    """

    rows: dict[str, list[dict[str, Any]]]
    counters: dict[str, float]
    log: str


# Gives the engines that it needs, is sent what they answer, and checks it.
Question = Generator[list[Engine], list[Answer], None]


def ask(*questions: Question, ranks: int = 1) -> None:
    """Start the engines of all questions in one process, for most of a start are vLLM's imports."""
    wanted = [next(question) for question in questions]
    found = iter(answers([engine for engines in wanted for engine in engines], ranks))
    for question, engines in zip(questions, wanted, strict=True):
        with contextlib.suppress(StopIteration):
            question.send([next(found) for _ in engines])


def engine(
    folder: Path, backend: str | None = None, asks: Sequence[str] = ("first",), **settings: object
) -> Engine:
    """One engine for `answers`; by default it is asked once, and nothing is compiled.

    Blocks of the cache are so small that prompts share one, and few, for vLLM fills them. In
    production vLLM is told to keep account of what it loads (gblm.serve.launch); so it is here.
    """
    own = {
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "block_size": 32,
        "kv_cache_memory_bytes": 1 << 27,
        "model_loader_extra_config": {"enable_weights_track": True},
    }
    return {"folder": str(folder), "backend": backend, "asks": asks, "settings": own | settings}


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """For an engine without a process of its own."""
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1" if (os.cpu_count() or 1) > 1 else "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    env.pop("GBLM_BACKEND", None)
    return env | dict(variables)


def answers(engines: Sequence[Engine], ranks: int = 1, timeout: float = 500) -> list[Answer]:
    """What each of some engines answers; all start in one process, one after another.

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
            with path.open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, str(SCRIPT), json.dumps(engines)],
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    env=environment(group | {"RANK": str(rank)}),
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
    logs = re.split(r"^ENGINE \d+$", log, flags=re.MULTILINE)[1:]
    assert len(logs) == len(engines), log
    return list(map(answer_of, logs))


def answer_of(log: str) -> Answer:
    """Read the log of one engine."""
    lines = [line for line in log.splitlines() if line.startswith("ANSWER ")]
    found = json.loads(lines[0][7:]) if lines else {"rows": {}, "counters": {}}
    return Answer(found["rows"], found["counters"], log)


def farthest(got: Answer, want: Answer) -> float:
    """Largest `drift` of all that two engines were asked."""
    assert want.rows, want.log
    assert got.rows.keys() == want.rows.keys(), got.log
    return max(drift(got.rows[ask], want.rows[ask]) for ask in want.rows)


def is_same(got: Answer, want: Answer) -> bool:
    """Whether all tokens and log-probs of two answers are equal."""
    assert want.rows, want.log
    assert got.rows, got.log
    return got.rows == want.rows


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
        pytest.skip(f"{why}; `make test` runs this where they are")
