"""Record the README's benchmark on the real model: quality, size, serving. Run by `make bench`.

    python benchmarks/record.py [quality] [serving]

Writes one JSON file per measurement to benchmarks/results/, then the tables of the pages.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import older
import tables
from pages import RESULTS, ROOT
from tables import slug

from gblm.record import Record

RUN = ROOT / "runs" / "bench"
DENSE = RUN / "smollm2"
CALIBRATION = "--calibration pydoc --num-samples 16 --seq-len 256 --seed 0 --dtype float32"
WINDOWS = "--text pydoc --seq-len 512 --dtype bfloat16"
LOAD = "--num-prompts 3 --prompt-len 64 --output-len 16 --rounds 3"
VLLM = "--enforce-eager --max-model-len 1024"


def main() -> None:
    """Measure what is named, or everything, and rewrite the tables."""
    wanted = sys.argv[1:] or ["quality", "serving"]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    RESULTS.mkdir(parents=True, exist_ok=True)
    gblm(f"fetch smollm2 --output {DENSE} --overwrite")
    if "quality" in wanted:
        for label, method, options, patterns in (*tables.METHODS, *tables.MORE):
            for pattern in patterns:
                measure_quality(label, f"--method {method} {options}", pattern)
    if "serving" in wanted:
        for pattern, backend in tables.SERVED:
            record = RESULTS / f"serving-gblm-{slug(pattern)}-{backend}.json"
            gblm(f"bench {DENSE} {packed('gblm', pattern)} --backend {backend} "
                 f"{LOAD} --output {record} --log {RUN}/servers.log -- {VLLM}")  # fmt: skip
            found = Record.read(record)
            load = {"rounds": 3, "num_prompts": 3, "input_len": 64, "output_len": 16,
                    "concurrency": 1, "options": VLLM.split()}  # fmt: skip
            facts = found.as_json() | older.serving(found) | {"load": load}
            record.write_text(json.dumps(facts, indent=2) + "\n")
    tables.main()


def measure_quality(label: str, method: str, pattern: str) -> None:
    """Prune, verify, measure perplexity; one record with size and sparsity in it."""
    folder = packed(label, pattern)
    record = RESULTS / f"quality-{label}-{slug(pattern)}.json"
    gblm(f"prune {DENSE} {method} --pattern {pattern} {CALIBRATION} "
         f"--output {folder} --overwrite")  # fmt: skip
    gblm(f"verify {folder}")
    gblm(f"eval {folder} --baseline {DENSE} {WINDOWS} --backend dense --output {record}")
    report = json.loads((folder / "sparsity_report.json").read_text())
    facts = {key: value for key, value in report.items() if key != "tensors"}
    facts["structure"] = mean_structure(report["tensors"])
    recipe = json.loads((folder / "recipe.json").read_text()) | {"model": "smollm2"}
    full = json.loads(record.read_text()) | {"model": folder.name, "baseline": "smollm2"}
    record.write_text(json.dumps(full | {"recipe": recipe, "report": facts}, indent=2) + "\n")


def mean_structure(tensors: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Structure of the masks, averaged over the linears that have it."""
    keys = {key: None for row in tensors for key in row["structure"]}
    found = {key: [r["structure"][key] for r in tensors if key in r["structure"]] for key in keys}
    return {key: round(sum(values) / len(values), 6) for key, values in found.items()}


def packed(label: str, pattern: str) -> Path:
    """Folder of a pruned model."""
    return RUN / f"smollm2-{label}-{slug(pattern)}"


def gblm(arguments: str) -> None:
    """Print and run one command; stop when it fails."""
    print(f"\n$ gblm {arguments}", flush=True)
    subprocess.run([sys.executable, "-m", "gblm", *shlex.split(arguments)], check=True)


if __name__ == "__main__":
    main()
