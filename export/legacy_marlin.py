"""marlin-24 of compressed-tensors, read back: a kernel's layout, taken apart into codes and a mask.

The library could only write it. Every reordering is a permutation of the bits of row and column
numbers, so each is undone by one reshape and one permute. Knows no folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gblm.errors import CheckpointError
from gblm.formats import Headers

MARLIN = "marlin-24"
# The codes of 16 inputs and 64 outputs in the order of their words: what their numbers are made of;
# and, per code size, the order of the same digits in an input-major matrix.
TILE = (4, 2, 4, 4, 2, 2, 2)
ORDER = {4: (0, 8, 4, 6, 1, 2, 3, 7, 5), 8: (0, 8, 4, 7, 1, 2, 3, 6, 5)}


@dataclass(frozen=True)
class MarlinTensor:
    """A packed weight as its headers describe it.

    Attributes:
        name: of the dense weight.
        prefix: what the names of its parts begin with.
        shape: [out, in]; out a multiple of 64, in of 32.
        bits: of a code, 4 or 8.
        groups: scales per row.
    """

    name: str
    prefix: str
    shape: tuple[int, int]
    bits: int
    groups: int
    dtype: ClassVar[torch.dtype] = torch.int8
    parts: ClassVar[tuple[str, ...]] = ("weight_packed", "scale_packed", "meta")

    @classmethod
    def of(cls, prefix: str, headers: Headers) -> MarlinTensor:
        """Hold the headers of all parts against each other.

        Raises:
            CheckpointError: they do not belong to one weight.
        """
        (words, word), (scales, scale), (meta, bit) = (headers[part] for part in cls.parts)
        kinds = (word, scale, bit) == (torch.int32, torch.float16, torch.int16)
        if kinds and len(words) == len(scales) == len(meta) == 2:
            (blocks, width), (groups, rows) = words, scales
            bits = 2 * width // rows if rows else 0
            fits = width == rows * bits // 2 and meta == (blocks, 2 * rows)
            whole = rows % 64 == 0 and blocks > 0 and groups > 0 and 32 * blocks % groups == 0
            if bits in ORDER and fits and whole:
                return cls(f"{prefix}.weight", prefix, (rows, 32 * blocks), bits, groups)
        found = ", ".join(
            f"{part} {list(headers[part][0])} {headers[part][1]}" for part in cls.parts
        )
        raise CheckpointError(f"{prefix}: {found} are no parts of one weight in {MARLIN}.")

    def dense(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Codes at their places, zero elsewhere, int8, and the mask: both [out, in].

        Raises:
            CheckpointError: a group of four does not keep two.
        """
        rows, columns = self.shape
        places = self._places(parts["meta"]).reshape(rows, -1, 2)
        codes = self._codes(parts["weight_packed"]).reshape(rows, -1, 2)
        dense = torch.zeros(rows, columns // 4, 4, dtype=torch.int8)
        mask = torch.zeros(dense.shape, dtype=torch.bool)
        dense.scatter_(2, places, codes)
        mask.scatter_(2, places, True)
        return dense.reshape(self.shape), mask.reshape(self.shape)

    def scales(self, stored: Tensor) -> Tensor:
        """[out, groups] float16, from the part `scale_packed` [groups, out]."""
        rows = self.shape[0]
        # The library reorders the scales of groups that are shorter than a row of kept weights.
        if self.groups > 2:
            stored = stored.reshape(self.groups, rows // 8, 4, 2).transpose(2, 3)
        return stored.reshape(self.groups, rows).t()

    def _codes(self, words: Tensor) -> Tensor:
        """The kept codes of every row in column order, [out, in/2] int8."""
        rows, columns = self.shape
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        codes = (words.unsqueeze(-1) >> shifts) & (2**self.bits - 1)
        tiles = codes.reshape(columns // 32, rows // 64, *TILE)
        codes = tiles.permute(ORDER[self.bits]).reshape(columns // 2, rows).t()
        return torch.sub(codes, 2 ** (self.bits - 1)).to(torch.int8)

    def _places(self, meta: Tensor) -> Tensor:
        """Which two of every four are kept, ascending, [out, in/4, 2] int64."""
        rows, columns = self.shape
        bits = meta.reshape(columns // 32, rows // 64, 2, 8, 2, 2, 2)
        words = bits.permute(1, 3, 6, 2, 4, 0, 5).reshape(rows, columns // 16, 1).to(torch.int64)
        pairs = (words >> torch.tensor([0, 4, 8, 12])) & 15
        places = torch.stack([pairs & 3, pairs >> 2], dim=-1).reshape(rows, columns // 4, 2)
        wrong = (places[..., 0] >= places[..., 1]).nonzero()
        if len(wrong):
            row, group = (int(i) for i in wrong[0])
            raise CheckpointError(
                f"{self.prefix}.meta: does not keep two of row {row}, columns {4 * group}... The "
                "file is damaged."
            )
        return places
