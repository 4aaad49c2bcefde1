"""Weights and exact products for the tests of the GPU kernels."""

from __future__ import annotations

import torch

from gblm.sparse.formats import Format
from gblm.sparse.values import quantize
from gblm.sparse.weights import SparseWeight


def weight_of(fmt: Format, shape: tuple[int, int], dtype: torch.dtype) -> SparseWeight:
    """Seeded; a row of zeros, of which bitmask keeps none, and one that keeps all it may."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    drawn[0] = 0
    mask = fmt.pattern.keep(drawn.abs(), "row")
    if fmt.name == "bitmask":
        mask[0], mask[1] = False, True
    if fmt.values.is_float:
        return SparseWeight.cut(drawn.to(dtype), mask)
    return quantize(drawn, mask, fmt.values)


def product(weight: SparseWeight, x: torch.Tensor) -> torch.Tensor:
    """float64, with codes as they are, not rounded to the activations' dtype."""
    exact = weight.weight.double()
    if weight.codes is not None and weight.scales is not None:
        groups = weight.codes.double().reshape(len(exact), weight.scales.shape[1], -1)
        exact = (groups * weight.scales.double().unsqueeze(-1)).reshape(exact.shape)
    return x.double() @ exact.t()
