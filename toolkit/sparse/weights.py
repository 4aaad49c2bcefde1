"""SparseWeight: what a pruning method hands over and a format stores without loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gblm.sparse.passes import row_blocks


@dataclass(frozen=True)
class SparseWeight:
    """A SparseWeight is a weight and the mask of what stays; quantised, its codes and scales, too.

    Attributes:
        weight: [out, in] floating point, zero wherever `mask` is False. A kept weight may be
            zero too. With codes it is what they stand for, rounded once to its dtype.
        mask: [out, in] bool, True = kept.
        codes: [out, in] int8; a weight is code · scale; zero wherever `mask` is False. None for
            floating values.
        scales: [out, groups] bfloat16, of groups of consecutive columns; None without codes.
    """

    weight: Tensor
    mask: Tensor
    codes: Tensor | None = None
    scales: Tensor | None = None

    @classmethod
    def cut(cls, weight: Tensor, mask: Tensor) -> SparseWeight:
        """Zero what the mask drops; the kept values stay bit for bit."""
        # The bits times 0 or 1: torch.where guesses a branch for every weight.
        bits = getattr(torch, f"int{8 * weight.itemsize}")
        return cls((weight.detach().view(bits) * mask).view(weight.dtype), mask)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, mask: Tensor, dtype: torch.dtype
    ) -> SparseWeight:
        """Compute what codes and scales stand for, in a floating dtype."""
        return cls(dequantize(codes, scales, dtype), mask, codes, scales)

    @classmethod
    def cat(cls, pieces: Sequence[SparseWeight]) -> SparseWeight:
        """Join weights that have the same columns and groups, row after row."""
        codes = [piece.codes for piece in pieces if piece.codes is not None]
        scales = [piece.scales for piece in pieces if piece.scales is not None]
        return cls(
            torch.cat([piece.weight for piece in pieces]),
            torch.cat([piece.mask for piece in pieces]),
            torch.cat(codes) if codes else None,
            torch.cat(scales) if scales else None,
        )

    @property
    def zeros(self) -> int:
        """Count the weights that are zero, kept or not, whatever the dtype of `weight`."""
        values = self.weight if self.codes is None else self.codes
        return values.numel() - int(values.bool().count_nonzero())

    def narrow(self, dim: int, start: int, length: int) -> SparseWeight:
        """Copy the rows (`dim` 0) or columns (1) start ≤ i < start + length.

        Columns must be cut between groups; what belongs to a whole row goes along with every cut.
        """
        weight, mask = (t.narrow(dim, start, length).clone() for t in (self.weight, self.mask))
        if self.codes is None or self.scales is None:
            return SparseWeight(weight, mask)
        codes, num_groups = self.codes.narrow(dim, start, length).clone(), self.scales.shape[1]
        if dim == 1 and num_groups == 1:
            start, length = 0, 1
        elif dim == 1:
            size = self.codes.shape[1] // num_groups
            if start % size or length % size:
                raise ValueError(f"columns {start}..{start + length} cut groups of {size}.")
            start, length = start // size, length // size
        scales = self.scales.narrow(dim, start, length).clone()
        return SparseWeight(weight, mask, codes, scales)

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> SparseWeight:
        """Move the weight to another dtype and device; codes and their groups stay."""
        mask = self.mask.to(device)
        if self.codes is None or self.scales is None:
            return SparseWeight(self.weight.to(device, dtype), mask)
        codes, scales = self.codes.to(device), self.scales.to(device)
        if self.weight.dtype == dtype:
            return SparseWeight(self.weight.to(device), mask, codes, scales)
        return SparseWeight.from_codes(codes, scales, mask, dtype)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute what codes stand for: the exact product with the group's scale, rounded once.

    Args:
        codes: [out, in] int8.
        scales: [out, groups] bfloat16; groups divides in.
        dtype: floating point, of the result.

    Returns:
        [out, in], without −0.0.
    """
    dense = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in row_blocks(codes.shape):
        dense[rows] = dequantize_rows(codes[rows], scales[rows], dtype)
    return dense


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `dequantize` of rows [..., in] at once: torch.compile leaves their number open."""
    # A code has up to 8 significant bits, a bfloat16 scale 8: the product is exact in float32.
    product = codes.reshape(*scales.shape, -1).float().mul_(scales.float().unsqueeze(-1))
    # A small negative product may round to −0.0.
    return product.flatten(-2).to(dtype).add_(0.0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are equal in dtype, shape and every bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
