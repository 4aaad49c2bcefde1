"""What a report takes from records of speed, but those of `gblm bench models`."""

from __future__ import annotations

from gblm.report.axes import number
from gblm.report.facts import (
    Curve,
    Facts,
    Ratio,
    Record,
    Speed,
    device,
    finite,
    model,
    spread,
    words,
)
from gblm.report.models import LATENCIES, QUANTILES


def onnx(record: Record) -> Facts:
    """`gblm bench onnx`: decoding in ONNX Runtime."""
    settings = record["settings"]
    setting = (
        f"ONNX Runtime, {settings['threads']} threads, {settings['prompt_len']} tokens before, "
        f"{settings['rounds']} rounds, {device(record)}"
    )
    facts = Facts()
    base = words(record["rows"][0]["name"])
    for row in record["rows"]:
        name, decode = words(row["name"]), row["decode_ms"]
        facts.speeds.append(Speed(name, setting, *spread(decode)))
        if base in row["decode_speedup"]:
            facts.ratios.append(Ratio(name, f"{setting}; beside {base}", "decoding",
                                      *spread(row["decode_speedup"][base])))  # fmt: skip
    return facts


def serving(record: Record) -> Facts:
    """`gblm bench serving` of two models: medians of rounds."""
    load, names = record["load"], {s: model(record[s]) for s in ("model", "baseline")}
    setting = (
        f"vLLM, {load['num_prompts']} prompts of {load['input_len']} + {load['output_len']} "
        f"tokens, concurrency {load['concurrency']}, {load['rounds']} rounds, packed weights on "
        f"{words(record.get('backend_used', 'an unknown backend'))}, {device(record)}"
    )
    facts = Facts()
    for side, name in names.items():
        own = sorted(finite(run["tpot_ms"]) for run in record["runs"] if run["side"] == side)
        middle = finite(record["summary"]["tpot_ms"][side])
        facts.speeds.append(Speed(name, setting, middle, own[0], own[-1]))
    for metric, row in record["summary"].items():
        ends = (finite(row[key]) for key in ("ratio", "ratio_min", "ratio_max"))
        facts.ratios.append(Ratio(names["model"], f"{setting}; beside {names['baseline']}",
                                  words(metric), *ends))  # fmt: skip
    return facts


def kernels(record: Record) -> Facts:
    """`gblm bench kernels`: microseconds of a call against the number of tokens."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for case in record["cases"]:
        shape = "×".join(str(int(finite(n))) for n in case["shape"])
        for row in case["rows"]:
            where = lines.setdefault((shape, words(row["linear"])), [])
            where.append((finite(case["tokens"]), finite(row["us"])))
    curves = []
    for (shape, name), points in lines.items():
        chart = f"Kernels, {shape}, {device(record)}"
        curves.append(
            Curve(chart, name, "tokens at once", "µs per call", tuple(sorted(points)), "xy")
        )
    return Facts(curves=curves)


def watch(record: Record) -> Facts:
    """`gblm bench watch`: the candidate's figures over those of the server beside it."""
    sides = {key: words(record[key]).removesuffix("/metrics") for key in ("a", "b")}
    window = record["window"]
    setting = (
        f"live traffic, {number(finite(window['duration']))} s, {window['valid']} of "
        f"{window['intervals']} intervals, means, 95 % confidence; beside {sides['a']}"
    )
    facts = Facts(notes=[f"{sides['b']}: {words(text)}"
                         for text in (*record["caveats"], *record["problems"])])  # fmt: skip
    for key, label in LATENCIES.items():
        row = record["metrics"][key]
        if row["ratio"] is not None:
            # The record says how many times faster; here less is better, as in other records.
            ends = (1 / finite(row[end]) for end in ("ratio", "high", "low"))
            facts.ratios.append(Ratio(sides["b"], setting, label, *ends))
        facts.curves += _watched(row, label, sides, setting)
    row = record["metrics"]["throughput"]
    if row["ratio"] is not None:
        facts.ratios.append(Ratio(sides["b"], setting, "generated_tok_s", *_ends(row)))
    return facts


def _ends(row: Record) -> tuple[float, float, float]:
    return finite(row["ratio"]), finite(row["low"]), finite(row["high"])


def _watched(row: Record, label: str, sides: dict[str, str], setting: str) -> list[Curve]:
    """A latency over its quantiles; those beyond the last bucket have no value."""
    curves = []
    for side, name in sides.items():
        values = {share: (row[side].get(word) or {}).get("value")
                  for word, share in QUANTILES.items()}  # fmt: skip
        points = tuple((share, 1e3 * finite(v)) for share, v in values.items() if v is not None)
        if len(points) > 1:
            chart = f"{label}, {setting}"
            curves.append(Curve(chart, name, "percentile of requests", f"{label}, ms", points))
    return curves
