"""Passes over a whole weight at little cost: in blocks of rows, and without a branch for each bit.

On CPU, touching new memory takes longer than the arithmetic on it, and torch's operations on masks
guess a branch for every weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# Weights that are worked on at once: what is computed stays in the cache and in the same memory.
BLOCK = 1 << 18


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Cut the rows of a weight [out, in] into blocks of about BLOCK weights."""
    step = max(1, BLOCK // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def places(mask: Tensor) -> Tensor:
    """List where a mask of any shape is True: flat indices, int64, ascending."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero()[:, 0]


def all_finite(tensor: Tensor) -> bool:
    """Tell whether a floating tensor holds neither NaN nor Inf."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())
