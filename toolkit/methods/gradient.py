"""Gradient: score = |W_ij| · ‖G_ij‖, compared within each output row. No activations.

The gradient half of GBLM by itself, as in Das et al. 2023, https://arxiv.org/abs/2311.04902.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from gblm.methods.base import ScoredMethod, Stats

GradientNorm = Literal["l1", "l2"]


@dataclass(frozen=True)
class Gradient(ScoredMethod):
    """score = |W| · ‖G‖.

    Whether ‖G‖ is a sum or a mean over the samples makes no difference: a factor common to all
    scores leaves their order as it is, so there is no `gradient_mode`.

    Attributes:
        gradient_norm: over the calibration samples s, l1: Σ|g_s|, l2: √Σ g_s².
    """

    about: ClassVar[str] = (
        "|W| · ‖G‖, in each output row; kept weights unchanged (arXiv 2311.04902)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm"})

    gradient_norm: GradientNorm = field(default="l2", metadata={"about": "norm over the samples"})

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """Score by |W| · grad_norm, both [out, in]."""
        return weight.float().abs() * stats["grad_norm"]
