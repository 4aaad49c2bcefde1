"""Scales and zero points of groups of weights, and the rounding to their codes.

A group is some consecutive columns of one row. Codes count from the zero point of their group, so
that a weight is code · scale whether there is one or not: −limit to limit without; with a zero
point z, −z to limit − z, which is stored as 0 to limit. Codes are whole numbers, or the floats of
fp8: E4M3 of the OCP 8-bit Floating Point Specification (OFP8), revision 1.0, 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SCALE_DTYPE, ZERO_DTYPE, FP8_DTYPE = torch.bfloat16, torch.uint8, torch.float8_e4m3fn
# What the search multiplies the widest range with, best first on a tie.
SHRINK = tuple(1 - 0.02 * step for step in range(21))
# Weights that are searched at once, so that they stay in the cache.
SEARCHED = 1 << 18


class Levels(NamedTuple):
    """What the codes of groups stand for.

    Attributes:
        scales: [...] bfloat16, > 0; not finite where a group is not.
        zeros: [...] uint8, 0 to the largest code; None for symmetric codes.
    """

    scales: Tensor
    zeros: Tensor | None


@dataclass(frozen=True)
class CodeRange:
    """Which codes there are.

    Attributes:
        limit: the largest one, as stored.
        zero_point: whether each group has one; else codes are symmetric.
        fp8: whether they are floats of FP8_DTYPE, not whole numbers.
    """

    limit: int
    zero_point: bool = False
    fp8: bool = False

    def ends(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest weight of groups [..., size], over `limit`; [...] float32.

        Symmetric codes have opposite ends. With a zero point they enclose zero: it must be a code,
        for `nm` may keep zeros; and a group's zero point could not lie beyond its codes.
        """
        if not self.zero_point:
            high = groups.abs().amax(dim=-1) / self.limit
            return -high, high
        low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
        return low / self.limit, high / self.limit

    def levels(self, low: Tensor, high: Tensor) -> Levels:
        """Levels that reach from one of `ends` to the other, as they are stored."""
        if not self.zero_point:
            return Levels(_stored(high), None)
        scales = _stored(high - low)
        zeros = (-low * self.limit / scales.float()).round_().clamp_(0, self.limit)
        # A NaN has no zero point; its scale tells of it.
        return Levels(scales, zeros.nan_to_num_(0.0).to(ZERO_DTYPE))

    def round_(self, weights: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Replace float32 weights by their nearest codes.

        Args:
            weights: any shape.
            scales: float32, broadcast over `weights`.
            zeros: float32, of the same shape as `scales`; None for symmetric codes.
        """
        weights.div_(scales)
        if zeros is not None:
            return weights.round_().clamp_(-zeros, self.limit - zeros)
        weights.clamp_(-self.limit, self.limit)
        return weights.copy_(nearest(weights, fp8=True)) if self.fp8 else weights.round_()


def nearest(codes: Tensor, fp8: bool) -> Tensor:
    """The nearest codes of floats that lie between the least and the largest, ties to even.

    Args:
        codes: float32, any shape.
        fp8: whether codes are floats of FP8_DTYPE, not whole numbers.
    """
    return codes.to(FP8_DTYPE).float() if fp8 else codes.round()


def widest_levels(groups: Tensor, codes: CodeRange) -> Levels:
    """Levels from the least to the largest weight of a group.

    Args:
        groups: [..., size] float32.
        codes: which there are.

    Returns:
        Of groups, [...].
    """
    return codes.levels(*codes.ends(groups))


def mse_levels(groups: Tensor, codes: CodeRange, importance: Tensor | None = None) -> Levels:
    """Levels of the least squared error of the group, of those in SHRINK times the widest range.

    Finer steps for the many cost the largest their distance: Banner et al. 2018,
    https://arxiv.org/abs/1810.05723, who solve for the clipping that is searched for here.

    Args:
        groups: [out, ..., size] float32; zeros have no error, so dropped weights must be zero.
        codes: which there are.
        importance: [..., size] ≥ 0, broadcast over `groups`, what squared errors are weighed with.

    Returns:
        Of groups, [out, ...].
    """
    rows = max(SEARCHED * len(groups) // max(groups.numel(), 1), 1)
    found = [_search(part, codes, importance) for part in groups.split(rows)]
    zeros = [levels.zeros for levels in found if levels.zeros is not None]
    return Levels(torch.cat([own.scales for own in found]), torch.cat(zeros) if zeros else None)


def to_codes_(groups: Tensor, levels: Levels, codes: CodeRange) -> Tensor:
    """Replace groups [..., size] float32 by the nearest codes of their levels [...]."""
    zeros = None if levels.zeros is None else levels.zeros.float().unsqueeze(-1)
    return codes.round_(groups, levels.scales.float().unsqueeze(-1), zeros)


def _stored(scales: Tensor) -> Tensor:
    """As they are stored; 1 also where all of a group is too small for any bfloat16 scale."""
    scales = scales.to(SCALE_DTYPE)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _search(groups: Tensor, codes: CodeRange, importance: Tensor | None) -> Levels:
    """mse_levels of a few rows."""
    low, high = codes.ends(groups)
    best, least = codes.levels(low, high), torch.full_like(high, torch.inf)
    for factor in SHRINK:
        levels = codes.levels(low * factor, high * factor)
        rounded = to_codes_(groups.clone(), levels, codes)
        steps = levels.scales.float().unsqueeze(-1)
        error = torch.addcmul(groups, rounded, steps, value=-1).square_()
        total = (error if importance is None else error.mul_(importance)).sum(dim=-1)
        better = total < least
        zeros = best.zeros
        if zeros is not None and levels.zeros is not None:
            zeros = torch.where(better, levels.zeros, zeros)
        best = Levels(torch.where(better, levels.scales, best.scales), zeros)
        least = torch.minimum(total, least)
    return best
