"""Packed weights in ONNX Runtime on CPU: SmolLM2 and a 1.1B LLaMA shape against its own types.

    python benchmarks/onnx_speed.py [--models smollm2 tinyllama] [--threads 1 2] [--rounds 7]
        [--rows NAME …] [--prompt-len 64 …] [--folder DIR] [--record FILE]

Rows: ONNX Runtime's fp32, int8 and int4 of the dense model, then ai.gblm::Linear with bf16, int8
and int4 values, each dense (the control, no sparsity) and 50 % sparse by magnitude. Heads: ONNX
Runtime's integer graphs round the head, too, so ours do, to the same type. The 1.1B model is
random, and exported without validation: nothing is ever certain to be its next token. Folders are
made once, in DIR. Writes benchmarks/results/onnx.json, or FILE.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import older
from memory import shape_folder
from pages import made_by

from gblm.bench.requests import Load
from gblm.bench.rounds import Plan, bench
from gblm.bench.sides import Setup, parse_sides
from gblm.fetch import fetch

RECORD = Path(__file__).resolve().parent / "results" / "onnx.json"
MODELS = ("smollm2", "tinyllama")
PRUNE = "prune {model} --method magnitude --pattern {pattern} --values {values} --head {head}"
PACK = "export pack {model} --pattern dense --values {values} --head {head}"
# Name of the row, command that packs ("" leaves the model dense), pattern, values, head, precision.
CASES = (
    ("ort-fp32", "", "", "", "", "fp32"),
    ("ort-int8", "", "", "", "", "int8"),
    ("ort-int4", "", "", "", "", "int4"),
    ("dense-bf16", PACK, "dense", "float", "float", "fp32"),
    ("half-bf16", PRUNE, "0.5", "float", "float", "fp32"),
    ("2of4-bf16", PRUNE, "2:4", "float", "float", "fp32"),
    ("8of16-bf16", PRUNE, "8:16", "float", "float", "fp32"),
    ("dense-int8", PACK, "dense", "int8", "int8", "fp32"),
    ("half-int8", PRUNE, "0.5", "int8", "int8", "fp32"),
    ("2of4-int8", PRUNE, "2:4", "int8", "int8", "fp32"),
    ("8of16-int8", PRUNE, "8:16", "int8", "int8", "fp32"),
    ("dense-int4", PACK, "dense", "int4", "int4", "fp32"),
    ("half-int4", PRUNE, "0.5", "int4", "int4", "fp32"),
    ("2of4-int4", PRUNE, "2:4", "int4", "int4", "fp32"),
    ("8of16-int4", PRUNE, "8:16", "int4", "int4", "fp32"),
)
OUTPUT_LEN = 32
ROWS = tuple(row for row, *_ in CASES)


def make_folders(root: Path, name: str, rows: Sequence[str] = ROWS) -> dict[str, Path]:
    """The exported folders by row; those that exist are used again."""
    model = fetch(name) if name == "smollm2" else shape_folder(root, name)
    folders = {}
    for row, command, pattern, values, head, precision in CASES:
        if row not in rows:
            continue
        folders[row] = root / "exports" / name / row
        if folders[row].exists():
            continue
        folders[row].parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as work:
            source, more = model, []
            if command:
                source, more = Path(work) / "packed", ["--sparse"]
                words = command.format(model=model, pattern=pattern, values=values, head=head)
                gblm(*words.split(), "--output", str(source))
            tokens = "64" if name == "smollm2" else "0"
            gblm("export", "onnx", str(source), "--output", str(folders[row]), *more,
                 "--precision", precision, "--validate", tokens)  # fmt: skip
    return folders


def gblm(*words: str) -> None:
    """Run a command of gblm."""
    subprocess.run([sys.executable, "-m", "gblm", *words], check=True)


def validations(folders: dict[str, Path]) -> dict[str, Any]:
    """What each export's report says of its agreement with torch."""
    found = {}
    for row, folder in folders.items():
        report = json.loads((folder / "onnx_report.json").read_text())
        found[row] = report.get("validation")
    return found


def main() -> None:
    """Make the folders, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-len", nargs="+", type=int, default=(64,))
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-onnx")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for model in arguments.models:
        folders = make_folders(arguments.folder, model, arguments.rows)
        for threads, length in itertools.product(arguments.threads, arguments.prompt_len):
            load = Load(num_prompts=1, prompt_len=length, output_len=OUTPUT_LEN)
            with tempfile.TemporaryDirectory() as work:
                setup = Setup((load,), Path(work) / "log", threads=threads)
                sides = parse_sides([f"{row}={path}" for row, path in folders.items()], setup)
                record = bench(sides, setup, Plan(arguments.rounds))
            settings = {"threads": threads, "prompt_len": length, "output_len": OUTPUT_LEN,
                        "rounds": arguments.rounds}  # fmt: skip
            facts = {"load_average": os.getloadavg()[0], **older.onnx(record, threads)}
            runs.append({"model": model, "validation": validations(folders),
                         "settings": settings, **facts})  # fmt: skip
    arguments.record.write_text(
        json.dumps({"kind": "onnx", "command": made_by(), "runs": runs}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
