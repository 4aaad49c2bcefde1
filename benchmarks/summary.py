"""The README's table: size, quality and speed of SmolLM2-135M, from other scripts' records."""

from __future__ import annotations

import decoding
import pages
import recovery
from decoding import BASELINE, LOADS, row_name
from recovery import DENSE, side_name

from gblm.record import Record

TOKENS = 65536
# By values, which were measured in rounds of their own: label, pattern, side of the recovery.
ROWS = {
    "int8": (
        ("dense int8, GPTQ", "dense", side_name("dense", "int8", 0, "sparsegpt", 0, 0)),
        (
            "int8 8:16, ends dense, recovered: `gblm prune`",
            "8:16 ends",
            side_name("8:16", "int8", 1, "sparsegpt", 2, TOKENS),
        ),
    ),
    "int4": (
        ("dense int4, recovered", "dense", side_name("dense", "int4", 0, "sparsegpt", 2, TOKENS)),
        (
            "int4 8:16, ends dense, recovered",
            "8:16 ends",
            side_name("8:16", "int4", 1, "sparsegpt", 2, TOKENS),
        ),
    ),
}
TEXTS = ("descriptions", "WikiText-2", "pydoc")


def table() -> str:
    """Give a row of vLLM's bf16 for each value type, then those of the type in the same rounds."""
    records = {
        values: Record.read(pages.RESULTS / f"decoding-smollm2-{values}-1-compiled.json")
        for values in ROWS
    }
    quality = Record.read(recovery.record_of("smollm2"))
    header = [
        "SmolLM2-135M", "MB", *TEXTS, *(f"{work}, tok/s (× bf16, × dense)" for work in LOADS),
    ]  # fmt: skip
    rows = [row for values, speed in records.items() for row in _rows(values, speed, quality)]
    made = [record.as_json() for record in (*records.values(), quality)]
    return (
        f"{pages.table(header, rows)}\n\nPerplexity of three texts, 16 windows × 256 tokens: of "
        "*descriptions* and WikiText-2 no step has seen anything, of pydoc another part. vLLM on "
        "CPU, compiled, one thread: int8 and int4 were measured in interleaved rounds of their "
        "own, each beside vLLM's bf16; the first ratio is to that bf16 row, the second to the "
        "dense integers of the same rounds. MB and perplexity are of models with bf16 heads, "
        "speeds of models with int8 heads, pruned by magnitude: how weights were found changes no "
        f"speed. {pages.origins(made, 'torch')}"
    )


def _rows(values: str, speed: Record, quality: Record) -> list[list[str]]:
    control = row_name("dense", values)
    found = [
        (label, side, row_name(pattern, values))
        for label, pattern, side in ROWS[values]
        if side in quality.sides
    ]
    if found:
        found.insert(0, (f"dense bf16 (vLLM), beside {values}", DENSE, BASELINE))
    return [
        [
            label, f"{quality.sides[side]['bytes'] / 1e6:.0f}",
            *(pages.perplexity(quality.value(side, text, "perplexity") or 0) for text in TEXTS),
            *(decoding.cell(speed, name, control, work) for work in LOADS),
        ]
        for label, side, name in found
    ]  # fmt: skip
