"""GBLM: score = |W_ij| · (‖X_j‖₂ + α·‖G_ij‖), compared within each output row.

Das et al. 2023, https://arxiv.org/abs/2311.04902, eq. 3; G is the gradient of the dense model's
loss on the calibration samples. With alpha = 0 it is Wanda, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gblm.errors import UsageError
from gblm.methods.base import ScoredMethod, Stats

GradientNorm = Literal["l1", "l2"]


@dataclass(frozen=True)
class GBLM(ScoredMethod):
    """score = |W| · (‖X‖ + α·‖G‖).

    Attributes:
        alpha: weight of the gradient term.
        gradient_norm: over the calibration samples s, l1: Σ|g_s|, l2: √Σ g_s².
    """

    needs: ClassVar[frozenset[str]] = frozenset({"act_norm", "grad_norm"})

    alpha: float = 100.0
    gradient_norm: GradientNorm = "l2"

    def __post_init__(self) -> None:
        if self.gradient_norm not in ("l1", "l2"):
            raise UsageError(f"gradient_norm {self.gradient_norm!r} is unknown: use l1 or l2.")
        if not isinstance(self.alpha, int | float) or not 0 <= self.alpha < math.inf:
            raise UsageError(f"alpha {self.alpha!r} must be a finite number, not negative.")

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """|W| [out, in] · act_norm [in] + |W| · α·grad_norm [out, in]."""
        magnitude = weight.float().abs()
        # The published code stores α·‖G‖ in float16; the rounding decides near ties, so keep it.
        limit = torch.finfo(torch.float16).max
        gradient = (self.alpha * stats["grad_norm"]).clamp(max=limit).half().float()
        # Two products and a sum, not |W|·(…): only this order rounds as the published code does.
        return magnitude * stats["act_norm"] + magnitude * gradient
