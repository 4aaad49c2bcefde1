"""A/B benchmark of two servers: interleaved rounds of `vllm bench serve`, paired ratios, a record.

The load comes from vLLM's own generator. Here: who runs when, the statistics, the evidence.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gblm.bench.server import (
    RunningServer,
    child_environment,
    last_words,
    run_child,
    running_server,
)
from gblm.checkpoint.inspect import inspect
from gblm.errors import MachineError
from gblm.folder import resolve
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance

# Metric → key of vLLM's result.
METRICS = {
    "ttft_ms": "median_ttft_ms",
    "tpot_ms": "median_tpot_ms",
    "itl_p99_ms": "p99_itl_ms",
    "throughput_tok_s": "output_throughput",
}
LOAD_SECONDS = 3600
RESULT = "result.json"


@dataclass(frozen=True)
class Load:
    """What every round asks of a server.

    Attributes:
        num_prompts: requests per round.
        input_len: random prompt tokens per request.
        output_len: tokens generated per request; the end-of-text token is ignored.
        concurrency: requests in flight.
        rounds: rounds per model; each starts both servers anew, in alternating order.
        seed: of the prompts; both models get the same ones.
        range_ratio: how far each request's lengths may lie from those above, as a part of them.
        options: for both vLLM servers.
    """

    num_prompts: int = 8
    input_len: int = 64
    output_len: int = 32
    concurrency: int = 1
    rounds: int = 3
    seed: int = 0
    range_ratio: float = 0.0
    options: tuple[str, ...] = ()


def bench_serving(
    model: str | Path,
    baseline: str | Path,
    load: Load,
    backend: str | None = None,
    progress: Progress = no_progress,
    log: Path | None = None,
) -> dict[str, Any]:
    """Serve and load two models in turn.

    Args:
        model: a packed folder.
        baseline: the dense folder to compare with.
        load: the requests.
        backend: for packed weights; the best one if None.
        progress: for a progress bar.
        log: file for the servers' output; if None, a temporary one that is kept on failure.

    Returns:
        The record: settings, every run, medians and paired ratios model/baseline, provenance.

    Raises:
        MachineError: a server or the load generator failed, or requests failed.
    """
    folders = {"model": resolve(model), "baseline": resolve(baseline)}
    runs: list[dict[str, Any]] = []
    backends: set[str] = set()
    step = progress("server runs", 2 * load.rounds)
    with tempfile.TemporaryDirectory() as work:
        output = log or Path(tempfile.mkstemp(prefix="gblm-servers-", suffix=".log")[1])
        output.parent.mkdir(parents=True, exist_ok=True)
        for number in range(load.rounds):
            # The order alternates, so that drift of the machine hits both sides alike.
            order = ("baseline", "model") if number % 2 == 0 else ("model", "baseline")
            for side in order:
                chosen = backend if side == "model" else None
                with running_server(folders[side], chosen, load.options, output) as server:
                    measured = _measure(server, folders[side], load, Path(work))
                backends |= server.backends()
                runs.append({"round": number, "side": side, **measured})
                step()
    if log is None:
        output.unlink()
    used = "; ".join(sorted(backends)) or "unknown"
    sizes = {side: inspect(folder)["bytes"] for side, folder in folders.items()}
    return {
        "kind": "bench serving",
        "provenance": provenance(),
        "model": Path(model).name,
        "baseline": Path(baseline).name,
        "backend": backend or "auto",
        "backend_used": used,
        "load": asdict(load),
        "bytes": sizes,
        "summary": summarise(runs, sizes),
        "runs": runs,
    }


def summarise(runs: list[dict[str, Any]], sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Medians per side, and the ratio model/baseline paired by round: median, minimum, maximum.

    Args:
        runs: as in the record.
        sizes: bytes of the weights by side.
    """
    table: dict[str, dict[str, Any]] = {}
    for metric in (*METRICS, "decode_tok_s", "memory_mb", "ready_s"):
        values = {
            side: [
                run[metric] for run in sorted(runs, key=lambda r: r["round"]) if run["side"] == side
            ]
            for side in ("model", "baseline")
        }
        pairs = zip(values["model"], values["baseline"], strict=True)
        ratios = [a / b for a, b in pairs if b]
        table[metric] = {
            "model": statistics.median(values["model"]),
            "baseline": statistics.median(values["baseline"]),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    ratio = sizes["model"] / sizes["baseline"]
    table["weights_mb"] = {
        "model": sizes["model"] / 1e6, "baseline": sizes["baseline"] / 1e6,
        "ratio": ratio, "ratio_min": ratio, "ratio_max": ratio,
    }  # fmt: skip
    return table


def _measure(server: RunningServer, folder: Path, load: Load, work: Path) -> dict[str, Any]:
    """One round of load against one server, after a warm-up request of the same shape."""
    result = vllm_bench(server.url, folder, load, work)
    if result.get("completed") != load.num_prompts:
        raise MachineError(
            f"{result.get('completed')} of {load.num_prompts} requests succeeded; no figure stands."
        )
    measured = {metric: float(result[key]) for metric, key in METRICS.items()}
    return {
        **measured,
        # Tokens per second of one stream after its first token.
        "decode_tok_s": 1000.0 / measured["tpot_ms"],
        "memory_mb": server.memory_bytes() / 1e6,
        "ready_s": server.ready_seconds,
    }


def vllm_bench(url: str, folder: Path, load: Load, work: Path) -> dict[str, Any]:
    """One run of `vllm bench serve`.

    Args:
        url: of a server that calls its model "model".
        folder: the model, for its tokenizer.
        load: the requests; its rounds and options are not looked at.
        work: a folder of no other run, for the result.

    Returns:
        What vLLM writes.

    Raises:
        MachineError: the load generator failed.
    """
    words = ["serve", *bench_options(url, folder, load, work)]
    return run_vllm_bench(words, work / RESULT)


def run_vllm_bench(words: list[str], file: Path) -> dict[str, Any]:
    """Run `vllm bench` in a process of its own.

    Args:
        words: the tool (serve, latency, throughput) and its options.
        file: where they say that the result shall be; it is removed.

    Returns:
        What vLLM writes.

    Raises:
        MachineError: it failed, or wrote nothing.
    """
    tool, environment = words[0], child_environment()
    # vLLM divides by the seconds of its progress bar, which are 0 where bars are switched off.
    environment.pop("TQDM_DISABLE", None)
    what = f"vllm bench {tool}"
    command = [sys.executable, "-m", "gblm.serve.vllm_cli", "bench", *words]
    done = run_child(command, what, LOAD_SECONDS, environment)
    if done.returncode or not file.exists():
        raise MachineError(f"{what} ended with code {done.returncode}: {last_words(done)}")
    result: dict[str, Any] = json.loads(file.read_text())
    file.unlink()
    return result


def bench_options(url: str, folder: Path, load: Load, work: Path) -> list[str]:
    """The options of `vllm bench serve`; arguments as `vllm_bench` takes them."""
    return [
        "--base-url", url, "--model", str(folder), "--tokenizer", str(folder),
        "--served-model-name", "model", "--dataset-name", "random",
        "--random-input-len", str(load.input_len), "--random-output-len", str(load.output_len),
        "--num-prompts", str(load.num_prompts), "--max-concurrency", str(load.concurrency),
        "--num-warmups", "1", "--ignore-eos", "--seed", str(load.seed), "--disable-tqdm",
        "--random-range-ratio", str(load.range_ratio),
        "--save-result", "--result-dir", str(work), "--result-filename", RESULT,
        "--percentile-metrics", "ttft,tpot,itl,e2el",
    ]  # fmt: skip
