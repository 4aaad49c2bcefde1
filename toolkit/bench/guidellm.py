"""GuideLLM as load generator: its requests become the same list as those of `vllm bench serve`.

It is run as a program, found on the PATH or named by GBLM_GUIDELLM, so that it may live in an
environment of its own. Tested with 0.8.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from gblm.bench.requests import Request
from gblm.bench.server import child_environment, last_words, run_child
from gblm.bench.validity import Asked, Seen
from gblm.errors import MachineError

PROGRAM, VARIABLE = "guidellm", "GBLM_GUIDELLM"
SECONDS = 3600


def program() -> str:
    """Where GuideLLM is.

    Raises:
        MachineError: nowhere.
    """
    wanted = os.environ.get(VARIABLE) or PROGRAM
    found = shutil.which(wanted)
    if found is None:
        raise MachineError(
            f"{wanted} is not there: pip install guidellm, or give {VARIABLE} the path of the "
            "program in an environment of its own."
        )
    return found


def load(url: str, model: Path, asked: Asked, seed: int, file: Path) -> Seen:
    """Put one load on a server that calls its model "model".

    Args:
        url: of the server.
        model: folder with the tokenizer.
        asked: the load; with a rate, requests come as a Poisson process.
        seed: of the synthetic prompts.
        file: for GuideLLM's report; it is removed.

    Returns:
        The requests after the warm-up, one for each stream, in the order of the prompts.

    Raises:
        MachineError: GuideLLM is missing, failed or took longer than an hour.
    """
    command = [program(), "run", *options(url, model, asked, seed, file)]
    environment = child_environment() | {"HF_HUB_OFFLINE": "1"}
    done = run_child(command, PROGRAM, SECONDS, environment)
    if done.returncode or not file.exists():
        raise MachineError(f"guidellm ended with code {done.returncode}: {last_words(done)}")
    report = json.loads(file.read_text())
    file.unlink()
    return seen_of(report, warm_up(asked))


def warm_up(asked: Asked) -> int:
    """Requests at the start that do not count."""
    return asked.concurrency or 1


def options(url: str, model: Path, asked: Asked, seed: int, file: Path) -> list[str]:
    """The words of `guidellm run`."""
    return [
        "--backend",
        json.dumps({"kind": "openai_http", "target": url, "model": "model",
                    "request_format": "/v1/completions"}),
        "--profile", json.dumps(profile(asked)),
        "--constraint", f"kind=max_requests,count={asked.num_prompts + warm_up(asked)}",
        "--tokenizer", json.dumps({"kind": "hf_auto", "model": str(model)}),
        "--data", f"kind=synthetic_text,prompt_tokens={asked.input_len},"
                  f"output_tokens={asked.output_len}",
        "--seed", f"kind=static,value={seed}",
        "--output", json.dumps({"kind": "json", "path": str(file)}),
        "--disable-console",
    ]  # fmt: skip


def profile(asked: Asked) -> dict[str, Any]:
    """How requests are sent."""
    if asked.request_rate is not None:
        limit = {} if asked.concurrency is None else {"max_concurrency": asked.concurrency}
        return {"kind": "poisson", "rate": asked.request_rate, **limit}
    if asked.concurrency is None:
        return {"kind": "throughput"}
    return {"kind": "concurrent", "streams": asked.concurrency}


def seen_of(report: dict[str, Any], skip: int) -> Seen:
    """The requests of a report but for the first `skip`; failed ones are counted."""
    found = report["benchmarks"][0]["requests"]
    every = sorted((row for rows in (found["successful"], found["errored"]) for row in rows),
                   key=lambda row: row["request_start_time"])[skip:]  # fmt: skip
    good = sorted((row for row in every if row["info"]["status"] == "completed"), key=_prompt)
    requests = [_request(row, every[0]["request_start_time"]) for row in good]
    seconds = max((r.start + r.latency for r in requests), default=0.0)
    digest = hashlib.sha256("\0".join(map(_prompt, good)).encode()).hexdigest()
    return Seen(requests, seconds, failed=len(every) - len(good), prompts=f"guidellm:{digest}")


def _prompt(row: dict[str, Any]) -> str:
    return str(json.loads(row["request_args"])["body"]["prompt"])


def _request(row: dict[str, Any], began: float) -> Request:
    """Single gaps between tokens are not in the report."""
    first = row["info"]["timings"]["first_token_iteration"]
    return Request(
        start=row["request_start_time"] - began,
        latency=row["request_latency"],
        input_len=int(row["input_metrics"]["text_tokens"]),
        output_len=int(row["output_metrics"]["text_tokens"]),
        ttft=None if first is None else first - row["request_start_time"],
    )
