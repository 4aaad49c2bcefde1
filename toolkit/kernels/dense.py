"""dense: expand the packed weight once, at load. The speed and the memory of a dense model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gblm.formats import Format, Parts, Shape
from gblm.kernels.base import Backend


class Dense(Backend):
    """Small on disk only; in memory the weight is the dense-with-zeros one."""

    name = "dense"
    packed = False

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Never."""
        return None

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """The dense weight [out, in]."""
        return [fmt.expand(parts, dtype)]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """A dense multiplication."""
        return functional.linear(x, prepared[0])
