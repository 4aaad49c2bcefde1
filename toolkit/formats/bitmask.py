"""bitmask: any mask, as the kept values row after row, a bitmask and row offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from gblm.errors import CheckpointError
from gblm.formats.base import Format, Parts, Shape, TensorSpec
from gblm.formats.bits import pack_bits, row_counts
from gblm.weights import SparseWeight


class BitmaskFormat(Format):
    """values [kept], bitmask u8 [out, in/8], row_offsets i64 [out + 1]."""

    name = "bitmask"
    parts = ("values", "bitmask", "row_offsets")

    def layout(self, shape: Shape, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """See Format.layout."""
        rows, columns = shape
        return {
            "values": TensorSpec((-1,), dtype),
            "bitmask": TensorSpec((rows, columns // 8), torch.uint8),
            "row_offsets": TensorSpec((rows + 1,), torch.int64),
        }

    def pack(self, name: str, weight: SparseWeight) -> dict[str, Tensor]:
        """See Format.pack."""
        self.check_shape(name, (weight.mask.shape[0], weight.mask.shape[1]))
        offsets = torch.zeros(weight.mask.shape[0] + 1, dtype=torch.int64)
        offsets[1:] = weight.mask.sum(dim=1, dtype=torch.int64).cumsum(0)
        return {
            "values": weight.weight[weight.mask] + 0.0,
            "bitmask": pack_bits(weight.mask),
            "row_offsets": offsets,
        }

    def rows(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """See Format.rows."""
        offsets = parts["row_offsets"][start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return {
            "values": parts["values"][first:last],
            "bitmask": parts["bitmask"][start:stop],
            "row_offsets": offsets - first,
        }

    def check_data(self, name: str, parts: Parts, shape: Shape) -> None:
        """See Format.check_data."""
        offsets = parts["row_offsets"]
        counts = row_counts(parts["bitmask"])
        if int(offsets[0]) != 0 or int(offsets[-1]) != parts["values"].shape[0]:
            raise CheckpointError(
                f"{name}.row_offsets: run from {int(offsets[0])} to {int(offsets[-1])}, but "
                f"{parts['values'].shape[0]} values are stored. The file is damaged."
            )
        wrong = (offsets.diff() != counts).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise CheckpointError(
                f"{name}.row_offsets: row {row} has {int(offsets[row + 1] - offsets[row])} values, "
                f"its bitmask {int(counts[row])} bits. The file is damaged."
            )
