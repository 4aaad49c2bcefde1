"""Rectangle: values of a format that keeps equally many in every row."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from gblm.sparse.formats.base import Format, Parts, Shape
from gblm.sparse.formats.bits import (
    pack_eights,
    pack_nibbles,
    unpack_eights,
    unpack_nibbles,
)


class RectangleFormat(Format):
    """The format stores values [out, kept per row], codes of less than 8 bits in fewer bytes."""

    @abstractmethod
    def kept_per_row(self, columns: int) -> int:
        """Count the columns of a row that are kept."""

    @abstractmethod
    def columns(self, parts: Parts) -> int:
        """Tell `in` of the weight."""

    def values_shape(self, shape: Shape) -> tuple[int, ...]:
        kept = self.kept_per_row(shape[1])
        return shape[0], -(-kept * self.values.bits // 8) if self.values.bits < 8 else kept

    def store(self, kept: Tensor, mask: Tensor) -> Tensor:
        values = kept.reshape(mask.shape[0], -1)
        if self.values.bits == 3:
            return pack_eights(values)
        return pack_nibbles(values) if self.values.in_nibbles else values

    def kept(self, parts: Parts) -> Tensor:
        """See Format.kept; [out, kept per row]."""
        values = parts["values"]
        if self.values.bits == 3:
            return unpack_eights(values)
        if not self.values.in_nibbles:
            return values
        return unpack_nibbles(values, self.kept_per_row(self.columns(parts)))

    def padding(self, parts: Parts) -> Tensor:
        odd = self.kept_per_row(self.columns(parts)) % 2
        return parts["values"][:, -1] >> 4 if odd else parts["values"][:0, 0]
