"""What sparsity_report.json says of packed weights: shape, zeros, bytes, bits; one by one, in all.

The output head stands beside the pruned weights: sparsity and bits per weight are theirs alone.
"""

from __future__ import annotations

from typing import Any

import torch

from gblm.sparse.formats import Format, Parts, Shape

# What one line of text has room for.
MAX_NAMED = 4


def weight_row(
    name: str, fmt: Format, shape: Shape, dtype: torch.dtype, zeros: int, parts: Parts
) -> dict[str, Any]:
    """One packed weight.

    Args:
        name: of the linear.
        fmt: its format.
        shape: [out, in].
        dtype: of the dense weight.
        zeros: how many of the weights are zero.
        parts: as packed.
    """
    count, size = shape[0] * shape[1], sum(t.numel() * t.element_size() for t in parts.values())
    return {
        "name": name,
        "shape": list(shape),
        "format": fmt.name,
        "pattern": str(fmt.pattern),
        **({} if fmt.values.is_float else {"values": str(fmt.values)}),
        "dtype": str(dtype).removeprefix("torch."),
        "zeros": zeros,
        "sparsity": round(zeros / count, 6),
        "bytes_dense": count * dtype.itemsize,
        "bytes_packed": size,
        "bits_per_weight": round(8 * size / count, 4),
    }


def summary(
    rows: list[dict[str, Any]], head: dict[str, Any] | None, dense: int, packed: int
) -> dict[str, Any]:
    """The whole report.

    Args:
        rows: of the pruned linears.
        head: of the output head, when it is packed.
        dense: bytes of all tensors of the source.
        packed: bytes of all tensors of the packed folder.
    """
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        way = {key: row[key] for key in ("format", "pattern", "values") if key in row}
        alike.setdefault(tuple(way.values()), []).append(row)
    return {
        **_totals(rows),
        "bytes_dense": dense,
        "bytes_packed": packed,
        "groups": [_group(own) for own in alike.values()],
        **({"head": head} if head else {}),
        "tensors": rows,
    }


def in_words(report: dict[str, Any]) -> str:
    """The patterns and value types of a report, such as "2:4, 0.5 int4:128"."""
    ways = [" ".join([g["pattern"], g.get("values", "")]).strip() for g in report["groups"]]
    if len(ways) > MAX_NAMED:
        return f"{len(ways)} patterns and value types"
    return ", ".join(ways)


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Linears that are stored alike."""
    way = {key: rows[0][key] for key in ("format", "pattern", "values") if key in rows[0]}
    return way | _totals(rows)


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    return {
        "linears": len(rows),
        "sparsity": round(sum(row["zeros"] for row in rows) / weights, 6),
        "bits_per_weight": round(8 * sum(row["bytes_packed"] for row in rows) / weights, 4),
    }
