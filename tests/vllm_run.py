"""vLLM in a process of its own: greedy tokens and log-probs of a model folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROMPTS, STEPS = 8, 12
SCRIPT = Path(__file__).parent / "serve" / "generate.py"


def generate(
    folder: Path, backend: str | None = None, **settings: object
) -> tuple[list[dict], str]:
    """Greedy tokens and log-probs of eight prompts, and vLLM's output."""
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1" if (os.cpu_count() or 1) > 1 else "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    env.pop("GBLM_BACKEND", None)
    if backend:
        env["GBLM_BACKEND"] = backend
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(settings)],
        capture_output=True, text=True, env=env, timeout=400, check=False,
    )  # fmt: skip
    rows = [json.loads(x[7:]) for x in done.stdout.splitlines() if x.startswith("TOKENS ")]
    return rows, done.stdout + done.stderr


def drift(got: list[dict], want: list[dict]) -> float:
    """Largest difference of log-probs up to the first other token; it must not be the very first.

    After it the texts are different ones.
    """
    assert len(got) == len(want) == PROMPTS
    found = 0.0
    for one, other in zip(got, want, strict=True):
        assert one["tokens"][0] == other["tokens"][0]
        for step in range(STEPS):
            if one["tokens"][step] != other["tokens"][step]:
                break
            found = max(found, abs(one["logprobs"][step] - other["logprobs"][step]))
    return found


def skip_without(backend: str) -> None:
    """The kernels of `cpu` are compiled, and need AVX."""
    from gblm.kernels import native

    if backend == "cpu" and (why := native.refusal()):
        pytest.skip(why)
