"""Wanda: score = |W_ij| · ‖X_j‖₂, compared within each output row. No weight update.

Sun et al. 2023, https://arxiv.org/abs/2306.11695, eq. 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gblm.methods.base import ScoredMethod, Stats


@dataclass(frozen=True)
class Wanda(ScoredMethod):
    """score = |W| · ‖X‖."""

    about: ClassVar[str] = (
        "|W| · ‖X‖, in each output row; kept weights unchanged (arXiv 2306.11695, eq. 1)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"act_norm"})

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """Score by |W| [out, in] · act_norm [in]."""
        return weight.float().abs() * stats["act_norm"]
