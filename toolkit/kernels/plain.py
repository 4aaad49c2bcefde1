"""Backends in plain PyTorch: `reference` expands the weight at every call, `dense` once at load."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gblm.kernels.base import Backend
from gblm.sparse.formats import Format, Parts, Shape

# Bounds the scratch memory; smaller pieces cost more calls (docs/log.md).
CHUNK_WEIGHTS = 1 << 18


class Reference(Backend):
    """Expands the packed weight at every call, so it is slow: the oracle of every other backend."""

    name = "reference"
    packed = True

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """Keep the disk layout as it is."""
        return [parts[name].contiguous() for name in fmt.parts]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """Expand and multiply a bounded number of rows at a time, and forget them."""
        parts = dict(zip(fmt.parts, prepared, strict=True))
        num_rows, columns = shape
        step = max(1, CHUNK_WEIGHTS // columns)
        out = x.new_empty((*x.shape[:-1], num_rows))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            dense = fmt.expand(fmt.rows(parts, start, stop), x.dtype)
            out[..., start:stop] = functional.linear(x, dense)
        return out


class Dense(Backend):
    """Keeps the dense-with-zeros weight in memory, so that a model is small on disk only."""

    name = "dense"
    packed = False

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """Expand the parts to the dense weight [out, in]."""
        return [fmt.expand(parts, dtype)]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """Multiply densely, by PyTorch."""
        return functional.linear(x, prepared[0])
