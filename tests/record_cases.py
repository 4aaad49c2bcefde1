"""Records as `gblm eval` and `gblm bench` write them, with made-up figures."""

from __future__ import annotations

from typing import Any

PERPLEXITY = "pydoc, held-out text as one stream, 19 windows × 512 tokens, bfloat16"
SETTINGS = {"num_prompts": 8, "input_len": 64, "output_len": 32, "rounds": 3, "seed": 0,
            "tool": "serve", "threads": None, "slo": None, "options": []}  # fmt: skip


def perplexity_record(model: str, value: float, protocol: str = PERPLEXITY) -> dict[str, Any]:
    return {
        "kind": "perplexity",
        "model": model,
        "protocol": protocol,
        "tokens_sha256": "ab" * 32,
        "perplexity": value,
        "baseline": "runs/smol",
        "perplexity_baseline": 13.75,
        "ratio": value / 13.75,
        "report": {"bits_per_weight": 9.0, "bytes_dense": 2.69e8, "bytes_packed": 1.77e8},
        "provenance": {"device": "a CPU", "machine": {"cores": 2}, "packages": {"torch": "2.13"}},
    }


def onnx_record(decode: dict[str, float]) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "decode_ms": spread(ms),
            "decode_speedup": {other: spread(decode[other] / ms) for other in decode
                               if other != name},
        }
        for name, ms in decode.items()
    ]  # fmt: skip
    settings = {"threads": 1, "prompt_len": 64, "rounds": 7}
    return {"kind": "onnx", "settings": settings, "rows": rows, "machine": {"cpu": "a CPU"}}


def models_record(
    tpot: dict[str, float],
    concurrency: tuple[int, ...] = (1,),
    invalid: dict[str, str] | None = None,
) -> dict[str, Any]:
    invalid = invalid or {}
    base = next(iter(tpot))
    rows = []
    for width in concurrency:
        for side, ms in tpot.items():
            metrics = {f"{key}_ms_{word}": spread(ms * width * scale)
                       for key in ("ttft", "tpot", "itl", "e2e")
                       for word, scale in (("p50", 1), ("p90", 1.5), ("p99", 2))}  # fmt: skip
            row = {
                "load": {"concurrency": width, "request_rate": None},
                "side": side,
                "valid": side not in invalid,
                "metrics": metrics | {"output_tok_s": spread(1e3 * width / ms)},
            }
            if side != base and not invalid:
                ratio = {"median": tpot[base] / ms, "low": 0.9 * tpot[base] / ms,
                         "high": 1.1 * tpot[base] / ms}  # fmt: skip
                row["ratio"] = {"tpot_ms_p50": ratio, "output_tok_s": ratio}
            rows.append(row)
    return {
        "kind": "bench models",
        "valid": not invalid,
        "reasons": [f"{side}: {reason}" for side, reason in invalid.items()],
        "settings": SETTINGS,
        "baseline": base,
        "sides": [{"name": side, "engine": "vllm"} for side in tpot],
        "loads": [{"concurrency": width, "request_rate": None} for width in concurrency],
        "rows": rows,
        "provenance": {"device": "a CPU"},
    }


def spread(value: float) -> dict[str, float]:
    return {"median": value, "min": 0.95 * value, "max": 1.05 * value}
