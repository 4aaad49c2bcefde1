"""dense: every position kept. The honest control of sparse formats, through the same code."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gblm.errors import CheckpointError
from gblm.sparse.formats.base import Format, Headers, Parts, Shape, TensorSpec
from gblm.sparse.formats.bits import pack_nibbles
from gblm.sparse.formats.rectangle import RectangleFormat
from gblm.sparse.patterns import Dense, Pattern


class DenseFormat(RectangleFormat):
    """The format stores values [out, in], of 4-bit codes [out, in/2] bytes, and no mask.

    It alone stores codes of 3 bits, [out, 3·in/8] bytes.
    """

    name = "dense"
    bits = (*Format.bits, 3)
    own_parts = ("values",)

    @classmethod
    def holds(cls, pattern: Pattern) -> bool:
        """See Format.holds: nothing is dropped."""
        return isinstance(pattern, Dense)

    def kept_per_row(self, columns: int) -> int:
        return columns

    def columns(self, parts: Parts) -> int:
        """See RectangleFormat.columns; `in` is even, so there is no padding."""
        return self.values.count(parts["values"].shape[1])

    def widened(self) -> Format:
        """See Format.widened: 3-bit codes become 4-bit ones."""
        if self.values.bits in Format.bits:
            return self
        return DenseFormat(self.pattern, replace(self.values, kind="int4"))

    def widen(self, parts: Parts) -> Parts:
        """See Format.widen."""
        if self.values.bits in Format.bits:
            return parts
        return {**parts, "values": pack_nibbles(self.kept(parts))}

    def shape_of(self, name: str, headers: Headers) -> Shape:
        shape = headers["values"][0]
        if len(shape) != 2 or min(shape) < 1:
            raise CheckpointError(f"{name}.values: shape {list(shape)} is impossible.")
        return shape[0], self.values.count(shape[1])

    def mask_layout(self, shape: Shape) -> dict[str, TensorSpec]:
        return {}

    def take(self, values: Tensor, mask: Tensor) -> Tensor:
        """See Format.take; all of them."""
        return values

    def mask_parts(self, mask: Tensor) -> dict[str, Tensor]:
        return {}

    def mask(self, parts: Parts) -> Tensor:
        shape = (parts["values"].shape[0], self.columns(parts))
        return torch.ones(shape, dtype=torch.bool, device=parts["values"].device)

    def scatter(self, parts: Parts) -> Tensor:
        return self.kept(parts)

    def check_mask_data(self, name: str, parts: Parts, shape: Shape) -> None:
        """See Format.check_mask_data; there is no mask."""
