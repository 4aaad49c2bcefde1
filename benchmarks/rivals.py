"""Rivals on the text of matrix.py: llama.cpp, ONNX Runtime, vLLM with SmolLM2-135M, unpruned.

    python benchmarks/rivals.py --llama-cpp PYTHON [--model FOLDER] [--output FILE]

PYTHON has llama-cpp-python. GGUF files are made of the same weights, every matrix of one type, the
embeddings, which are the head, too. ONNX Runtime's graphs are those of `gblm export onnx`, vLLM's
folders those of vllm_rivals.py. Writes benchmarks/results/rivals.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp_engine
import vllm_rivals
from decoding import LLAMA_CPP, llama_cpp_version
from matrix import TEXT, gblm
from pages import RESULTS, made_by

from gblm.evaluate.perplexity import Protocol
from gblm.fetch import fetch
from gblm.model.loading import load_tokenizer
from gblm.provenance import provenance
from gblm.record import Record

RECORD = RESULTS / "rivals.json"
PROTOCOL = Protocol("pydoc", 512, max_windows=8)
ONNX = ("fp32", "int8", "int4")
Row = dict[str, Any]


def llama_cpp_rows(model: Path, root: Path, python: str) -> list[Row]:
    """Perplexity and file size of each GGUF type."""
    windows = json.dumps(PROTOCOL.windows(load_tokenizer(model)).tolist())
    rows = []
    for kind in LLAMA_CPP.values():
        path = llama_cpp_engine.make_gguf(model, kind, root / f"{kind}.gguf")
        done = subprocess.run(
            [python, llama_cpp_engine.__file__, str(path), "2", "score"],
            input=windows, stdout=subprocess.PIPE, check=True, text=True,
        )  # fmt: skip
        loss = json.loads(done.stdout.splitlines()[-1])["loss"]
        rows.append({
            "name": f"llama.cpp {kind}", "perplexity": math.exp(loss),
            "bytes": path.stat().st_size,
        })  # fmt: skip
    return rows


def onnx_rows(model: Path, root: Path) -> list[Row]:
    """Perplexity and size of the graphs without an operator of ours."""
    rows = []
    for precision in ONNX:
        folder, record = root / precision, root / f"{precision}.json"
        gblm(f"export onnx {model} --precision {precision} --validate 0 --output {folder}")
        text = TEXT.replace("--dtype bfloat16 ", "")  # a graph has the dtype of its export
        gblm(f"eval {folder} {text} --output {record}")
        rows.append({
            "name": f"ONNX Runtime {precision}",
            "perplexity": Record.read(record).rows[0].value,
            "bytes": sum(path.stat().st_size for path in folder.glob("model.onnx*")),
        })  # fmt: skip
    return rows


def vllm_rows(model: Path, root: Path) -> list[Row]:
    """Perplexity and size of what vLLM serves with its own integer kernels."""
    rows = []
    for kind in vllm_rivals.KINDS:
        folder, record = vllm_rivals.make_folder(model, kind, root / kind), root / f"{kind}.json"
        gblm(f"eval {folder} --engine vllm {TEXT} --output {record}")
        found = Record.read(record)
        rows.append({
            "name": f"vLLM {kind}", "perplexity": found.rows[0].value,
            "bytes": found.sides[found.rows[0].side]["bytes"],
        })  # fmt: skip
    return rows


def main() -> None:
    """Make the files, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", metavar="PYTHON", required=True)
    parser.add_argument("--model", type=Path, help="SmolLM2-135M as a folder, if not fetched")
    parser.add_argument("--output", type=Path, default=RECORD)
    given = parser.parse_args()
    model, origin = given.model or fetch("smollm2"), provenance()
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        rows = llama_cpp_rows(model, root, given.llama_cpp)
        rows += onnx_rows(model, root) + vllm_rows(model, root)
    record = {
        "kind": "rivals", "command": made_by(),
        "model": "smollm2", "provenance": origin, "rows": rows,
        "protocol": PROTOCOL.line(PROTOCOL.windows(load_tokenizer(model))),
        "llama_cpp": (llama_cpp_version(given.llama_cpp) or "").strip(),
    }  # fmt: skip
    given.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
