"""What a report takes from records: quality, speed, ratios, curves; as plain values.

A reader for each kind of record; the list is closed. Records may come from anywhere, so every
figure is checked to be one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Quality:
    """The perplexity of one model.

    Attributes:
        name: of the model.
        protocol: the whole line; figures of different protocols stand in different charts.
        perplexity: may be infinite.
        ratio: to the dense baseline; None if it was not measured.
        num_bytes: of all tensors; None if the record does not know.
        bits: per pruned weight, masks and scales counted; None if unknown.
        text: fingerprint of the tokens; "" if unknown.
    """

    name: str
    protocol: str
    perplexity: float
    ratio: float | None = None
    num_bytes: float | None = None
    bits: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Speed:
    """Milliseconds per token of one model under one load: median, smallest, largest round."""

    name: str
    setting: str
    median: float
    low: float
    high: float
    valid: bool = True


@dataclass(frozen=True)
class Ratio:
    """One metric beside the baseline's, paired by round."""

    name: str
    setting: str
    metric: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        chart: lines of one chart share it.
        name: of the line.
        x: label of the axis across.
        y: label of the axis upwards.
        points: (x, y).
        logs: axes that are logarithmic, as `charts.curves` takes them.
    """

    chart: str
    name: str
    x: str
    y: str
    points: tuple[tuple[float, float], ...]
    logs: str = ""


@dataclass
class Facts:
    """Everything of one or many records."""

    quality: list[Quality] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)

    def add(self, other: Facts) -> None:
        """Take over another's, each thing once."""
        for name in ("quality", "speeds", "ratios", "curves", "invalid"):
            own = getattr(self, name)
            own += [item for item in getattr(other, name) if item not in own]


def finite(value: Any) -> float:
    """A number that is one.

    Raises:
        TypeError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{str(value)[:40]!r} is not a number")
    return float(value)


def words(value: Any) -> str:
    """A piece of text, on one line.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not text")
    return " ".join(value.split())[:300]


def model(value: Any) -> str:
    """The last part of a model's folder or hub id."""
    return words(value).rstrip("/").rpartition("/")[2]


def evaluation(record: Record) -> Facts:
    """`gblm eval --output`: the model and its baseline, on each text."""
    size, name = record.get("size") or {}, model(record["model"])
    rows = []
    for found in record["texts"]:
        protocol, text = words(found["protocol"]), str(found.get("tokens_sha256", ""))
        value, ratio = found["perplexity"], found.get("ratio")
        rows.append(
            Quality(name, protocol, float(value) if value == math.inf else finite(value),
                    finite(ratio) if ratio not in (None, math.inf) else None,
                    _maybe(size, "bytes"), _maybe(size, "bits per weight"), text)
        )  # fmt: skip
        if found.get("perplexity_baseline") is not None:
            dense = finite(found["perplexity_baseline"])
            protocol = words(found["protocol_baseline"])
            rows.append(Quality(model(record["baseline"]), protocol, dense, 1.0, text=text))
    return Facts(quality=rows)


def perplexity(record: Record) -> Facts:
    """A record of benchmarks/record.py: the model, its baseline, and the report of its pruning."""
    protocol, text = words(record["protocol"]), str(record.get("tokens_sha256", ""))
    report = record.get("report", {})
    value = record["perplexity"]
    rows = [
        Quality(
            model(record["model"]),
            protocol,
            float(value) if value == math.inf else finite(value),
            finite(record["ratio"]) if record.get("ratio") not in (None, math.inf) else None,
            _maybe(report, "bytes_packed"),
            _maybe(report, "bits_per_weight"),
            text,
        )
    ]
    if record.get("perplexity_baseline") is not None:
        dense, size = finite(record["perplexity_baseline"]), _maybe(report, "bytes_dense")
        bits = 16.0 if report else None
        rows.append(Quality(model(record["baseline"]), protocol, dense, 1.0, size, bits, text))
    return Facts(quality=rows)


def budget(record: Record) -> Facts:
    """`gblm search`: measured candidates; their times are predictions, so they stay out."""
    base = record["baseline"]
    protocol, text = words(base["protocol"]), str(base.get("tokens_sha256", ""))
    rows = [Quality("unpruned", protocol, finite(base["perplexity"]), 1.0, text=text)]
    for row in record["candidates"]:
        found = row["measured"]
        rows.append(
            Quality(words(row["name"]), protocol, finite(found["perplexity"]),
                    finite(found["ratio"]), finite(found["bytes"]),
                    finite(found["bits_per_weight"]), text)
        )  # fmt: skip
    return Facts(quality=rows)


def frontier(record: Record) -> Facts:
    """benchmarks/frontier.py: perplexity by case and text."""
    rows = []
    for run in record["runs"]:
        name = f"{words(run['case'])}, {run['samples']} samples, seed {run['seed']}"
        rows += [
            Quality(name, f"{words(record['protocol'])}, {words(text)}", finite(value),
                    bits=finite(run["bits_per_weight"]))
            for text, value in run["perplexity"].items()
        ]  # fmt: skip
    return Facts(quality=rows)


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
        f"tokens, concurrency {load['concurrency']}, {load['rounds']} rounds, {device(record)}"
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


def device(record: Record) -> str:
    """The machine that a record names."""
    provenance = record.get("provenance") or record.get("machine") or {}
    return words(provenance.get("device") or provenance.get("cpu") or "unknown machine")


def _maybe(values: Record, key: str) -> float | None:
    return None if values.get(key) is None else finite(values[key])


def spread(row: Record) -> tuple[float, float, float]:
    """Median, smallest and largest."""
    return finite(row["median"]), finite(row["min"]), finite(row["max"])
