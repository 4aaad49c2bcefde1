"""Wanda: score = |W_ij| · ‖X_j‖₂, compared within each output row. No weight update.

Sun et al. 2023, https://arxiv.org/abs/2306.11695, eq. 1; the variant is `--use_variant` of
https://github.com/locuslab/wanda.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gblm.errors import UsageError
from gblm.methods.base import ScoredMethod, Stats
from gblm.patterns import Pattern, Unstructured
from gblm.weights import SparseWeight

logger = logging.getLogger(__name__)
MAX_SHARE = 0.8
TOLERANCE = 0.001


@dataclass(frozen=True)
class Wanda(ScoredMethod):
    """score = |W| · ‖X‖.

    Attributes:
        variant: every row loses the same share of its summed score, not of its weights; the share
            is searched until the sparsity of the matrix is within 0.001. It never passes 0.8, so
            a very high sparsity stays out of reach. Unstructured patterns only.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"act_norm"})

    variant: bool = False

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """|W| [out, in] · act_norm [in]."""
        return weight.float().abs() * stats["act_norm"]

    def check_pattern(self, pattern: Pattern) -> None:
        """See Method.check_pattern; the variant needs weights that compete freely."""
        if self.variant and not isinstance(pattern, Unstructured):
            raise UsageError(
                f"wanda's variant cannot follow the pattern {pattern}: its rows differ in the "
                "number of weights they keep. Give a sparsity such as 0.5, or leave it out."
            )

    def prune(self, weight: Tensor, stats: Stats, pattern: Pattern, name: str = "") -> SparseWeight:
        """Keep the highest scores."""
        if not self.variant:
            return super().prune(weight, stats, pattern, name)
        self.check_pattern(pattern)
        keep = keep_by_share(self.score(weight, stats), pattern.sparsity)
        reached = 1 - float(keep.float().mean())
        if abs(reached - pattern.sparsity) > 2 * TOLERANCE:
            logger.warning(
                "%s: wanda's variant reached sparsity %.3f, not %g", name, reached, pattern.sparsity
            )
        return SparseWeight.cut(weight, keep)


def keep_by_share(score: Tensor, sparsity: float) -> Tensor:
    """Prune the lowest scores of each row that sum to one common share of the row's sum.

    Args:
        score: [out, in] float32, not negative.
        sparsity: of the matrix; the share is found by bisection.

    Returns:
        [out, in] bool, True = kept.
    """
    ordered = score.sort(dim=1).values
    sums, total = ordered.cumsum(dim=1), score.sum(dim=1, keepdim=True)
    low, share, high = 0.0, MAX_SHARE / 2, MAX_SHARE
    while True:
        keep = _keep_over(score, ordered, sums, total * share)
        # A float32 tensor, as in the published code: its rounding decides when to stop.
        error = keep.logical_not().sum() / keep.numel() - sparsity
        if error.abs() <= TOLERANCE or high - low < TOLERANCE:
            return keep
        if error > 0:
            share, high = (share + low) / 2, share
        else:
            share, low = (share + high) / 2, share


def _keep_over(score: Tensor, ordered: Tensor, sums: Tensor, budget: Tensor) -> Tensor:
    """Keep what is above the last score that the row's budget [out, 1] pays for."""
    count = (sums <= budget).sum(dim=1, keepdim=True)
    threshold = ordered.gather(1, (count - 1).clamp(min=0))
    # A budget may pay for nothing; the published code then reads index −1.
    return (score > threshold) | (count == 0)
