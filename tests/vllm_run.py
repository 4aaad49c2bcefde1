"""vLLM in a process of its own: greedy tokens and log-probs of a model folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

PROMPTS = 8
SCRIPT = Path(__file__).parent / "serve" / "generate.py"


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
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1" if (os.cpu_count() or 1) > 1 else "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    asked = [
        {"folder": str(folder), "backend": backend, "settings": settings}
        for folder, backend, settings in jobs
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(asked)],
        capture_output=True, text=True, env=env, timeout=300 + 100 * len(jobs), check=False,
    )  # fmt: skip
    rows: list[list[dict]] = [[] for _ in jobs]
    for line in done.stdout.splitlines():
        if line.startswith("TOKENS "):
            row = json.loads(line[7:])
            rows[row.pop("job")].append(row)
    return rows, done.stdout + done.stderr


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
