"""nm: N:M sparse weights as a rectangle of values and a bitmask.

Cutting or joining the parts along either dimension equals packing the cut or joined weight, so
fused projections and tensor parallelism need nothing of this format but `narrow` and `cat`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gblm.errors import CheckpointError
from gblm.formats.base import Parts, Shape, TensorSpec
from gblm.formats.bits import pack_bits
from gblm.formats.rectangle import RectangleFormat
from gblm.patterns import NM


class NMFormat(RectangleFormat):
    """values [out, in·N/M], bitmask u8 [out, in/8] with exactly N bits set per M columns."""

    name = "nm"
    own_parts = ("values", "bitmask")
    pattern: NM

    def kept_per_row(self, columns: int) -> int:
        """See RectangleFormat.kept_per_row."""
        return columns // self.pattern.group_m * self.pattern.keep_n

    def columns(self, parts: Parts) -> int:
        """See RectangleFormat.columns."""
        return 8 * parts["bitmask"].shape[1]

    def mask_layout(self, shape: Shape) -> dict[str, TensorSpec]:
        """See Format.mask_layout."""
        return {"bitmask": TensorSpec((shape[0], shape[1] // 8), torch.uint8)}

    def stored_mask(self, name: str, mask: Tensor) -> Tensor:
        """See Format.stored_mask; groups with fewer than N kept keep zeros, lowest first."""
        self.pattern.check_mask(name, mask)
        groups = mask.reshape(mask.shape[0], -1, self.pattern.group_m)
        missing = self.pattern.keep_n - groups.sum(dim=-1, keepdim=True, dtype=torch.int32)
        free = (~groups).cumsum(dim=-1, dtype=torch.int32)
        return (groups | (free <= missing)).reshape(mask.shape)

    def mask_parts(self, mask: Tensor) -> dict[str, Tensor]:
        """See Format.mask_parts."""
        return {"bitmask": pack_bits(mask)}

    def check_mask_data(self, name: str, parts: Parts, shape: Shape) -> None:
        """See Format.check_mask_data."""
        groups = self.mask(parts).reshape(shape[0], -1, self.pattern.group_m)
        counts = groups.sum(dim=-1, dtype=torch.int32)
        wrong = (counts != self.pattern.keep_n).nonzero()
        if len(wrong):
            row, group = (int(i) for i in wrong[0])
            raise CheckpointError(
                f"{name}.bitmask: row {row}, columns {group * self.pattern.group_m}.. keep "
                f"{int(counts[row, group])} weights; {self.pattern} stores exactly "
                f"{self.pattern.keep_n}. The file is damaged."
            )
