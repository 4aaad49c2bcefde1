"""Record the README's benchmark on the real model: quality, size, serving. Run by `make bench`.

Writes one JSON file per measurement to benchmarks/results/, then the tables that README.md and
benchmarks/results.md show. `--tables` only rewrites the tables.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUN = ROOT / "runs" / "bench"
DENSE = RUN / "smollm2"
METHODS, PATTERNS = ("magnitude", "wanda", "gblm"), ("2:4", "0.5")
CALIBRATION = "--calibration pydoc --num-samples 16 --seq-len 256 --seed 0 --dtype float32"
WINDOWS = "--text pydoc --seq-len 512 --dtype bfloat16"
# Pattern and backend of each served run; the dense backend is the control for the packed one.
SERVED = (("2:4", "reference"), ("2:4", "dense"))
LOAD = "--num-prompts 3 --input-len 64 --output-len 16 --repeat 3"
VLLM = "--enforce-eager --max-model-len 1024"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def main() -> None:
    """Measure everything unless only the tables are wanted."""
    if sys.argv[1:] != ["--tables"]:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        RESULTS.mkdir(parents=True, exist_ok=True)
        gblm(f"fetch smollm2 --output {DENSE} --overwrite")
        for method in METHODS:
            for pattern in PATTERNS:
                measure_quality(method, pattern)
        for pattern, backend in SERVED:
            record = RESULTS / f"serving-gblm-{slug(pattern)}-{backend}.json"
            gblm(f"bench {packed('gblm', pattern)} --baseline {DENSE} --backend {backend} {LOAD} "
                 f"--output {record} --log {RUN}/servers.log -- {VLLM}")  # fmt: skip
    text = tables()
    (ROOT / "benchmarks" / "results.md").write_text(f"# Measured results\n\n{text}\n")
    replace_block(ROOT / "README.md", text)


def measure_quality(method: str, pattern: str) -> None:
    """Prune, verify, measure perplexity; one record with size and sparsity in it."""
    folder = packed(method, pattern)
    record = RESULTS / f"quality-{method}-{slug(pattern)}.json"
    gblm(f"prune {DENSE} --method {method} --pattern {pattern} {CALIBRATION} "
         f"--output {folder} --overwrite")  # fmt: skip
    gblm(f"verify {folder}")
    gblm(f"eval {folder} --baseline {DENSE} {WINDOWS} --backend dense --output {record}")
    report = json.loads((folder / "sparsity_report.json").read_text())
    facts = {key: value for key, value in report.items() if key != "tensors"}
    recipe = json.loads((folder / "recipe.json").read_text()) | {"model": "smollm2"}
    full = json.loads(record.read_text()) | {"model": folder.name, "baseline": "smollm2"}
    record.write_text(json.dumps(full | {"recipe": recipe, "report": facts}, indent=2) + "\n")


def tables() -> str:
    """Markdown of all records."""
    quality = [read(f"quality-{m}-{slug(p)}") for p in PATTERNS for m in METHODS]
    served = [read(f"serving-gblm-{slug(p)}-{b}") for p, b in SERVED]
    first = quality[0]
    lines = [
        "| SmolLM2-135M | zeros | MB on disk | bits/weight | perplexity |",
        "|---|---|---|---|---|",
        f"| dense bf16 | – | {first['report']['bytes_dense'] / 1e6:.0f} | 16 "
        f"| {first['perplexity_baseline']:.2f} |",
    ]
    for row in quality:
        report, recipe = row["report"], row["recipe"]
        lines.append(
            f"| {recipe['method']} {recipe['pattern']} | {report['sparsity']:.0%} "
            f"| {report['bytes_packed'] / 1e6:.0f} | {report['bits_per_weight']:.2f} "
            f"| {row['perplexity']:.2f} |"
        )
    lines += [
        "",
        f"Perplexity: {first['protocol']}. Calibration: 16 × 256 tokens of the other part of that "
        "text. Bits per pruned weight include the mask.",
        "",
        "| vLLM serves GBLM 2:4 (each cell: dense control → packed) | decode tok/s "
        "| ratio (min–max) | TTFT ms | TPOT ms | tok/s | server MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (_, backend), row in zip(SERVED, served, strict=True):
        how = "packed in memory" if backend == "reference" else "expanded at load"
        lines.append(serving_line(f"`--backend {backend}`: {how}", row))
    load, origin = served[0]["load"], served[0]["provenance"]
    packages = ", ".join(f"{k} {v}" for k, v in origin["packages"].items() if k != "numpy")
    lines += [
        "",
        f"`vllm bench serve`, {load['rounds']} interleaved rounds of {load['num_prompts']} prompts "
        f"of {load['input_len']} + {load['output_len']} tokens, concurrency {load['concurrency']}, "
        f"eager; ratios are paired by round. {origin['machine']['cpu']}, "
        f"{origin['machine']['cores']} cores; Python {origin['python']}, {packages}; commit "
        f"{origin['commit'][:12]}. Records: `benchmarks/results/`.",
    ]
    return "\n".join(lines)


def serving_line(label: str, row: dict[str, Any]) -> str:
    """One row of the serving table: the dense control of the same rounds, then the packed model."""
    values = row["summary"]
    decode = values["decode_tok_s"]

    def both(metric: str, digits: int) -> str:
        cell = values[metric]
        return f"{cell['baseline']:.{digits}f} → {cell['model']:.{digits}f}"

    return (
        f"| {label} | {both('decode_tok_s', 1)} | {decode['ratio']:.2f} "
        f"({decode['ratio_min']:.2f}–{decode['ratio_max']:.2f}) | {both('ttft_ms', 0)} "
        f"| {both('tpot_ms', 0)} | {both('throughput_tok_s', 1)} | {both('memory_mb', 0)} |"
    )


def replace_block(path: Path, text: str) -> None:
    """Put the tables between the two markers of a page."""
    before, rest = path.read_text().split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def packed(method: str, pattern: str) -> Path:
    """Folder of a pruned model."""
    return RUN / f"smollm2-{method}-{slug(pattern)}"


def slug(pattern: str) -> str:
    """A pattern as part of a file name."""
    return pattern.replace(":", "of")


def read(name: str) -> dict[str, Any]:
    """One record."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return record


def gblm(arguments: str) -> None:
    """Print and run one command; stop when it fails."""
    print(f"\n$ gblm {arguments}", flush=True)
    subprocess.run([sys.executable, "-m", "gblm", *shlex.split(arguments)], check=True)


if __name__ == "__main__":
    main()
