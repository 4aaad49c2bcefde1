"""SparseWeight: what a pruning method hands over and a format stores without loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseWeight:
    """A weight and the mask of the positions that stay.

    Attributes:
        weight: [out, in] floating point, zero wherever `mask` is False. A kept weight may be
            zero too.
        mask: [out, in] bool, True = kept.
    """

    weight: Tensor
    mask: Tensor

    @classmethod
    def cut(cls, weight: Tensor, mask: Tensor) -> SparseWeight:
        """Zero what the mask drops; the kept values stay bit for bit."""
        return cls(torch.where(mask, weight, torch.zeros_like(weight)), mask)

    @classmethod
    def from_zeros(cls, weight: Tensor) -> SparseWeight:
        """Read the mask off a dense weight: every non-zero is kept (−0.0 counts as zero)."""
        return cls.cut(weight, weight != 0)

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> SparseWeight:
        """The same weight in another dtype, on another device."""
        return SparseWeight(self.weight.to(device, dtype), self.mask.to(device))
