"""reference: expand the packed weight, multiply, forget it. The oracle for every other backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gblm.formats import Format, Parts, Shape
from gblm.kernels.base import Backend


class Reference(Backend):
    """Packed in memory; expands the whole weight in plain PyTorch at every call, so it is slow."""

    name = "reference"
    packed = True

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Never."""
        return None

    def prepare(self, fmt: Format, parts: Parts, shape: Shape) -> list[Tensor]:
        """The disk layout as it is."""
        return [parts[name].contiguous() for name in fmt.parts]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """Expand and multiply."""
        parts = dict(zip(fmt.parts, prepared, strict=True))
        return functional.linear(x, fmt.expand(parts, shape))
