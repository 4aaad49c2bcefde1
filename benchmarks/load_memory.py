"""Memory while vLLM's CPU worker loads a model: what it holds at most, and what it keeps.

    python benchmarks/load_memory.py [--rounds 3] [--folder DIR]

A random LLaMA of 1.1B parameters, pruned by magnitude to 2:4 and stored in two ways: dense with
zeros, and packed by gblm. Each is loaded by vLLM's own loader in a process of its own; anonymous
memory is read from /proc every millisecond from outside, for pages of the mapped files come and go.
Writes benchmarks/results/load-memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import shape_folder
from pages import made_by

from gblm.checkpoint.inspect import inspect
from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder
from gblm.provenance import provenance
from gblm.prune import prune
from gblm.recipe import Recipe

RECORD = Path(__file__).resolve().parent / "results" / "load-memory.json"
SHAPE, LARGEST = "tinyllama", 2048 * 2 * 5632  # weights of gate and up, which vLLM joins
WAYS = ("dense", "packed")  # folders, and names of rows
POLL_SECONDS = 1e-3


def folders(root: Path) -> None:
    """The model in its ways, made once."""
    if (root / "dense").exists():
        return
    recipe = Recipe(
        model=str(shape_folder(root, SHAPE)), method="magnitude", pattern="2:4", calibration=None
    )
    prune(recipe, root / "packed")
    export_dense(ModelFolder.open(root / "packed"), root / "dense")


def load(folder: str) -> None:
    """In the child: everything but the weights, then the weights; a line before and after."""
    import torch
    import vllm.v1.worker.cpu.shm  # noqa: F401 (its worker has no accelerator to empty)
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = EngineArgs(
        model=folder, enforce_eager=True, max_model_len=256, dtype="bfloat16"
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as store:
        init_distributed_environment(1, 0, f"file://{store.name}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        torch.ones(1024, 1024).matmul(torch.ones(1024, 1024))  # threads and their memory
        print("begin", flush=True)
        model = get_model(vllm_config=config)
        print("end", flush=True)
        sys.stdin.readline()
        del model


def measure(folder: Path) -> dict[str, float]:
    """Anonymous bytes above what the process held when loading began: at most, and at the end."""
    command = [sys.executable, __file__, "--load", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        _wait_for(child, "begin")
        os.set_blocking(child.stdout.fileno(), False)
        before, began = _anonymous(child.pid), time.perf_counter()
        most = last = before
        while "end" not in (child.stdout.readline() or ""):
            if child.poll() is not None:
                raise SystemExit(f"{folder}: the loader ended with {child.returncode}.")
            last = _anonymous(child.pid)
            most = max(most, last)
            time.sleep(POLL_SECONDS)
        seconds, last = time.perf_counter() - began, _anonymous(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
    return {"peak_bytes": most - before, "kept_bytes": last - before, "seconds": seconds}


def _wait_for(child: subprocess.Popen[str], word: str) -> None:
    for line in child.stdout:
        if line.strip() == word:
            return
    raise SystemExit(f"the loader ended with {child.wait()} before it began.")


def _anonymous(process: int) -> int:
    """RssAnon of a process, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("the kernel does not tell RssAnon.")


def main() -> None:
    """Measure all ways in interleaved rounds; write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-load")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.load:
        load(chosen.load)
        return
    chosen.folder.mkdir(parents=True, exist_ok=True)
    folders(chosen.folder)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(chosen.rounds):
        for name in WAYS:
            runs[name].append(measure(chosen.folder / name))
            print(name, runs[name][-1], flush=True)
    rows = [_row(name, runs[name]) for name in runs]
    record: dict[str, Any] = {
        "kind": "load memory", "command": made_by(),
        "provenance": provenance(), "shape": SHAPE, "pattern": "2:4",
        "dense_bytes": inspect(ModelFolder.open(chosen.folder / "dense"))["bytes"],
        "packed_bytes": inspect(ModelFolder.open(chosen.folder / "packed"))["bytes"],
        "largest_linear_bytes": 2 * LARGEST,
        "rows": rows,
    }  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


def _row(name: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "name": name,
        **{key: statistics.median(run[key] for run in runs) for key in runs[0]},
        "runs": runs,
    }


if __name__ == "__main__":
    main()
