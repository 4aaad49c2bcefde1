"""Packed weights in ONNX Runtime on CPU: SmolLM2 and a 1.1B LLaMA shape against its own types.

    python benchmarks/onnx_speed.py [--models smollm2 tinyllama] [--threads 1 2] [--rounds 7]
        [--rows NAME …] [--prompt-len 64] [--folder DIR] [--record FILE]

Rows: ONNX Runtime's fp32, int8 and int4 of the dense model, then ai.gblm::Linear with bf16, int8
and int4 values, each dense (the control, no sparsity) and sparse by magnitude. Heads: ONNX
Runtime's integer graphs round the head, too, so ours do, to the same type. The 1.1B model is
random, and exported without validation: nothing is ever certain to be its next token. Folders are
made once, in DIR. Writes benchmarks/results/onnx.json, or FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pages
from decoding import SHORT
from pages import gblm, spread
from shapes import make_packed, model_folder

from gblm.bench.engines import parse_sides
from gblm.bench.requests import Load
from gblm.bench.rounds import Plan, bench
from gblm.bench.sides import Setup
from gblm.record import Record

# On a CPU with AMX, and on one without.
RECORDS = ("onnx", "onnx-zen5")
MODELS = ("smollm2", "tinyllama")
PRECISIONS = ("fp32", "int8", "int4")
PATTERNS = {"dense": "dense", "half": "0.5", "2of4": "2:4", "8of16": "8:16"}
OUTPUT_LEN = 32
# Names of the rows, those of a value type behind ONNX Runtime's own.
ROWS = tuple(
    row
    for values, precision in zip(SHORT.values(), PRECISIONS, strict=True)
    for row in (f"ort-{precision}", *(f"{name}-{values}" for name in PATTERNS))
)


def make_folders(root: Path, name: str, rows: Sequence[str] = ROWS) -> dict[str, Path]:
    """Make the exported folders by row; those that exist are used again."""
    model = model_folder(root, name)
    folders = {row: root / "exports" / name / row for row in rows}
    for row, folder in folders.items():
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            export(model, row, folder, tokens=64 if name == "smollm2" else 0)
    return folders


def export(model: Path, row: str, folder: Path, tokens: int) -> None:
    """Export a model as a row says, validated with so many tokens."""
    kind, _, values = row.partition("-")
    options = f"--validate {tokens} --output '{folder}'"
    if kind == "ort":
        gblm(f"export onnx '{model}' --precision {values} {options}")
        return
    values = "float" if values == "bf16" else values
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        packed = Path(work) / "packed"
        make_packed(model, PATTERNS[kind], values, values, packed)
        gblm(f"export onnx '{packed}' --sparse --precision fp32 {options}")


def measure(folders: dict[str, Path], threads: int, prompt_len: int, rounds: int) -> dict[str, Any]:
    """Compare the folders of a model; a run of the record."""
    load = Load(num_prompts=1, prompt_len=prompt_len, output_len=OUTPUT_LEN)
    with tempfile.TemporaryDirectory() as work:
        setup = Setup((load,), Path(work) / "log", threads=threads)
        sides = parse_sides([f"{row}={path}" for row, path in folders.items()], setup)
        record = bench(sides, setup, Plan(rounds))
    reports = {
        row: json.loads((folder / "onnx_report.json").read_text())
        for row, folder in folders.items()
    }
    return {
        "settings": {"threads": threads, "prompt_len": prompt_len, "output_len": OUTPUT_LEN,
                     "rounds": rounds},
        "validation": {row: report.get("validation") for row, report in reports.items()},
        "clock": "wall time", "load_average": os.getloadavg()[0],
        "provenance": dict(record.provenance),
        "rows": [_row(record, load.words, side) for side in record.sides],
    }  # fmt: skip


def _row(record: Record, load: str, side: str) -> dict[str, Any]:
    """Give a side's figures, and how often faster it is than each other side."""
    row: dict[str, Any] = {
        "name": side, "file_bytes": record.sides[side]["bytes"],
        "memory_bytes": 1e6 * (record.value(side, load, "memory_mb") or 0.0),
        "load_s": record.value(side, load, "load_s"),
    }  # fmt: skip
    for phase, metric in (("prefill", "ttft_ms_p50"), ("decode", "tpot_ms_p50")):
        own = record.row(side, load, metric)
        others = [other for other in record.sides if other != side]
        ratios = {other: record.ratio(other, load, metric, side) for other in others}
        row[f"{phase}_ms"] = spread(own.rounds if own else (float("nan"),))
        row[f"{phase}_speedup"] = {
            other: spread(found.rounds) for other, found in ratios.items() if found
        }
    return row


def table() -> str:
    """Give one table for each model and number of threads."""
    return "\n\n".join(_table(run) for record in RECORDS for run in pages.read(record)["runs"])


def _table(run: dict[str, Any]) -> str:
    """Give sizes, times, and ratios to fp32, the control and ONNX Runtime's own type."""
    rows, settings = {row["name"]: row for row in run["rows"]}, run["settings"]
    header = [
        f"{pages.MODELS[run['model']]}, {pages.counted(settings['threads'], 'thread')}",
        "file, MB", "memory, MB", "load, s", "decode, tok/s", "× fp32", "× control",
        "× ONNX Runtime's", f"prefill {settings['prompt_len']}, ms", "× fp32",
        "greedy tokens as in torch",
    ]  # fmt: skip
    cells = [_cells(run, rows[name]) for name in ROWS if name in rows]
    return (
        f"{pages.table(header, cells)}\n\nMedians of {settings['rounds']} interleaved rounds of "
        f"{settings['prompt_len']} + {settings['output_len']} tokens, batch 1; ratios are paired "
        f"by round (min–max); {run['clock']}. Memory is what a process of its own holds after the "
        "first token, mapped pages included. Heads of integer rows are rounded to the same type. "
        f"Load average {run['load_average']:.1f}. {pages.origin(run, 'torch', 'onnxruntime')}"
    )


def _cells(run: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Print one line."""
    kind, _, values = row["name"].partition("-")
    faster, prefill = row["decode_speedup"], row["prefill_speedup"].get("ort-fp32")
    control = None if kind in ("ort", "dense") else faster.get(f"dense-{values}")
    rival = None if kind == "ort" else faster.get(f"ort-{values}")
    found = (run["validation"] or {}).get(row["name"])
    return [
        label(row["name"]),
        f"{row['file_bytes'] / 1e6:.0f}",
        f"{row['memory_bytes'] / 1e6:.0f}",
        f"{row['load_s']:.2f}",
        f"{1e3 / row['decode_ms']['median']:.1f}",
        ratio(faster.get("ort-fp32")),
        ratio(control),
        ratio(rival),
        f"{row['prefill_ms']['median']:.0f}",
        f"{prefill['median']:.2f}" if prefill else "–",
        f"{found['equal_greedy_tokens']} of {found['tokens']}" if found else "–",
    ]


def label(row: str) -> str:
    """Name a row for people."""
    kind, _, values = row.partition("-")
    if kind == "ort":
        return f"ONNX Runtime {values}"
    if kind == "dense":
        return f"ours, dense {values} (control)"
    return f"ours, {values} {'50 %' if kind == 'half' else PATTERNS[kind]}"


def ratio(found: dict[str, float] | None) -> str:
    """Print a paired ratio and its range."""
    if found is None:
        return "–"
    return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"


def main() -> None:
    """Make the folders, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--record", type=Path, default=pages.RESULTS / "onnx.json")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-onnx")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for model in given.models:
        folders = make_folders(given.folder, model, given.rows)
        for threads in given.threads:
            run = measure(folders, threads, given.prompt_len, given.rounds)
            runs.append({"model": model, **run})
    pages.write(given.record, {"kind": "onnx", "command": pages.made_by(), "runs": runs})


if __name__ == "__main__":
    main()
