"""The table of docs/gpu.md about the Triton kernels, from the record of triton_code.py."""

from __future__ import annotations

import json
from typing import Any

from pages import RESULTS, table

KEYS = ("registers", "spilled_bytes", "instructions")
HEADER = ["kernel", "registers", "spilled bytes", "instructions per weight"]


def triton_code() -> str:
    """Each kernel on NVIDIA's targets, smallest and largest, and on AMD's."""
    record: dict[str, Any] = json.loads((RESULTS / "triton-code.json").read_text())
    rows = record["rows"]
    nvidia = [row for row in rows if row["arch"].startswith("sm_")]
    amd = [row for row in rows if not row["arch"].startswith("sm_")]
    lines = [
        [
            f"{variant}",
            *(f"{_span(nvidia, variant, key)}; {_span(amd, variant, key)}" for key in KEYS),
        ]
        for variant in dict.fromkeys(row["variant"] for row in rows)
    ]
    archs = [", ".join(dict.fromkeys(row["arch"] for row in part)) for part in (nvidia, amd)]
    note = f"Triton {record['triton']}; smallest and largest of {archs[0]}; then {archs[1]}."
    return f"{table(HEADER, lines)}\n\n{note}"


def _span(rows: list[dict[str, Any]], variant: str, key: str) -> str:
    found = sorted({row[key] for row in rows if row["variant"] == variant})
    if found == [0.0] and key == "instructions":
        return "–"
    return f"{found[0]}" if len(found) == 1 else f"{found[0]}–{found[-1]}"
