"""DSnoT: exchange weights of a Wanda mask until the rows' expected output errors are small.

Zhang et al. 2023, "Dynamic Sparse No Training", https://arxiv.org/abs/2310.08915, algorithm 1.
The expected error of a row is ε = Σ over its pruned weights of W_ij · E[x_j]. One cycle grows the
pruned weight that lowers |ε| most, W_ij E[x_j] / Var[x_j] being the measure, and prunes the kept
one of lowest Wanda score: for N:M of the same group, for 8:16 of the same half, else of those whose
W_ij E[x_j] has the opposite sign, so that |ε| falls again.

Deviations from the published code (https://github.com/zyxxmu/DSnoT): an exchange that would not
lower |ε| is passed over, where the code ends the row; a weight is exchanged once. Variances are
taken within samples, and E[x] is a sum over tokens as there, so the threshold means the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gblm.errors import UsageError
from gblm.methods.base import Method, Stats
from gblm.patterns import NM, Dense, Pattern, Unstructured
from gblm.weights import SparseWeight


@dataclass(frozen=True)
class DSnoT(Method):
    """Wanda's mask, then exchanges of one weight per row and cycle. Kept values do not change.

    Attributes:
        max_cycles: exchanges that a row may try.
        threshold: a row with |ε| at or below it is left alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"act_norm", "act_mean", "act_var"})

    max_cycles: int = 50
    threshold: float = 0.1

    def __post_init__(self) -> None:
        if self.max_cycles < 0:
            raise UsageError(f"max_cycles {self.max_cycles!r} must not be negative.")
        if not 0 <= self.threshold < math.inf:
            raise UsageError(f"threshold {self.threshold!r} must be finite and not negative.")

    def check_pattern(self, pattern: Pattern) -> None:
        """See Method.check_pattern; one weight cannot be exchanged where whole tiles go."""
        if not isinstance(pattern, Unstructured | NM | Dense):
            raise UsageError(
                f"dsnot cannot follow the pattern {pattern}: it exchanges single weights. "
                "Give N:M or a sparsity such as 0.5, or use another method."
            )

    def prune(self, weight: Tensor, stats: Stats, pattern: Pattern, name: str = "") -> SparseWeight:
        """Cut by Wanda's score, then exchange.

        Args:
            weight: [out, in] floating point.
            stats: "act_norm", "act_mean", "act_var", all [in] float32.
            pattern: N:M, whose exchanges stay within a group or its half, unstructured or dense.
            name: of the linear, for messages.
        """
        self.check_pattern(pattern)
        score = weight.float().abs() * stats["act_norm"]
        keep = pattern.keep(score, "row")
        group = pattern.unit if isinstance(pattern, NM) else None
        mean = weight.float() * stats["act_mean"]
        exchange = _Exchange(score, mean, stats["act_var"], keep, group)
        for _ in range(self.max_cycles):
            if not exchange.cycle(self.threshold):
                break
        return SparseWeight.cut(weight, exchange.keep)


class _Exchange:
    """The state of all rows.

    Attributes:
        keep: [out, in] bool.
        error: [out, 1] float32, ε.
    """

    def __init__(
        self, score: Tensor, mean: Tensor, variance: Tensor, keep: Tensor, group: int | None
    ) -> None:
        self.keep = keep
        self.error = torch.where(keep, 0, mean).sum(dim=1, keepdim=True)
        self._mean, self._group = mean, group
        self._gain = mean / variance.clamp(min=torch.finfo(torch.float32).tiny)
        # A weight that was exchanged or passed over is out of reach for both choices.
        self._gain = torch.where(keep, torch.nan, self._gain)
        self._score = torch.where(keep, score, torch.inf)

    def cycle(self, threshold: float) -> bool:
        """Try one exchange in each row above the threshold; False when none could try."""
        sign = self.error.sign()
        gain = (self._gain * sign).nan_to_num_(nan=-torch.inf, posinf=torch.inf)
        most, grown = gain.max(dim=1, keepdim=True)
        tries = (most > 0) & (self.error.abs() > threshold)
        least, pruned = self._lowest_score(sign, grown)
        change = self._mean.gather(1, pruned) - self._mean.gather(1, grown)
        after = self.error + change
        moves = tries & (least < torch.inf) & (after.abs() < self.error.abs())
        self.error = torch.where(moves, after, self.error)
        self.keep.scatter_(1, grown, moves | self.keep.gather(1, grown))
        self.keep.scatter_(1, pruned, ~moves & self.keep.gather(1, pruned))
        self._gain.scatter_(1, grown, torch.where(tries, torch.nan, self._gain.gather(1, grown)))
        spent = torch.where(moves, torch.inf, self._score.gather(1, pruned))
        self._score.scatter_(1, pruned, spent)
        return bool(tries.any())

    def _lowest_score(self, sign: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """Score and column, both [out, 1], of what goes for the weights at `grown` [out, 1]."""
        if self._group is None:
            lowest = torch.where(self._mean * sign < 0, self._score, torch.inf).min(1, True)
            return lowest.values, lowest.indices
        start = grown // self._group * self._group
        columns = start + torch.arange(self._group, device=grown.device)
        lowest = self._score.gather(1, columns).min(1, True)
        return lowest.values, start + lowest.indices
