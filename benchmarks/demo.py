"""The whole road on a real model: fetch, prune, inspect, evaluate, serve, compare.

Run by `make demo`; every step is a `gblm` command that is printed before it runs.
Ends in a table and in runs/demo/summary.json.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gblm.record import Record

RUN = Path("runs/demo")
MODEL, PACKED = RUN / "smollm2", RUN / "smollm2-gblm-2of4"
EVAL, BENCH, SUMMARY = RUN / "eval.json", RUN / "bench.json", RUN / "summary.json"
# Small on purpose: the defaults of `gblm prune` would take hours on two cores.
CALIBRATION = "--calibration pydoc --num-samples 16 --seq-len 256 --seed 0 --dtype float32"
WINDOWS = "--text pydoc --seq-len 512 --max-windows 16 --dtype bfloat16"
LOAD = "--num-prompts 3 --prompt-len 32 --output-len 16 --rounds 2"
VLLM = "--enforce-eager --max-model-len 1024"
METRICS = {
    "decode_tok_s": "decode (tok/s per stream)", "ttft_ms_p50": "TTFT (ms)",
    "tpot_ms_p50": "TPOT (ms)", "output_tok_s": "throughput (tok/s)",
    "memory_mb": "server memory (MB)",
}  # fmt: skip


def main() -> None:
    """Run every step, then print and write the summary."""
    began = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    # A small cache, so that the servers' memory shows their weights.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    gblm(f"fetch smollm2 --output {MODEL}")
    gblm(f"prune {MODEL} --method gblm --pattern 2:4 {CALIBRATION} --output {PACKED}")
    gblm(f"inspect {PACKED} --verify")
    gblm(f"eval {PACKED} --baseline {MODEL} {WINDOWS} --backend dense --output {EVAL}")
    gblm(f"bench {MODEL.name}={MODEL} {PACKED.name}={PACKED} {LOAD} --output {BENCH} "
         f"--log {RUN}/servers.log -- {VLLM}")  # fmt: skip
    summary = summarise()
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n")
    print_table(summary)
    print(f"{time.monotonic() - began:.0f} s; record: {SUMMARY}")


def gblm(arguments: str) -> None:
    """Print and run one command; stop the demo when it fails."""
    print(f"\n$ gblm {arguments}", flush=True)
    done = subprocess.run([sys.executable, "-m", "gblm", *shlex.split(arguments)], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def summarise() -> dict[str, Any]:
    """Read the figures of the run from the records that the commands wrote."""
    recipe = json.loads((PACKED / "recipe.json").read_text())
    report = json.loads((PACKED / "sparsity_report.json").read_text())
    quality, bench = Record.read(EVAL), Record.read(BENCH)
    pruned, dense = (row for row in quality.rows if row.metric == "perplexity")
    return {
        "model": "SmolLM2-135M-Instruct",
        "method": recipe["method"],
        "pattern": recipe["pattern"],
        "sparsity": report["sparsity"],
        "ppl_dense": dense.value,
        "ppl_pruned": pruned.value,
        "ppl_protocol": pruned.load,
        "bytes_dense": report["bytes_dense"],
        "bytes_packed": report["bytes_packed"],
        **{
            f"{metric}_{name}": bench.value(side, bench.loads[0], metric)
            for metric in METRICS
            for name, side in (("dense", MODEL.name), ("packed", PACKED.name))
        },
        "provenance": dict(bench.provenance),
    }


def print_table(summary: dict[str, Any]) -> None:
    """Print dense and packed side by side."""
    rows = [
        ("weights on disk (MB)", summary["bytes_dense"] / 1e6, summary["bytes_packed"] / 1e6),
        ("perplexity", summary["ppl_dense"], summary["ppl_pruned"]),
        *((label, summary[f"{key}_dense"], summary[f"{key}_packed"])
          for key, label in METRICS.items()),
    ]  # fmt: skip
    title = f"{summary['model']}, {summary['method']} {summary['pattern']}"
    print(f"\n{title:44}{'dense':>10}{'packed':>10}{'ratio':>8}")
    for label, dense, packed in rows:
        if dense is None or packed is None:  # no figure that stands
            print(f"{label:44}{'–':>10}{'–':>10}{'–':>8}")
        else:
            print(f"{label:44}{dense:>10.1f}{packed:>10.1f}{packed / dense:>8.2f}")
    print(f"perplexity: {summary['ppl_protocol']}")


if __name__ == "__main__":
    main()
