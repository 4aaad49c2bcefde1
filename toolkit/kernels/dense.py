"""dense: expand the packed weight once, at load, for the speed and the memory of a dense model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gblm.kernels.base import Backend
from gblm.sparse.formats import Format, Parts, Shape


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
