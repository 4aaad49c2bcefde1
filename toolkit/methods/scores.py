"""Methods that score every weight once and cut once: magnitude, Wanda and GBLM.

Wanda is Sun et al. 2023, https://arxiv.org/abs/2306.11695, eq. 1; GBLM is Das et al. 2023,
https://arxiv.org/abs/2311.04902, eq. 3. With alpha = 0 GBLM is Wanda, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gblm.errors import UsageError
from gblm.methods.base import ScoredMethod, Stats
from gblm.sparse.patterns import Scope


@dataclass(frozen=True)
class Magnitude(ScoredMethod):
    """score = |W|, compared over the whole matrix. No data.

    The published code prunes everything at or below a threshold and so overshoots when magnitudes
    tie; here the count is exact.
    """

    about: ClassVar[str] = "|W|, over the whole matrix; kept weights unchanged"
    scope: ClassVar[Scope] = "matrix"

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """Score by |W| [out, in], in the dtype of the weight."""
        return weight.abs()


@dataclass(frozen=True)
class Wanda(ScoredMethod):
    """score = |W_ij| · ‖X_j‖₂, compared within each output row."""

    about: ClassVar[str] = (
        "|W| · ‖X‖, in each output row; kept weights unchanged (arXiv 2306.11695, eq. 1)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"act_norm"})

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """Score by |W| [out, in] · act_norm [in]."""
        return weight.float().abs() * stats["act_norm"]


@dataclass(frozen=True)
class GBLM(ScoredMethod):
    """score = |W_ij| · (‖X_j‖₂ + α·‖G_ij‖), compared within each output row.

    G is the gradient of the dense model's loss on the calibration samples s, ‖X‖ a mean over their
    number N. The published code adds gradients up, so that its effective alpha grows with N.

    Attributes:
        alpha: weight of the gradient term.
        gradient_norm: how the samples' gradients g_s are joined, see gradient_mode.
        gradient_mode: "mean": l1: Σ|g_s| / N, l2: √(Σ g_s² / N), in float32.
            "reference", the published code: l1: Σ|g_s|, l2: √Σ g_s², α·‖G‖ rounded to float16.
    """

    about: ClassVar[str] = (
        "|W| · (‖X‖ + α·‖G‖), in each output row; kept weights unchanged (arXiv 2311.04902, eq. 3)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"act_norm", "grad_norm"})

    alpha: float = field(default=100.0, metadata={"about": "weight of the gradient term"})
    gradient_norm: Literal["l1", "l2"] = "l2"
    gradient_mode: Literal["mean", "reference"] = "mean"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise UsageError(f"alpha {self.alpha!r} must be a finite number, not negative.")

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """Score by |W| [out, in] · act_norm [in] + |W| · α·‖G‖ [out, in].

        Args:
            weight: [out, in] floating point.
            stats: "act_norm" [in]; "grad_norm" [out, in], summed over samples; in the mode "mean"
                also "num_samples" [].
        """
        magnitude = weight.float().abs()
        gradient = self._gradient(stats)
        # Two products and a sum, not |W|·(…): only this order rounds as the published code does.
        return magnitude * stats["act_norm"] + magnitude * gradient

    def _gradient(self, stats: Stats) -> Tensor:
        """α·‖G‖ [out, in] float32."""
        total = stats["grad_norm"]
        if self.gradient_mode == "mean":
            samples = stats["num_samples"]
            divisor = samples if self.gradient_norm == "l1" else samples.sqrt()
            return total * (self.alpha / divisor)
        # The published code stores α·‖G‖ in float16; the rounding decides near ties, so keep it.
        limit = torch.finfo(torch.float16).max
        return (self.alpha * total).clamp(max=limit).half().float()
