"""What a report takes from `gblm bench models`: any number of models under any number of loads."""

from __future__ import annotations

from typing import Any

from gblm.report.axes import number
from gblm.report.facts import (
    Curve,
    Facts,
    Measures,
    Ratio,
    Record,
    Speed,
    device,
    finite,
    spread,
    words,
)

# Metric of a run → its label, for the charts of a sweep.
SWEPT = {
    "ttft_ms_p50": "TTFT p50, ms",
    "ttft_ms_p99": "TTFT p99, ms",
    "tpot_ms_p50": "TPOT p50, ms",
    "itl_ms_p99": "ITL p99, ms",
    "output_tok_s": "output, tokens/s",
    "goodput_requests_per_s": "goodput, requests/s",
}
# Metric of a run → its heading, in the table of a load.
MEASURED = {
    "ttft_ms_p50": "TTFT p50, ms",
    "ttft_ms_p99": "TTFT p99, ms",
    "tpot_ms_p50": "TPOT p50, ms",
    "tpot_ms_p99": "TPOT p99, ms",
    "e2e_ms_p50": "E2E p50, ms",
    "e2e_ms_p99": "E2E p99, ms",
    "requests_per_s": "requests/s",
    "output_tok_s": "output tokens/s",
    "total_tok_s": "total tokens/s",
    "tok_s_per_user": "tokens/s/user",
    "goodput_requests_per_s": "goodput, requests/s",
    "memory_mb": "MB",
    "peak_memory_mb": "peak MB",
    "load_s": "load, s",
    "joules_per_token": "J/token",
}
QUANTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0}
LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "end to end"}


def models(record: Record) -> Facts:
    """Speeds and ratios of the valid rows, curves over a sweep or over quantiles, and why not."""
    facts = Facts()
    names = " and ".join(words(side["name"]) for side in record["sides"])
    facts.invalid += [f"{names}: {words(reason)}" for reason in record["reasons"]]
    facts.notes += [f"{names}: {words(caveat)}" for caveat in record.get("caveats", [])]
    rows = [row for row in record["rows"] if row["valid"] is True]
    for row in rows:
        setting = setting_line(record, row["load"])
        name, found = words(row["side"]), row["metrics"]
        known = {label: finite(found[metric]["median"])
                 for metric, label in MEASURED.items() if metric in found}  # fmt: skip
        facts.measures.append(Measures(name, setting, known))
        if "tpot_ms_p50" in found:
            facts.speeds.append(Speed(name, setting, *spread(found["tpot_ms_p50"])))
        for metric, ratio in row.get("ratio", {}).items():
            ends = (finite(ratio[key]) for key in ("median", "low", "high"))
            beside = f"{setting}; beside {words(record['baseline'])}"
            facts.ratios.append(Ratio(name, beside, words(metric), *ends))
    facts.curves += _sweep(record, rows) if len(record["loads"]) > 1 else _quantiles(record, rows)
    return facts


def setting_line(record: Record, load: Record) -> str:
    """One load in words, with what ran it and the machine."""
    settings = record["settings"]
    rate = load.get("request_rate")
    # Figures of a bare loop and of a server never share a chart.
    engines = dict.fromkeys(words(side["engine"]) for side in record["sides"])
    how = " and ".join(f"vllm ({settings['tool']})" if e == "vllm" else e for e in engines)
    arrival = "" if rate is None else f", {number(finite(rate))} requests/s"
    return (
        f"{settings['num_prompts']} prompts of {settings['input_len']} + {settings['output_len']} "
        f"tokens, concurrency {load.get('concurrency') or 'unbounded'}{arrival}, "
        f"{settings['rounds']} rounds, {how}, {device(record)}"
    )


def _sweep(record: Record, rows: list[dict[str, Any]]) -> list[Curve]:
    """A chart for each metric over request rate or concurrency."""
    rated = any(row["load"].get("request_rate") is not None for row in rows)
    key, x = ("request_rate", "requests/s asked") if rated else ("concurrency", "concurrency")
    curves = []
    for metric, y in SWEPT.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if metric in row["metrics"] and row["load"].get(key) is not None:
                point = (finite(row["load"][key]), finite(row["metrics"][metric]["median"]))
                lines.setdefault(words(row["side"]), []).append(point)
        chart = f"{y}, {setting_line(record, {})}"
        curves += [
            Curve(chart, name, x, y, tuple(sorted(points))) for name, points in lines.items()
        ]
    return curves


def _quantiles(record: Record, rows: list[dict[str, Any]]) -> list[Curve]:
    """A chart for each latency over its quantiles, where one load was measured."""
    curves = []
    for row in rows:
        for key, label in LATENCIES.items():
            points = [
                (share, finite(row["metrics"][f"{key}_ms_{word}"]["median"]))
                for word, share in QUANTILES.items()
                if f"{key}_ms_{word}" in row["metrics"]
            ]
            if len(points) > 1:
                chart = f"{label}, {setting_line(record, row['load'])}"
                y = f"{label}, ms"
                name = words(row["side"])
                curves.append(Curve(chart, name, "percentile of requests", y, tuple(points)))
    return curves
