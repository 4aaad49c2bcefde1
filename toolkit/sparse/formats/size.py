"""Size: how many bytes a packed weight takes, from its shape and pattern alone."""

from __future__ import annotations

from math import prod

import torch

from gblm.sparse.formats import Shape, format_for
from gblm.sparse.patterns import Pattern, Scope, Unstructured
from gblm.sparse.values import ValueType


def most_bytes(
    pattern: Pattern, values: ValueType, shape: Shape, dtype: torch.dtype, scope: Scope
) -> int:
    """Give the bytes of all parts of a packed weight; exact where `is_exact` says so, else at most.

    Args:
        pattern: which positions are kept.
        values: how they are stored, `resolve`d for the columns.
        shape: [out, in].
        dtype: of floating values.
        scope: whether an unstructured sparsity counts zeros by row or over the matrix.
    """
    fmt, kept = format_for(pattern, values), _kept(pattern, shape, scope)
    if values.in_nibbles:
        # A row of 4-bit codes begins at a byte, so that each may waste half a byte.
        rows = shape[0]
        kept = rows * -(-(kept // rows) // 2) if scope == "row" else (kept + rows) // 2
    specs = fmt.layout(shape, dtype).values()
    return sum(
        prod(kept if side == -1 else side for side in spec.shape) * spec.dtype.itemsize
        for spec in specs
    )


def is_exact(pattern: Pattern, values: ValueType, scope: Scope) -> bool:
    """Tell whether `most_bytes` is exact: it is not for 4-bit rows that keep different counts."""
    return not (isinstance(pattern, Unstructured) and values.in_nibbles and scope == "matrix")


def _kept(pattern: Pattern, shape: Shape, scope: Scope) -> int:
    """Count what stays when floor(sparsity · n) weights go of each row, or of the matrix."""
    rows, columns = shape if scope == "row" else (1, prod(shape))
    return rows * (columns - int(columns * pattern.sparsity))
