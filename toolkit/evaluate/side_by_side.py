"""Two folders or two records beside each other; figures of different protocols are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gblm.checkpoint.inspect import inspect
from gblm.errors import InputError
from gblm.folder import quant_method, read_config, read_json_object
from gblm.packed import is_packed

EVALUATION, SERVING = "evaluation", "bench serving"


def compare(a: Path, b: Path) -> dict[str, Any]:
    """What both are, row by row.

    Args:
        a: a model folder, or a record of `gblm eval` or `gblm bench serving`.
        b: another of the same kind.

    Returns:
        "a" and "b", "kind", and "rows": each with "what", "a", "b" and, for numbers, "ratio" b/a;
        "protocol" where figures have one.

    Raises:
        InputError: they are of different kinds, or their figures of different protocols.
    """
    kinds, facts = zip(*(_read(path) for path in (a, b)), strict=True)
    if kinds[0] != kinds[1]:
        raise InputError(
            f"{a} is a {kinds[0]} and {b} a {kinds[1]}: compare two folders or two records of one "
            "kind."
        )
    protocols = [one.pop("protocol", None) for one in facts]
    if protocols[0] != protocols[1]:
        raise InputError(
            f"figures of different protocols cannot be compared: {a} is {protocols[0]!r}, {b} is "
            f"{protocols[1]!r}. Measure one of them again."
        )
    names = [*facts[0], *(name for name in facts[1] if name not in facts[0])]
    rows = [_row(name, facts[0].get(name), facts[1].get(name)) for name in names]
    found = {"a": str(a), "b": str(b), "kind": kinds[0], "rows": rows}
    return found | ({"protocol": protocols[0]} if protocols[0] else {})


def _row(name: str, a: Any, b: Any) -> dict[str, Any]:
    row = {"what": name, "a": a, "b": b}
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (a, b))
    return row | ({"ratio": b / a} if numbers and a else {})


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    if path.is_dir():
        return "folder", size_facts(path)
    record = read_json_object(path)
    kind = record.get("kind")
    if kind == EVALUATION:
        return str(kind), _evaluation(record)
    if kind == SERVING:
        return str(kind), _serving(record)
    raise InputError(
        f"{path}: a record of kind {kind!r} cannot be compared; give those of `gblm eval` or "
        "`gblm bench serving`."
    )


def size_facts(folder: Path) -> dict[str, Any]:
    """Bytes, sparsity of the pruned linears and value types; of weights in others' formats less."""
    method = quant_method(read_config(folder))
    if method is not None and not is_packed(folder):
        files = (path.stat().st_size for path in folder.glob("*.safetensors"))
        return {"bytes": sum(files), "values": method}
    facts = inspect(folder)
    if facts["kind"] == "dense":
        return {"bytes": facts["bytes"], "sparsity": facts["sparsity"], "values": "dense"}
    groups = facts["groups"]
    weights = sum(group["weights"] for group in groups)
    kept = sum(group["kept"] for group in groups)
    return {
        "bytes": facts["bytes"],
        "sparsity": round(1 - kept / weights, 6),
        "values": ", ".join(f"{group['pattern']} {group['dtype']}" for group in groups),
        "bits per weight": round(8 * sum(group["bytes"] for group in groups) / weights, 4),
    }


def _evaluation(record: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = dict(record.get("size") or {})
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


def _serving(record: dict[str, Any]) -> dict[str, Any]:
    load, device = record["load"], record["provenance"]["device"]
    settings = ", ".join(f"{key} {value}" for key, value in sorted(load.items()))
    facts = {name: row["model"] for name, row in record["summary"].items()}
    return facts | {"protocol": f"{settings}; {device}"}
