"""nm: N:M sparse weights as a rectangle of values and a bitmask.

Cutting or joining the parts along either dimension equals packing the cut or joined weight, so
fused projections and tensor parallelism need nothing of this format but `narrow` and `cat`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gblm.errors import CheckpointError
from gblm.sparse.formats.base import Parts, Shape, TensorSpec
from gblm.sparse.formats.bits import pack_bits
from gblm.sparse.formats.rectangle import RectangleFormat
from gblm.sparse.patterns import NM, Pattern, first_wrong


class NMFormat(RectangleFormat):
    """The format stores values [out, in·N/M] and a bitmask u8 [out, in/8], N bits per M columns.

    Of 8:16, 3 to 5 in each half.
    """

    name = "nm"
    own_parts = ("values", "bitmask")
    pattern: NM

    @classmethod
    def holds(cls, pattern: Pattern) -> bool:
        """See Format.holds: N:M."""
        return isinstance(pattern, NM)

    def kept_per_row(self, columns: int) -> int:
        return columns // self.pattern.group_m * self.pattern.keep_n

    def columns(self, parts: Parts) -> int:
        return 8 * parts["bitmask"].shape[1]

    def mask_layout(self, shape: Shape) -> dict[str, TensorSpec]:
        return {"bitmask": TensorSpec((shape[0], shape[1] // 8), torch.uint8)}

    def stored_mask(self, mask: Tensor) -> Tensor:
        """See Format.stored_mask; groups with fewer than N kept keep zeros, lowest first.

        The first half of a group of 8:16 is full at 5.
        """
        if int(mask.count_nonzero()) == mask.shape[0] * self.kept_per_row(mask.shape[1]):
            return mask
        size, unit = self.pattern.group_m, self.pattern.unit
        units = mask.reshape(mask.shape[0], -1, size // unit, unit)
        counts = units.sum(dim=-1, dtype=torch.int32)
        missing = self._filled(counts) - counts
        free = (~units).cumsum(dim=-1, dtype=torch.int32)
        return (units | (free <= missing.unsqueeze(-1))).reshape(mask.shape)

    def _filled(self, counts: Tensor) -> Tensor:
        """Tell what units of these counts [out, groups, units of a group] keep when N are kept."""
        keep_n = self.pattern.keep_n
        if counts.shape[-1] == 1:
            return torch.full_like(counts, keep_n)
        first = (keep_n - counts[..., 1]).clamp(max=self.pattern.unit_most)
        return torch.stack((first, keep_n - first), dim=-1)

    def mask_parts(self, mask: Tensor) -> dict[str, Tensor]:
        return {"bitmask": pack_bits(mask)}

    def check_mask_data(self, name: str, parts: Parts, shape: Shape) -> None:
        pattern = self.pattern
        mask, exactly = self.mask(parts), pattern.keep_n
        if found := first_wrong(mask, pattern.group_m, most=exactly, least=exactly):
            row, col, count = found
            raise CheckpointError(
                f"{name}.bitmask: row {row}, columns {col}.. keep {count} weights; {pattern} "
                f"stores exactly {exactly}. The file is damaged."
            )
        if pattern.unit == pattern.group_m:
            return
        if found := first_wrong(mask, pattern.unit, pattern.unit_most):
            row, col, count = found
            raise CheckpointError(
                f"{name}.bitmask: row {row}, columns {col}..{col + pattern.unit - 1} keep {count} "
                f"weights; {pattern} keeps {pattern.keep_n - pattern.unit_most} to "
                f"{pattern.unit_most} in each half of a group. The file is damaged."
            )
