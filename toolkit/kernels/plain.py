"""Backends in plain PyTorch: `reference` expands the weight at every call, `dense` once at load."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gblm.kernels.base import Backend
from gblm.sparse.formats import Format, Parts, Shape
from gblm.sparse.passes import row_blocks


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
        out = x.new_empty((*x.shape[:-1], shape[0]))
        for rows in row_blocks(shape):
            dense = fmt.expand(fmt.rows(parts, rows.start, rows.stop), x.dtype)
            out[..., rows] = functional.linear(x, dense)
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
