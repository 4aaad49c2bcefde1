"""What a report takes from records of quality: perplexity, drift, tasks, gates, validations."""

from __future__ import annotations

import math
from typing import Any

from gblm.report.axes import number
from gblm.report.facts import (
    Check,
    Drift,
    Facts,
    Quality,
    Record,
    Score,
    finite,
    finite_or_inf,
    maybe,
    model,
    words,
)

DRIFT = ("mean", "p99", "max", "top1", "kl_mean", "kl_p99")


def evaluation(record: Record) -> Facts:
    """`gblm eval --output`: the model and its baseline, on each text and task; the gates."""
    size, size_dense = (record.get(key) or {} for key in ("size", "size_baseline"))
    name = model(record["model"])
    facts = Facts(scores=_scores(record, name), checks=_gates(record, name))
    for found in record["texts"]:
        protocol, text = words(found["protocol"]), str(found.get("tokens_sha256", ""))
        facts.quality.append(
            Quality(name, protocol, finite_or_inf(found["perplexity"]), _ratio(found),
                    maybe(size, "bytes"), maybe(size, "bits per weight"), text)
        )  # fmt: skip
        if found.get("perplexity_baseline") is None:
            continue
        dense, beside = finite(found["perplexity_baseline"]), model(record["baseline"])
        theirs = words(found["protocol_baseline"])
        facts.quality.append(
            Quality(beside, theirs, dense, 1.0, maybe(size_dense, "bytes"), text=text)
        )
        if drift := found.get("drift"):
            figures = tuple(maybe(drift, key) for key in DRIFT)
            facts.drifts.append(Drift(name, beside, protocol, figures))
    return facts


def _scores(record: Record, name: str) -> list[Score]:
    tasks = record.get("tasks")
    if tasks is None:
        return []
    protocol, rows = words(tasks["protocol"]), []
    for task, metrics in tasks["results"].items():
        for metric, row in metrics.items():
            sides = [(name, "value", "stderr")]
            if row.get("baseline") is not None:
                sides.append((model(record["baseline"]), "baseline", "baseline_stderr"))
            rows += [
                Score(side, protocol, words(task), words(metric), finite(row[value]),
                      maybe(row, error))
                for side, value, error in sides
            ]  # fmt: skip
    return rows


def _gates(record: Record, name: str) -> list[Check]:
    return [
        Check(name, f"gate {words(row['gate'])}, decided by {words(row['of'])}",
              f"{number(maybe(row, 'value'), 4)}{words(row['unit'])}",
              f"{number(finite(row['bound']), 4)}{words(row['unit'])}", row["passed"] is True)
        for row in record.get("gates", [])
    ]  # fmt: skip


def onnx_export(record: Record) -> Facts:
    """onnx_report.json of `gblm export onnx`: the validation."""
    name = words(record["folder"]) if "folder" in record else f"export of {model(record['source'])}"
    found = record.get("validation")
    what = f"ONNX, {words(record['target'])}, {words(record['precision'])}"
    what += ", packed" if record["sparse"] is True else ""
    if found is None:
        return Facts(notes=[f"{name}: {what}: exported without validation."])
    over = f"{found['tokens']} tokens, beside {words(found['reference'])}"
    return Facts(checks=[
        Check(name, f"{what}: {label}, {over}",
              number(value, 4), "–" if bound is None else f"{sign} {number(bound, 4)}", passed)
        for label, value, bound, sign, passed in _validation(found)
    ])  # fmt: skip


def _validation(found: Record) -> list[tuple[str, float, float | None, str, bool]]:
    bounds, key = found["tolerance"], "max_logit_difference_over_std"
    largest, most = finite_or_inf(found[key]), maybe(bounds, key)
    same, least = finite(found["top1_agreement"]), finite(bounds["top1_agreement"])
    return [
        ("largest change of a logit, standard deviations", largest, most, "≤",
         most is None or largest <= most),
        ("share of the same next token", same, least, "≥", same >= least),
    ]  # fmt: skip


def perplexity(record: Record) -> Facts:
    """A record of benchmarks/record.py: the model, its baseline, and the report of its pruning."""
    protocol, text = words(record["protocol"]), str(record.get("tokens_sha256", ""))
    report = record.get("report", {})
    rows = [
        Quality(
            model(record["model"]),
            protocol,
            finite_or_inf(record["perplexity"]),
            _ratio(record),
            maybe(report, "bytes_packed"),
            maybe(report, "bits_per_weight"),
            text,
        )
    ]
    if record.get("perplexity_baseline") is not None:
        dense, size = finite(record["perplexity_baseline"]), maybe(report, "bytes_dense")
        bits = 16.0 if report else None
        rows.append(Quality(model(record["baseline"]), protocol, dense, 1.0, size, bits, text))
    return Facts(quality=rows)


def search(record: Record) -> Facts:
    """`gblm search`: measured candidates; their times are predictions, so they stay out.

    search.json holds the figures by name, what the command prints by candidate.
    """
    base = record["baseline"]
    protocol, text = words(base["protocol"]), str(base.get("tokens_sha256", ""))
    rows = [Quality("unpruned", protocol, finite(base["perplexity"]), 1.0, text=text)]
    measured: dict[str, Any] = record.get("measured") or {
        row["name"]: row["measured"] for row in record["candidates"]
    }
    for name, found in measured.items():
        rows.append(
            Quality(words(name), protocol, finite_or_inf(found["perplexity"]),
                    _ratio(found), finite(found["bytes"]),
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


def _ratio(values: Record) -> float | None:
    """To the dense baseline; None where it is unknown or endless."""
    return None if values.get("ratio") == math.inf else maybe(values, "ratio")
