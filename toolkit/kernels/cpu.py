"""cpu: compiled kernels that read packed weights at the speed of memory (csrc/).

One token reads every kept weight once; up to 16 share what is expanded in registers; more share
what is expanded into cache. Integer weights meet activations that are rounded to int8, one scale
per token and group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gblm.kernels import native
from gblm.kernels.base import Backend
from gblm.sparse.formats import Format, Parts, Shape
from gblm.sparse.formats.bits import byte_offsets

# What the library calls values of so many bits.
VALUES = {16: "float", 8: "int8", 4: "int4"}
MASKS = {
    "2:4": native.FOUR_OF_EIGHT,
    "4:8": native.FOUR_OF_EIGHT,
    "8:16": native.EIGHT_OF_SIXTEEN,
}


class Cpu(Backend):
    """Holds panels of 16 packed rows and takes bfloat16 activations."""

    name = "cpu"
    packed = True
    own_op = True
    formats = ("nm", "bitmask", "dense")

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Refuse other devices, other dtypes, and columns that do not fill its blocks."""
        unit = fmt.values.column_unit
        if device.type != "cpu":
            return f"it runs on CPU, not on {device.type}"
        if dtype != torch.bfloat16:
            return f"activations must be bfloat16, not {str(dtype).removeprefix('torch.')}"
        if shape[1] % unit:
            return f"{shape[1]} columns are not a multiple of {unit}"
        group = 0 if fmt.values.is_float else fmt.values.group(shape[1])
        if group % unit:
            return f"groups of {group} columns are not a multiple of {unit}"
        return native.refusal()

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """Make panels, as one tensor of bytes."""
        source = native.Source(
            shape=shape,
            values=VALUES[fmt.values.bits],
            mask=native.DENSE if fmt.name == "dense" else MASKS.get(str(fmt.pattern), native.ANY),
            data=parts["values"],
            starts=_row_starts(fmt, parts, shape[0]),
            bitmask=parts.get("bitmask"),
            scales=parts.get("scales"),
        )
        return [native.prepare(source)]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """Call the operator of csrc/linear.cpp."""
        out: Tensor = torch.ops.gblm.cpu_linear.default(x.contiguous(), prepared[0], shape[0])
        return out


def _row_starts(fmt: Format, parts: Parts, rows: int) -> Tensor:
    """Give the first byte of each row in the part "values": [out + 1] int64."""
    values = parts["values"]
    if "row_offsets" not in parts:
        return torch.arange(rows + 1) * (values.shape[1] * values.element_size())
    offsets = parts["row_offsets"]
    if fmt.values.in_nibbles:
        return byte_offsets(offsets.diff())
    return offsets * values.element_size()
