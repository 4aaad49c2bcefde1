"""Magnitude: score = |W|, compared over the whole matrix. No data.

The published code prunes everything at or below a threshold and so overshoots when magnitudes
tie; here the count is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gblm.methods.base import ScoredMethod, Stats
from gblm.sparse.patterns import Scope


@dataclass(frozen=True)
class Magnitude(ScoredMethod):
    """score = |W|."""

    about: ClassVar[str] = "|W|, over the whole matrix; kept weights unchanged"
    scope: ClassVar[Scope] = "matrix"

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """Score by |W| [out, in]."""
        return weight.float().abs()
