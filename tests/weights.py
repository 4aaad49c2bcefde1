"""Seeded weights for any format, their exact products, and those that a folder holds."""

from __future__ import annotations

from pathlib import Path

import torch

from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.sparse.formats import Format
from gblm.sparse.values import quantize
from gblm.sparse.weights import SparseWeight


def weight_of(
    fmt: Format, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> SparseWeight:
    """Draw a weight [out, in] that a format can hold, with the rows that are easy to get wrong.

    Row 0 holds zeros only. Of formats for any mask row 0 keeps nothing, row 1 everything, and row 2
    its last column alone.
    """
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn[0] = 0
    mask = fmt.pattern.keep(drawn.float().abs(), "row")
    if fmt.name == "bitmask":
        mask[0], mask[1:2], mask[2:3] = False, True, False
        mask[2:3, -1] = True
    if fmt.values.is_float:
        return SparseWeight.cut(drawn, mask)
    return quantize(drawn, mask, fmt.values)


def moved(weight: SparseWeight, by: int) -> SparseWeight:
    """Move all rows down by so many, the last to the top, so that weights are unlike each other."""
    rolled = [
        None if tensor is None else tensor.roll(by, 0)
        for tensor in (weight.weight, weight.mask, weight.codes, weight.scales)
    ]
    return SparseWeight(*rolled)


def every_code(fmt: Format, dtype: torch.dtype) -> SparseWeight:
    """Place every code of a 2:4 weight [16, 512] whose scales are one."""
    mask = torch.arange(512).remainder(4).lt(2).expand(16, 512)
    least = fmt.values.least
    placed = torch.zeros(16, 512, dtype=torch.int8)
    codes = torch.arange(256).remainder(fmt.values.limit - least + 1).add(least)
    placed[mask] = codes.repeat(16).to(torch.int8)
    return SparseWeight.from_codes(placed, torch.ones(16, 1).bfloat16(), mask, dtype)


def product(weight: SparseWeight, x: torch.Tensor) -> torch.Tensor:
    """Multiply in float64: x [tokens, in] by the weight, whose codes are not rounded to a dtype."""
    exact = weight.weight.double()
    if weight.codes is not None and weight.scales is not None:
        groups = weight.codes.double().reshape(len(exact), weight.scales.shape[1], -1)
        exact = (groups * weight.scales.double().unsqueeze(-1)).reshape(exact.shape)
    return x.double() @ exact.t()


def stored(
    folder: Path, dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[Format, SparseWeight]]:
    """Every linear of a packed folder: its format, and its weight; `dtype` as in `unpack`."""
    with PackedReader(ModelFolder.open(folder)) as packed:
        return {
            name: (linear.fmt, linear.fmt.unpack(packed.parts(name), dtype))
            for name, linear in packed.linears.items()
        }
