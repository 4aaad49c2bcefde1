"""The whole road on a real model: fetch, prune, recover, inspect, evaluate, serve, compare.

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
MODEL, DENSE = RUN / "smollm2", RUN / "smollm2-int8"
PRUNED, PACKED = RUN / "smollm2-8of16-pruned", RUN / "smollm2-8of16"
EVAL, BENCH, SUMMARY = RUN / "eval.json", RUN / "bench.json", RUN / "summary.json"
SIDES = {"dense bf16": MODEL, "dense int8": DENSE, "int8 8:16": PACKED}
# Windows, steps and rounds are few: the whole takes ten minutes on two cores.
WINDOWS = "--text pydoc --seq-len 512 --max-windows 16 --dtype bfloat16"
LOAD = "--num-prompts 3 --prompt-len 32 --output-len 16 --rounds 3"
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
    gblm(f"export pack {MODEL} --pattern dense --values int8 --output {DENSE}")
    gblm(f"prune {MODEL} --preset fast --pattern 8:16 --values int8 --output {PRUNED}")
    gblm(f"recover {PRUNED} --text pydoc --tokens 32768 --output {PACKED}")
    gblm(f"inspect {PACKED} --verify")
    gblm(f"eval {PACKED} --baseline {MODEL} {WINDOWS} --backend dense --output {EVAL}")
    sides = " ".join(f"{folder.name}={folder}" for folder in SIDES.values())
    # On a machine too noisy to measure on, bench ends with 5: the table shows no speed then.
    gblm(f"bench {sides} {LOAD} --output {BENCH} --log {RUN}/servers.log -- {VLLM}", (0, 5))
    summary = summarise()
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n")
    print_table(summary)
    print(f"{time.monotonic() - began:.0f} s; record: {SUMMARY}")


def gblm(arguments: str, allowed: tuple[int, ...] = (0,)) -> None:
    """Print and run one command; stop the demo when it fails."""
    print(f"\n$ gblm {arguments}", flush=True)
    done = subprocess.run([sys.executable, "-m", "gblm", *shlex.split(arguments)], check=False)
    if done.returncode not in allowed:
        sys.exit(done.returncode)


def summarise() -> dict[str, Any]:
    """Read the figures of the run from the records that the commands wrote."""
    recipe = json.loads((PACKED / "recipe.json").read_text())
    report = json.loads((PACKED / "sparsity_report.json").read_text())
    control = json.loads((DENSE / "sparsity_report.json").read_text())
    quality, bench = Record.read(EVAL), Record.read(BENCH)
    pruned, dense = (row for row in quality.rows if row.metric == "perplexity")
    sizes = (report["bytes_dense"], control["bytes_packed"], report["bytes_packed"])
    return {
        "model": "SmolLM2-135M-Instruct",
        "method": recipe["method"],
        "pattern": recipe["pattern"],
        "sparsity": report["sparsity"],
        "recovered": report["recover"],
        "ppl_dense": dense.value,
        "ppl_pruned": pruned.value,
        "ppl_protocol": pruned.load,
        "bytes": dict(zip(SIDES, sizes, strict=True)),
        **{
            metric: {
                name: bench.value(folder.name, bench.loads[0], metric)
                for name, folder in SIDES.items()
            }
            for metric in METRICS
        },
        "provenance": dict(bench.provenance),
    }


def print_table(summary: dict[str, Any]) -> None:
    """Print the dense model, its int8 control and the pruned one side by side."""
    perplexity = {"dense bf16": summary["ppl_dense"], "int8 8:16": summary["ppl_pruned"]}
    megabytes = {name: size / 1e6 for name, size in summary["bytes"].items()}
    rows = [
        ("weights on disk (MB)", megabytes),
        ("perplexity", perplexity),
        *((label, summary[metric]) for metric, label in METRICS.items()),
    ]
    title = f"{summary['model']}, {summary['method']} {summary['pattern']}, recovered"
    print(f"\n{title:48}" + "".join(f"{name:>12}" for name in SIDES))
    for label, values in rows:
        cells = (values.get(name) for name in SIDES)  # None: no figure that stands
        print(f"{label:48}" + "".join(f"{'–' if c is None else f'{c:.1f}':>12}" for c in cells))
    print(f"perplexity: {summary['ppl_protocol']}")


if __name__ == "__main__":
    main()
