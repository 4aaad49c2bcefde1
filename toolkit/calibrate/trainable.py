"""Trainable: a pruned weight as parameters that an optimiser can change, mask and format apart.

Codes are trained through their rounding: its gradient is taken to be that of the identity inside
the range of the codes (Bengio et al. 2013, arXiv 1308.3432), and that of the scales follows from
it as in LSQ (Esser et al. 2020, arXiv 1902.08153).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gblm.sparse.weights import SparseWeight

# Scales move by factors, not by differences: theirs is a unit of its own.
SCALE_RATE = 2.0


class Trainable(Protocol):
    """A weight with parameters."""

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimiser."""

    def value(self) -> Tensor:
        """[out, in] float32, differentiable, zero wherever the mask is False."""

    def result(self, start: SparseWeight) -> SparseWeight:
        """The trained weight, in the dtype and with the mask of the one that it started from."""


def trainable(weight: SparseWeight) -> Trainable:
    """Parameters for floating values, or for codes and scales."""
    return Floats(weight) if weight.codes is None else Codes(weight)


class Floats:
    """Kept values are parameters."""

    def __init__(self, start: SparseWeight) -> None:
        self._mask = start.mask
        self._weight = nn.Parameter(start.weight.detach().float().clone())

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """See Trainable."""
        return [{"params": [self._weight], "lr": learning_rate}]

    def value(self) -> Tensor:
        """See Trainable."""
        return self._weight * self._mask

    def result(self, start: SparseWeight) -> SparseWeight:
        """See Trainable."""
        return SparseWeight.cut(self._weight.detach().to(start.weight.dtype), start.mask)


class Codes:
    """Scales and, behind their rounding, values are parameters."""

    def __init__(self, start: SparseWeight) -> None:
        codes, scales = start.codes, start.scales
        if codes is None or scales is None:
            raise ValueError("this weight has no codes.")
        self._mask = start.mask
        self._scales = scales.float()
        self._group = codes.shape[1] // scales.shape[1]
        # The range of the codes that there are; a narrower one than that of their type stays.
        self._low, self._high = float(codes.min()), float(codes.max())
        self._weight = nn.Parameter(codes.float() * self._spread(self._scales))
        self._factor = nn.Parameter(torch.zeros_like(self._scales))

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """See Trainable."""
        return [
            {"params": [self._weight], "lr": learning_rate},
            {"params": [self._factor], "lr": SCALE_RATE * learning_rate},
        ]

    def value(self) -> Tensor:
        """See Trainable."""
        scales = self._spread(_through(self._current_scales()))
        codes = (self._weight / scales).clamp(self._low, self._high)
        return (codes + (codes.round() - codes).detach()) * scales * self._mask

    @torch.no_grad()
    def result(self, start: SparseWeight) -> SparseWeight:
        """See Trainable."""
        scales = self._current_scales().to(torch.bfloat16)
        codes = (self._weight / self._spread(scales.float())).clamp(self._low, self._high)
        codes = (codes.round() * self._mask).to(torch.int8)
        return SparseWeight.from_codes(codes, scales, start.mask, start.weight.dtype)

    def _current_scales(self) -> Tensor:
        """[out, groups] float32, before they are rounded to bfloat16."""
        return self._scales * self._factor.exp()

    def _spread(self, scales: Tensor) -> Tensor:
        """[out, groups] → [out, in]."""
        return scales.repeat_interleave(self._group, dim=1)


def _through(scales: Tensor) -> Tensor:
    """Rounded to bfloat16, as they are stored; with the gradient of the identity."""
    return scales + (scales.to(torch.bfloat16).float() - scales).detach()
