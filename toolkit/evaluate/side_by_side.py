"""Two folders or two records beside each other; figures of different protocols are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gblm.checkpoint.inspect import inspect
from gblm.errors import InputError
from gblm.evaluate.records import read_record
from gblm.evaluate.subjects import ONNX_MODEL, ONNX_REPORT
from gblm.folder import quant_method, read_config
from gblm.packed import is_packed


def compare(a: Path, b: Path) -> dict[str, Any]:
    """What both are, row by row.

    Args:
        a: a model folder, exported ones included, or a record of a kind of `records.KINDS`.
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
            f"{a} is of kind {kinds[0]!r} and {b} of kind {kinds[1]!r}: compare two folders or two "
            "records of one kind."
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
    return read_record(path)


def size_facts(folder: Path) -> dict[str, Any]:
    """Bytes, sparsity of the pruned linears and value types of a model folder.

    Of an exported one what its onnx_report.json says; of weights in others' formats less.
    """
    if (folder / ONNX_MODEL).is_file():
        return _exported(folder)
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


def _exported(folder: Path) -> dict[str, Any]:
    files = [file for file in folder.glob(f"{ONNX_MODEL}*") if file.is_file()]
    facts: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in files)}
    if (report := folder / ONNX_REPORT).is_file():
        found = read_record(report, "onnx export")[1]
        facts |= {key: found[key] for key in ("sparsity", "precision") if key in found}
    return facts
