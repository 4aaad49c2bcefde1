"""nm: N:M sparse weights as a rectangle of values and a bitmask.

Cutting or joining the parts along either dimension equals packing the cut or joined weight, so
fused projections and tensor parallelism need nothing of this format but `narrow` and `cat`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gblm.errors import CheckpointError
from gblm.formats.base import Format, Parts, Shape, TensorSpec
from gblm.formats.bits import pack_bits, unpack_bits
from gblm.patterns import NM
from gblm.weights import SparseWeight


class NMFormat(Format):
    """values [out, in·N/M], bitmask u8 [out, in/8] with exactly N bits set per M columns."""

    name = "nm"
    parts = ("values", "bitmask")
    pattern: NM

    def layout(self, shape: Shape, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """See Format.layout."""
        rows, columns = shape
        kept = columns // self.pattern.group_m * self.pattern.keep_n
        return {
            "values": TensorSpec((rows, kept), dtype),
            "bitmask": TensorSpec((rows, columns // 8), torch.uint8),
        }

    def pack(self, name: str, weight: SparseWeight) -> dict[str, Tensor]:
        """See Format.pack; groups with fewer than N kept weights keep zeros, lowest first."""
        self.check_shape(name, (weight.mask.shape[0], weight.mask.shape[1]))
        self.pattern.check_mask(name, weight.mask)
        mask = self._complete(weight.mask)
        values = weight.weight[mask].reshape(mask.shape[0], -1)
        return {"values": values + 0.0, "bitmask": pack_bits(mask)}

    def rows(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """See Format.rows."""
        return {name: parts[name][start:stop] for name in self.parts}

    def check_data(self, name: str, parts: Parts, shape: Shape) -> None:
        """See Format.check_data."""
        mask = unpack_bits(parts["bitmask"])
        counts = mask.reshape(shape[0], -1, self.pattern.group_m).sum(dim=-1, dtype=torch.int32)
        wrong = (counts != self.pattern.keep_n).nonzero()
        if len(wrong):
            row, group = (int(i) for i in wrong[0])
            raise CheckpointError(
                f"{name}.bitmask: row {row}, columns {group * self.pattern.group_m}.. keep "
                f"{int(counts[row, group])} weights; {self.pattern} stores exactly "
                f"{self.pattern.keep_n}. The file is damaged."
            )

    def _complete(self, mask: Tensor) -> Tensor:
        """Add kept zeros until every group holds exactly N."""
        groups = mask.reshape(mask.shape[0], -1, self.pattern.group_m)
        missing = self.pattern.keep_n - groups.sum(dim=-1, keepdim=True, dtype=torch.int32)
        free = (~groups).cumsum(dim=-1, dtype=torch.int32)
        return (groups | (free <= missing)).reshape(mask.shape)
