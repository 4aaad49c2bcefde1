"""bitmask: any mask, as the kept values row after row, a bitmask and row offsets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gblm.errors import CheckpointError
from gblm.sparse.formats.base import Format, Parts, Shape, TensorSpec
from gblm.sparse.formats.bits import byte_offsets, pack_bits, pack_ragged, row_counts, unpack_ragged
from gblm.sparse.patterns import Pattern, Unstructured


class BitmaskFormat(Format):
    """The format stores values [kept], bitmask u8 [out, in/8], row_offsets i64 [out + 1].

    4-bit values are bytes, ceil(count/2) a row; `row_offsets` count codes all the same.
    """

    name = "bitmask"
    own_parts = ("values", "bitmask", "row_offsets")

    @classmethod
    def holds(cls, pattern: Pattern) -> bool:
        """See Format.holds: any position."""
        return isinstance(pattern, Unstructured)

    def values_shape(self, shape: Shape) -> tuple[int, ...]:
        return (-1,)

    def mask_layout(self, shape: Shape) -> dict[str, TensorSpec]:
        return {
            "bitmask": TensorSpec((shape[0], shape[1] // 8), torch.uint8),
            "row_offsets": TensorSpec((shape[0] + 1,), torch.int64),
        }

    def store(self, kept: Tensor, mask: Tensor) -> Tensor:
        if not self.values.in_nibbles:
            return kept
        return pack_ragged(kept, mask.sum(dim=1, dtype=torch.int64))

    def kept(self, parts: Parts) -> Tensor:
        """See Format.kept; [kept]."""
        if not self.values.in_nibbles:
            return parts["values"]
        return unpack_ragged(parts["values"], parts["row_offsets"].diff())

    def mask_parts(self, mask: Tensor) -> dict[str, Tensor]:
        offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int64)
        offsets[1:] = mask.sum(dim=1, dtype=torch.int64).cumsum(0)
        return {"bitmask": pack_bits(mask), "row_offsets": offsets}

    def rows(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        offsets = parts["row_offsets"]
        begins = self._begins(offsets)
        cut = {name: parts[name][start:stop] for name in self.parts}
        cut["values"] = parts["values"][int(begins[start]) : int(begins[stop])]
        cut["row_offsets"] = offsets[start : stop + 1] - offsets[start]
        return cut

    def join(self, pieces: Sequence[Parts]) -> dict[str, Tensor]:
        counts = torch.cat([parts["row_offsets"].diff() for parts in pieces])
        return super().join(pieces) | {"row_offsets": functional.pad(counts.cumsum(0), (1, 0))}

    def padding(self, parts: Parts) -> Tensor:
        counts = parts["row_offsets"].diff()
        last = byte_offsets(counts)[1:][counts % 2 == 1] - 1
        return parts["values"][last] >> 4

    def check_mask_data(self, name: str, parts: Parts, shape: Shape) -> None:
        offsets = parts["row_offsets"]
        counts = row_counts(parts["bitmask"])
        wrong = (offsets.diff() != counts).nonzero()
        if int(offsets[0]) == 0 and len(wrong):
            row = int(wrong[0])
            raise CheckpointError(
                f"{name}.row_offsets: row {row} has {int(offsets[row + 1] - offsets[row])} values, "
                f"its bitmask {int(counts[row])} bits. The file is damaged."
            )
        if int(offsets[0]) != 0 or int(self._begins(offsets)[-1]) != len(parts["values"]):
            raise CheckpointError(
                f"{name}.row_offsets: run from {int(offsets[0])} to {int(offsets[-1])}, but "
                f"`values` has {len(parts['values'])} entries. The file is damaged."
            )

    def _begins(self, offsets: Tensor) -> Tensor:
        """Tell where each row's values begin in the part `values`, and where the last one ends."""
        return byte_offsets(offsets.diff()) if self.values.in_nibbles else offsets
