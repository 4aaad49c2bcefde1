"""What sparsity_report.json says of packed weights: shape, zeros, bytes, bits; one by one, in all.

The output head stands beside the pruned weights: sparsity and bits per weight are theirs alone.
"""

from __future__ import annotations

from typing import Any

import torch

from gblm.formats import Format, Parts, Shape


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
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    return {
        "linears": len(rows),
        "sparsity": round(sum(row["zeros"] for row in rows) / weights, 6),
        "bits_per_weight": round(8 * sum(row["bytes_packed"] for row in rows) / weights, 4),
        "bytes_dense": dense,
        "bytes_packed": packed,
        **({"head": head} if head else {}),
        "tensors": rows,
    }
