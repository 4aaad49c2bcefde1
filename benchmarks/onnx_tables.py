"""The tables of README.md and docs/onnx.md, from the records of onnx_speed.py."""

from __future__ import annotations

import json
from typing import Any

from pages import RESULTS, origin, table

# On a CPU with AMX, and on two without.
RECORDS = ("onnx", "onnx-zen4", "onnx-zen5")
NAMES = {"smollm2": "SmolLM2-135M", "tinyllama": "1.1B LLaMA shape"}
# Row → the dense rows that it is compared with.
LABELS = {
    "ort-fp32": ("ONNX Runtime fp32", ()),
    "dense-bf16": ("ours, dense bf16 (control)", ()),
    "half-bf16": ("ours, bf16 50 %", ("dense-bf16",)),
    "2of4-bf16": ("ours, bf16 2:4", ("dense-bf16",)),
    "8of16-bf16": ("ours, bf16 8:16", ("dense-bf16",)),
    "ort-int8": ("ONNX Runtime int8", ()),
    "dense-int8": ("ours, dense int8 (control)", ("ort-int8",)),
    "half-int8": ("ours, int8 50 %", ("dense-int8", "ort-int8")),
    "2of4-int8": ("ours, int8 2:4", ("dense-int8", "ort-int8")),
    "8of16-int8": ("ours, int8 8:16", ("dense-int8", "ort-int8")),
    "ort-int4": ("ONNX Runtime int4", ()),
    "dense-int4": ("ours, dense int4 (control)", ("ort-int4",)),
    "half-int4": ("ours, int4 50 %", ("dense-int4", "ort-int4")),
    "2of4-int4": ("ours, int4 2:4", ("dense-int4", "ort-int4")),
    "8of16-int4": ("ours, int4 8:16", ("dense-int4", "ort-int4")),
}


def onnx(model: str = "", threads: int = 0) -> str:
    """One table for each model and number of threads; those of one alone if they are named."""
    asked = [
        run
        for record in RECORDS
        if (RESULTS / f"{record}.json").exists()
        for run in json.loads((RESULTS / f"{record}.json").read_text())["runs"]
        if model in ("", run["model"]) and threads in (0, run["settings"]["threads"])
    ]
    return "\n\n".join(map(one, asked))


def one(run: dict[str, Any]) -> str:
    """Sizes, times, and ratios to fp32, the control and ONNX Runtime's own type."""
    rows = {row["name"]: row for row in run["rows"]}
    settings = run["settings"]
    threads = settings["threads"]
    header = [
        f"{NAMES[run['model']]}, {threads} thread{'s' if threads > 1 else ''}", "file, MB",
        "memory, MB", "load, s", "decode, tok/s", "× fp32", "× control", "× ONNX Runtime's",
        f"prefill {settings['prompt_len']}, ms", "× fp32", "greedy tokens as in torch",
    ]  # fmt: skip
    cells = [cell(run, rows, name) for name in LABELS if name in rows]
    return (
        f"{table(header, cells)}\n\nMedians of {settings['rounds']} interleaved rounds of "
        f"{settings['prompt_len']} + {settings['output_len']} tokens, batch 1; ratios are paired "
        f"by round (min–max); {run['clock']}. Memory is what a process of its own holds after the "
        "first token, mapped pages included. Heads of integer rows are rounded to the same type. "
        f"Load average {run['load_average']:.1f}. {origin(run, 'torch', 'onnxruntime')}"
    )


def cell(run: dict[str, Any], rows: dict[str, Any], name: str) -> list[str]:
    """One line."""
    label, against = LABELS[name]
    row = rows[name]
    speedups = row["decode_speedup"]
    control = next((other for other in against if other.startswith("dense")), None)
    rival = next((other for other in against if other.startswith("ort")), None)
    found = (run["validation"] or {}).get(name)
    prefill = row["prefill_speedup"].get("ort-fp32")
    return [
        label,
        f"{row['file_bytes'] / 1e6:.0f}",
        f"{row['memory_bytes'] / 1e6:.0f}",
        f"{row['load_s']:.2f}",
        f"{1e3 / row['decode_ms']['median']:.1f}",
        ratio(speedups.get("ort-fp32")),
        ratio(speedups.get(control)),
        ratio(speedups.get(rival)),
        f"{row['prefill_ms']['median']:.0f}",
        f"{prefill['median']:.2f}" if prefill else "–",
        f"{found['equal_greedy_tokens']} of {found['tokens']}" if found else "–",
    ]


def ratio(found: dict[str, float] | None) -> str:
    """A paired ratio and its spread."""
    if found is None:
        return "–"
    return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"
