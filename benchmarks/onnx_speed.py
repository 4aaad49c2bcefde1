"""Packed weights in ONNX Runtime on CPU: SmolLM2 and a 1.1B LLaMA shape against its own types.

    python benchmarks/onnx_speed.py [--models smollm2 tinyllama] [--threads 1 2]
        [--rows NAME …] [--folder DIR]

Rows: ONNX Runtime's fp32, int8 and int4 of the dense model, then ai.gblm::Linear with bf16, int8
and int4 values, each dense (the control, no sparsity) and sparse by magnitude. Heads: ONNX
Runtime's integer graphs round the head, too, so ours do, to the same type. The 1.1B model is
random, and exported without validation: nothing is ever certain to be its next token. Folders are
made once, in DIR. Writes benchmarks/results/onnx-MODEL-THREADS.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pages
from decoding import SHORT
from pages import gblm
from shapes import make_packed, model_folder

from gblm.bench.engines import parse_sides
from gblm.bench.requests import Load
from gblm.bench.rounds import bench
from gblm.bench.sides import Setup
from gblm.record import Record, Row

PREFILL, DECODE, OVER = "ttft_ms_p50", "tpot_ms_p50", "_speedup/"
MODELS = ("smollm2", "tinyllama")
PRECISIONS = ("fp32", "int8", "int4")
PATTERNS = {"dense": "dense", "8of16": "8:16"}
PROMPT_LEN, OUTPUT_LEN = 64, 32
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
        make_packed(model, PATTERNS[kind], values, packed)
        gblm(f"export onnx '{packed}' --sparse --precision fp32 {options}")


def measure(folders: dict[str, Path], model: str, threads: int) -> Record:
    """Compare the folders of a model; ratios of all pairs of rows are rows of their own."""
    load = Load(num_prompts=1, prompt_len=PROMPT_LEN, output_len=OUTPUT_LEN)
    with tempfile.TemporaryDirectory() as work:
        setup = Setup((load,), Path(work) / "log", threads=threads)
        sides = parse_sides([f"{row}={path}" for row, path in folders.items()], setup)
        record = bench(sides)
    asked = {"model": model, "threads": threads, "prompt_len": PROMPT_LEN,
             "output_len": OUTPUT_LEN}  # fmt: skip
    reports = {
        row: json.loads((folder / "onnx_report.json").read_text())
        for row, folder in folders.items()
    }
    return replace(
        record, kind="onnx", command=pages.made_by(), rows=(*record.rows, *speedups(record, load)),
        sides={row: {**facts, "validation": reports[row].get("validation")}
               for row, facts in record.sides.items()},
        provenance={**record.provenance, "clock": "wall time", "load_average": os.getloadavg()[0],
                    "settings": {**record.provenance["settings"], **asked}},
    )  # fmt: skip


def speedups(record: Record, load: Load) -> Iterator[Row]:
    """Say how often faster each side is than each other one, paired by round."""
    for side, other in itertools.permutations(record.sides, 2):
        for metric in (PREFILL, DECODE):
            found = record.ratio(other, load.words, metric, side)
            if found is not None:
                yield Row(side, load.words, f"{metric}{OVER}{other}", "x", found.median,
                          interval=(found.low, found.high))  # fmt: skip


def table() -> str:
    """Give one table for each model and number of threads."""
    paths = [pages.RESULTS / f"onnx-{model}-{n}.json" for model in MODELS for n in (1, 2)]
    return "\n\n".join(_table(Record.read(path)) for path in paths if path.exists())


def _table(record: Record) -> str:
    """Give sizes, times, and ratios to fp32, the control and ONNX Runtime's own type."""
    facts, settings = record.provenance, record.provenance["settings"]
    header = [
        f"{pages.MODELS[settings['model']]}, {pages.counted(settings['threads'], 'thread')}",
        "file, MB", "memory, MB", "load, s", "decode, tok/s", "× fp32", "× control",
        "× ONNX Runtime's", f"prefill {settings['prompt_len']}, ms", "× fp32",
        "greedy tokens as in torch",
    ]  # fmt: skip
    cells = [_cells(record, name) for name in ROWS if name in record.sides]
    return (
        f"{pages.table(header, cells)}\n\nMedians of {settings['rounds']} interleaved rounds of "
        f"{settings['prompt_len']} + {settings['output_len']} tokens, batch 1; ratios are paired "
        f"by round (min–max); {facts['clock']}. Memory is what a process of its own holds after "
        "the first token, mapped pages included. Heads of integer rows are rounded to the same "
        f"type. Load average {facts['load_average']:.1f}. "
        f"{pages.origin(record.as_json(), 'torch', 'onnxruntime')}"
    )


def _cells(record: Record, side: str) -> list[str]:
    """Print one line."""
    kind, _, values = side.partition("-")
    figures = {row.metric: row for row in record.rows if row.side == side}
    control = None if kind in ("ort", "dense") else figures.get(f"{DECODE}{OVER}dense-{values}")
    rival = None if kind == "ort" else figures.get(f"{DECODE}{OVER}ort-{values}")
    prefill = figures.get(f"{PREFILL}{OVER}ort-fp32")
    found = record.sides[side]["validation"]
    return [
        label(side),
        f"{record.sides[side]['bytes'] / 1e6:.0f}",
        f"{figures['memory_mb'].value:.0f}",
        f"{figures['load_s'].value:.2f}",
        f"{1e3 / (figures[DECODE].value or math.nan):.1f}",
        ratio(figures.get(f"{DECODE}{OVER}ort-fp32")),
        ratio(control),
        ratio(rival),
        f"{figures[PREFILL].value:.0f}",
        f"{prefill.value:.2f}" if prefill else "–",
        f"{found['equal_greedy_tokens']} of {found['tokens']}" if found else "–",
    ]


def label(row: str) -> str:
    """Name a row for people."""
    kind, _, values = row.partition("-")
    if kind == "ort":
        return f"ONNX Runtime {values}"
    if kind == "dense":
        return f"ours, dense {values} (control)"
    return f"ours, {values} {PATTERNS[kind]}"


def ratio(row: Row | None) -> str:
    """Print a paired ratio and its range."""
    if row is None or row.interval is None:
        return "–"
    return f"{row.value:.2f} ({row.interval[0]:.2f}–{row.interval[1]:.2f})"


def main() -> None:
    """Make the folders, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-onnx")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for model in given.models:
        folders = make_folders(given.folder, model, given.rows)
        for threads in given.threads:
            record = measure(folders, model, threads)
            pages.save(record, pages.RESULTS / f"onnx-{model}-{threads}.json")


if __name__ == "__main__":
    main()
