"""New records of `gblm bench` in the shape of the recorded ones that the published tables read."""

from __future__ import annotations

import statistics
from typing import Any

from gblm.record import Record

RATIOS = ("torch_bf16", "vllm_bf16", "vllm_w8a8")


def kernels(record: Record) -> dict[str, Any]:
    """One run of `gblm bench kernels`."""
    from gblm.bench.kernels import CALL

    facts = record.provenance
    timed = [row for row in record.rows if row.metric == "us"]
    loads = dict.fromkeys(row.load for row in timed if row.load != CALL)
    reads = [row.value or 0.0 for row in record.rows if row.metric == "read_limit_gb_s"]
    prepared = [row for row in record.rows if row.metric == "prepare_gb_s"]
    average = facts["load_average"]
    return {
        "provenance": dict(facts),
        "kernels": {**facts, "load_average_before": average, "load_average_after": average},
        "settings": facts["settings"],
        "read_limit_gb_s": max(reads),
        "cases": [_case(record, load) for load in loads],
        "prepare": [{"linear": row.side, "shape": _shape(row.load),
                     "gb_s_per_core": (row.value or 0.0) / facts["threads"]} for row in prepared],
        "overhead_us": {row.side: spread(row.rounds) for row in timed if row.load == CALL},
    }  # fmt: skip


def _case(record: Record, load: str) -> dict[str, Any]:
    shape, _, tokens = load.partition(", ")
    rows = []
    for row in record.rows:
        if row.metric == "us" and row.load == load:
            control = record.sides[row.side]["control"]
            others = {"dense": control, **dict(zip(RATIOS, RATIOS, strict=True))}
            found = {
                key: record.ratio(other, load, "us", row.side)
                for key, other in others.items() if other not in (None, row.side)
            }  # fmt: skip
            share = record.row(row.side, load, "share_of_read_limit")
            rows.append({
                "linear": row.side, "spec": record.sides[row.side]["spec"], "us": row.value,
                "bits_per_weight": record.value(row.side, shape, "bits_per_weight"),
                "gb_s": record.value(row.side, load, "gb_s"),
                "share_of_read_limit": spread(share.rounds if share else (0.0,)),
                "speedup": {key: spread(ratio.rounds) for key, ratio in found.items() if ratio},
            })  # fmt: skip
    return {"shape": _shape(shape), "tokens": int(tokens.split()[0]), "rows": rows}


def serving(record: Record) -> dict[str, Any]:
    """A comparison of a packed model with its baseline in vLLM's server."""
    (load,) = record.loads
    base = str(record.baseline)
    (model,) = (side for side in record.sides if side != base)
    names = {"ttft_ms": "ttft_ms_p50", "tpot_ms": "tpot_ms_p50", "itl_p99_ms": "itl_ms_p99",
             "throughput_tok_s": "output_tok_s", "decode_tok_s": "decode_tok_s",
             "memory_mb": "memory_mb", "ready_s": "load_s"}  # fmt: skip
    summary = {}
    for old, new in names.items():
        ratio = record.ratio(model, load, new)
        if ratio is not None:
            summary[old] = {
                "model": record.value(model, load, new), "baseline": record.value(base, load, new),
                "ratio": ratio.median, "ratio_min": min(ratio.rounds),
                "ratio_max": max(ratio.rounds),
            }  # fmt: skip
    sizes = {"model": record.sides[model]["bytes"], "baseline": record.sides[base]["bytes"]}
    size = sizes["model"] / sizes["baseline"]
    summary["weights_mb"] = {key: value / 1e6 for key, value in sizes.items()} | dict.fromkeys(
        ("ratio", "ratio_min", "ratio_max"), size
    )
    used = record.sides[model]["linears_by_backend"]
    return {"backend_used": "; ".join(sorted(used)) or "unknown", "bytes": sizes,
            "summary": summary}  # fmt: skip


def onnx(record: Record, threads: int) -> dict[str, Any]:
    """A comparison of exported folders in ONNX Runtime."""
    (load,) = record.loads
    rows = []
    for side, facts in record.sides.items():
        row: dict[str, Any] = {
            "name": side, "file_bytes": facts["bytes"],
            "memory_bytes": 1e6 * (record.value(side, load, "memory_mb") or 0.0),
            "load_s": record.value(side, load, "load_s"),
        }  # fmt: skip
        for phase, metric in (("prefill", "ttft_ms_p50"), ("decode", "tpot_ms_p50")):
            own = record.row(side, load, metric)
            others = [other for other in record.sides if other != side]
            ratios = {other: record.ratio(other, load, metric, side) for other in others}
            row[f"{phase}_ms"] = spread(own.rounds if own else (float("nan"),))
            row[f"{phase}_speedup"] = {
                other: spread(ratio.rounds) for other, ratio in ratios.items() if ratio
            }
        rows.append(row)
    return {"clock": "wall time", "threads": threads, "rows": rows,
            "provenance": dict(record.provenance)}  # fmt: skip


def spread(values: tuple[float, ...]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _shape(text: str) -> list[int]:
    return [int(side) for side in text.split("x")]
