"""cpu: compiled kernels that read packed weights at the speed of memory (csrc/).

One token reads every kept weight once; up to 16 share what is expanded in registers; more share
what is expanded into cache. Integer weights meet activations that are rounded to int8, one scale
per token and group. Codes with zero points are kept as int8: the code less its zero point; fp8 is
for GPUs, and its products with the scales are kept as bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gblm.formats import Format, Parts, Shape
from gblm.formats.nibbles import byte_offsets
from gblm.kernels import native
from gblm.kernels.base import Backend

COLUMN_UNIT = {"float": 8, "int8": 32, "int4": 32, "uint4": 32, "fp8": 8}

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

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Refuse other devices, other dtypes, and columns that do not fill its blocks."""
        unit = COLUMN_UNIT[fmt.values.kind]
        if device.type != "cpu":
            return f"it runs on CPU, not on {device.type}"
        if dtype != torch.bfloat16:
            return f"activations must be bfloat16, not {str(dtype).removeprefix('torch.')}"
        if shape[1] % unit:
            return f"{shape[1]} columns are not a multiple of {unit}"
        whole_rows = fmt.values.is_float or fmt.values.is_fp8
        group = 0 if whole_rows else fmt.values.group(shape[1])
        if group % COLUMN_UNIT["int8"]:
            return f"groups of {group} columns are not a multiple of {COLUMN_UNIT['int8']}"
        return native.refusal()

    def holds(self, fmt: Format) -> str | None:
        """Say that fp8 values become bfloat16."""
        return "fp8 values as bfloat16, rounded once" if fmt.values.is_fp8 else None

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """Make panels, as one tensor of bytes."""
        values, data, starts = _stored(fmt, parts, shape[0])
        source = native.Source(
            shape=shape,
            values=values,
            mask=native.DENSE if fmt.name == "dense" else MASKS.get(str(fmt.pattern), native.ANY),
            data=data,
            starts=starts,
            bitmask=parts.get("bitmask"),
            scales=None if values == "float" else parts.get("scales"),
        )
        return [native.prepare(source)]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """Call the operator of csrc/linear.cpp."""
        out: Tensor = torch.ops.gblm.cpu_linear.default(x.contiguous(), prepared[0], shape[0])
        return out


def _stored(fmt: Format, parts: Parts, rows: int) -> tuple[str, Tensor, Tensor]:
    """Give the kind of values for the kernels, the values, and each row's first byte [out + 1]."""
    if not (fmt.values.has_zeros or fmt.values.is_fp8):
        return fmt.values.kind, parts["values"], _row_starts(fmt, parts, rows)
    mask = fmt.mask(parts)
    starts = functional.pad(mask.sum(dim=1).cumsum(0), (1, 0))
    if fmt.values.is_fp8:
        return "float", fmt.expand(parts, torch.bfloat16)[mask], starts * torch.bfloat16.itemsize
    # No kernel subtracts zero points: a difference of 4-bit codes has five bits, and is an int8.
    return "int8", fmt.scatter(parts)[mask], starts


def _row_starts(fmt: Format, parts: Parts, rows: int) -> Tensor:
    """Give the first byte of each row in the part "values": [out + 1] int64."""
    values = parts["values"]
    if "row_offsets" not in parts:
        return torch.arange(rows + 1) * (values.shape[1] * values.element_size())
    offsets = parts["row_offsets"]
    if fmt.values.in_nibbles:
        return byte_offsets(offsets.diff())
    return offsets * values.element_size()
