"""A linear whose inputs are correlated, for tests of methods that make up for errors."""

from __future__ import annotations

import torch
from torch import Tensor

from gblm.sparse.weights import SparseWeight


def problem(rows: int, cols: int, strong: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a weight [rows, cols] and the Hessian [cols, cols] of its inputs.

    Args:
        rows: of the weight.
        cols: of the weight.
        strong: how many directions of the inputs stand out.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    mix = torch.eye(cols) + torch.randn(cols, cols, generator=generator) / cols**0.5
    inputs = torch.randn(4 * cols, cols, generator=generator) @ mix
    strongest = torch.randn(strong, cols, generator=generator)
    inputs += torch.randn(4 * cols, strong, generator=generator) @ strongest
    return weight, 2 * inputs.t() @ inputs


def output_error(weight: Tensor, found: SparseWeight, hessian: Tensor) -> float:
    """Sum (W − Q) H (W − Q)ᵀ over the rows, in float64."""
    difference = (weight - found.weight).double()
    return float((difference @ hessian.double() * difference).sum())
