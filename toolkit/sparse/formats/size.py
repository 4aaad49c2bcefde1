"""Size: how many bytes a packed weight takes, from its shape and pattern alone."""

from __future__ import annotations

from math import prod

import torch

from gblm.sparse.formats import Format, Shape
from gblm.sparse.patterns import Pattern, Scope, Unstructured


def most_bytes(fmt: Format, shape: Shape, dtype: torch.dtype, scope: Scope) -> int:
    """Give the bytes of all parts of a packed weight; exact where `is_exact` says so, else at most.

    Args:
        fmt: how it is packed.
        shape: [out, in].
        dtype: of floating values.
        scope: whether an unstructured sparsity counts zeros by row or over the matrix.
    """
    kept = _kept(fmt.pattern, shape, scope)
    if fmt.values.in_nibbles:
        # A row of 4-bit codes begins at a byte, so that each may waste half a byte.
        rows = shape[0]
        kept = rows * -(-(kept // rows) // 2) if scope == "row" else (kept + rows) // 2
    specs = fmt.layout(shape, dtype).values()
    return sum(
        prod(kept if side == -1 else side for side in spec.shape) * spec.dtype.itemsize
        for spec in specs
    )


def is_exact(fmt: Format, scope: Scope) -> bool:
    """Tell whether `most_bytes` is exact: it is not for 4-bit rows that keep different counts."""
    loose = isinstance(fmt.pattern, Unstructured) and scope == "matrix"
    return not (loose and fmt.values.in_nibbles)


def _kept(pattern: Pattern, shape: Shape, scope: Scope) -> int:
    """Count what stays when floor(sparsity · n) weights go of each row, or of the matrix."""
    rows, columns = shape if scope == "row" else (1, prod(shape))
    return rows * (columns - int(columns * pattern.sparsity))
