"""Figures of a record as plain rows, to stand beside another's; one reader for each kind.

A reader gives "protocol" where figures compare only under equal conditions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gblm.errors import DAMAGE, InputError, damage
from gblm.folder import read_json_object

Record = dict[str, Any]
Figures = dict[str, Any]
SETTINGS = ("num_prompts", "input_len", "output_len", "seed", "tool", "threads", "slo", "options")


def read_record(path: Path, known: str | None = None) -> tuple[str, Figures]:
    """The kind and the figures of a record file.

    Args:
        path: of the file.
        known: its kind where the place of the file tells it.

    Raises:
        InputError: it is no record, is damaged, or is of a kind that cannot be compared.
    """
    record = read_json_object(path)
    kind = known or str(record.get("kind"))[:40]
    if kind == "bench watch":
        raise InputError(
            f"{path} compares two servers already, under the traffic of its own time; figures of "
            "two such records do not compare."
        )
    if kind not in KINDS:
        raise InputError(
            f"{path}: a record of kind {kind!r} cannot be compared; give two of one kind: "
            f"{', '.join(KINDS)}."
        )
    try:
        return kind, KINDS[kind](record)
    except DAMAGE as error:
        raise InputError(
            f"{path}: is not a record of kind {kind!r} as gblm writes it: {damage(error)}."
        ) from error


def evaluation(record: Record) -> Figures:
    """`gblm eval --output`."""
    facts: Figures = dict(record.get("size") or {})
    protocol = []
    for row in record["texts"]:
        protocol.append(f"{row['protocol']}, tokens {row['tokens_sha256'][:12]}")
        facts[f"perplexity, {row['text']}"] = row["perplexity"]
        facts |= {f"drift {key}, {row['text']}": v for key, v in row.get("drift", {}).items()}
    if tasks := record.get("tasks"):
        protocol.append(tasks["protocol"])
        for task, metrics in tasks["results"].items():
            facts |= {f"{name}, {task}": row["value"] for name, row in metrics.items()}
    return facts | {"protocol": "; ".join(protocol)}


def search(record: Record) -> Figures:
    """search.json of `gblm search`."""
    base = record["baseline"]
    facts = {"perplexity, unpruned": base["perplexity"]}
    for name, row in record["measured"].items():
        for key in ("perplexity", "bits_per_weight", "bytes"):
            facts[f"{key}, {name}"] = row[key]
    return facts | {"protocol": f"{base['protocol']}, tokens {base['tokens_sha256'][:12]}"}


def serving(record: Record) -> Figures:
    """`gblm bench serving`: medians of the model."""
    facts = {name: row["model"] for name, row in record["summary"].items()}
    return facts | {"protocol": f"{_settings(record['load'])}; {record['provenance']['device']}"}


def models(record: Record) -> Figures:
    """`gblm bench models`: medians by side and load; of an invalid one nothing but that."""
    settings = {key: record["settings"][key] for key in SETTINGS}
    facts: Figures = {}
    for row in record["rows"]:
        load = ", ".join(f"{key} {v}" for key, v in row["load"].items() if v is not None)
        where = ", ".join(filter(None, (row["side"], load)))
        if row["valid"] is not True:
            facts[where] = "INVALID"
            continue
        facts |= {f"{name}, {where}": one["median"] for name, one in row["metrics"].items()}
    engines = ", ".join(f"{side['name']} in {side['engine']}" for side in record["sides"])
    return facts | {
        "protocol": f"{_settings(settings)}; {engines}; {record['provenance']['device']}"
    }


def onnx(record: Record) -> Figures:
    """`gblm bench onnx`: by folder; the name is left out of a record of one folder."""
    facts: Figures = {}
    for row in record["rows"]:
        where = f", {row['name']}" if len(record["rows"]) > 1 else ""
        facts |= {f"{key}{where}": row[key] for key in ("file_bytes", "memory_bytes", "load_s")}
        facts |= {f"{key}{where}": row[key]["median"] for key in ("prefill_ms", "decode_ms")}
    machine = f"{record['clock']}; {record['machine']['cpu']}"
    return facts | {"protocol": f"{_settings(record['settings'])}; {machine}"}


def onnx_export(record: Record) -> Figures:
    """onnx_report.json of `gblm export onnx`: sizes, zeros and the validation."""
    facts: Figures = {key: record[key] for key in ("target", "precision", "sparse", "bytes_total")}
    facts["packed linears"] = len(record["linears"])
    if rows := record["weights"]:
        weights = sum(math.prod(row["shape"]) for row in rows)
        facts["sparsity"] = round(sum(row["zeros"] for row in rows) / weights, 6)
    if found := record.get("validation"):
        # Over another number of tokens it is another figure.
        where = f"{found['tokens']} tokens after {found['prompt_tokens']}"
        for key in ("max_logit_difference_over_std", "top1_agreement", "equal_greedy_tokens"):
            facts[f"{key}, {where}"] = found[key]
        facts["validation"] = "passed" if found["passed"] else "FAILED"
    return facts


def kernels(record: Record) -> Figures:
    """`gblm bench kernels`: microseconds of a call."""
    facts: Figures = {"instruction set": record["kernels"]["instruction_set"]}
    for case in record["cases"]:
        shape = "×".join(map(str, case["shape"]))
        for row in case["rows"]:
            facts[f"µs, {row['linear']}, {shape}, {case['tokens']} tokens"] = row["us"]
    own = {key: record["kernels"][key] for key in ("threads", "clock", "cold_bytes")}
    return facts | {"protocol": f"{_settings(own)}; {record['provenance']['device']}"}


def gpu_check(record: Record) -> Figures:
    """`gblm doctor --gpu-check`: its lines, microseconds of a call, tokens/s of the decode loop."""
    facts: Figures = {line["line"]: line["value"] for line in record["lines"]}
    for row in record["sections"]["times"]["rows"]:
        name = " ".join(filter(None, (row["contender"], row["spec"])))
        facts[f"µs, {name}, {row['label']}, {row['tokens']} tokens"] = row["us"]
    for row in record["sections"]["decode"]["rows"]:
        name = " ".join(filter(None, (row["contender"], row["spec"])))
        facts[f"tokens/s, {name}, batch {row['batch']}"] = row["tokens_per_second"]
    return facts | {"protocol": f"gpu check; {record['provenance']['device']}"}


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(values.items()))


KINDS: dict[str, Callable[[Record], Figures]] = {
    "evaluation": evaluation,
    "search": search,
    "bench serving": serving,
    "bench models": models,
    "onnx": onnx,
    "bench kernels": kernels,
    "onnx export": onnx_export,
    "gpu check": gpu_check,
}
