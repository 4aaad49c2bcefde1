"""The two bitmask layouts of compressed-tensors: one tensor read with every check.

Part names, shapes and bit order are those of compressed-tensors 0.9.4, which wrote them last; its
`sparse-24-bitmask` differs from our `nm` of 2:4, and its `sparse-bitmask` from our `bitmask`, in
names, in a part `shape` and in the row offsets only. Knows no folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gblm.errors import CheckpointError
from gblm.formats import Headers

TWO_OF_FOUR, ANY_MASK = "sparse-24-bitmask", "sparse-bitmask"
PARTS: dict[str, tuple[str, ...]] = {
    TWO_OF_FOUR: ("shape", "compressed", "bitmask"),
    ANY_MASK: ("shape", "compressed", "bitmask", "row_offsets"),
}


@dataclass(frozen=True)
class BitmaskTensor:
    """A packed tensor as its headers and its part `shape` describe it.

    Attributes:
        name: of the dense tensor, such as "model.layers.0.mlp.up_proj.weight".
        prefix: what the names of its parts begin with; versions before 0.9 kept the ".weight".
        layout: a name of PARTS.
        shape: of the dense tensor: one or two dimensions.
        dtype: of the values.
    """

    name: str
    prefix: str
    layout: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, prefix: str, layout: str, headers: Headers, shape: list[int]) -> BitmaskTensor:
        """Hold the headers of all parts against the shape.

        Args:
            prefix: what the parts' names begin with.
            layout: a name of PARTS.
            headers: shape and dtype by part.
            shape: the content of the part `shape`.

        Raises:
            CheckpointError: they do not belong to one tensor.
        """
        bits = layout == TWO_OF_FOUR
        if not 1 + bits <= len(shape) <= 2 or min(shape) < 1 or (bits and shape[1] % 4):
            raise CheckpointError(f"{prefix}.shape: {shape} is no shape of {layout}.")
        *rows, columns = shape
        want: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "bitmask": ((*rows, (columns + 7) // 8), torch.uint8),
        }
        found, dtype = headers["compressed"]
        if bits:
            want["compressed"] = ((*rows, columns // 2), dtype)
        else:
            want["row_offsets"] = (tuple(rows), torch.int64)
            fits = len(found) == 1 and found[0] <= math.prod(shape)
            want["compressed"] = (found if fits else (-1,), dtype)
        for part, header in want.items():
            if headers[part] != header:
                raise CheckpointError(
                    f"{prefix}.{part}: is {list(headers[part][0])} {headers[part][1]}, but a "
                    f"tensor of {shape} in {layout} needs {list(header[0])} {header[1]}."
                )
        weightless = prefix.rpartition(".")[2] not in ("weight", "bias")
        name = f"{prefix}.weight" if weightless else prefix
        return cls(name, prefix, layout, tuple(shape), dtype)

    @property
    def parts(self) -> tuple[str, ...]:
        """What it is stored in."""
        return PARTS[self.layout]

    def mask(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The stored positions, [rows, columns] bool; one row for one dimension.

        Raises:
            CheckpointError: bits, counts and offsets do not agree.
        """
        columns = self.shape[-1]
        packed = parts["bitmask"].reshape(-1, (columns + 7) // 8).numpy()
        bits = np.unpackbits(packed, axis=1, bitorder="little").view(np.bool_)
        if bits[:, columns:].any():
            self._damaged("bitmask", f"has bits behind column {columns - 1}")
        mask = torch.from_numpy(bits[:, :columns])
        counts = mask.sum(dim=1, dtype=torch.int64)
        if self.layout == TWO_OF_FOUR:
            wrong = (mask.reshape(len(mask), -1, 4).sum(dim=-1) != 2).nonzero()
            if len(wrong):
                row, group = (int(i) for i in wrong[0])
                self._damaged("bitmask", f"does not keep two of row {row}, columns {4 * group}..")
            return mask
        offsets = parts["row_offsets"].reshape(-1)
        wrong = (offsets != counts.cumsum(0) - counts).nonzero()
        if len(wrong):
            self._damaged("row_offsets", f"do not count the bits before row {int(wrong[0])}")
        if (kept := int(counts.sum())) != len(parts["compressed"]):
            self._damaged("compressed", f"has {len(parts['compressed'])} values for {kept} bits")
        return mask

    def dense(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The values at their places, zero elsewhere, and the mask: both [rows, columns]."""
        mask = self.mask(parts)
        dense, values = torch.zeros(mask.shape, dtype=self.dtype), parts["compressed"].reshape(-1)
        if self.dtype.itemsize == 1:  # torch does not index fp8 on CPU
            dense.view(torch.uint8)[mask] = values.view(torch.uint8)
        else:
            dense[mask] = values
        return dense, mask

    def _damaged(self, part: str, what: str) -> None:
        raise CheckpointError(f"{self.prefix}.{part}: {what}. The file is damaged.")
