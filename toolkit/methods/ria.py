"""RIA: relative importance and activations; compared over the whole matrix. No weight update.

Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models", ICLR, eq. 3: score = (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖X_j‖₂^a.

As in the published code (https://github.com/biomedical-cybernetics/
Relative-importance-and-activation-pruning, without `--per_outneuron`) an unstructured budget is
that of the matrix. Channel permutation, which the paper adds for N:M, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gblm.errors import UsageError
from gblm.methods.base import ScoredMethod, Stats
from gblm.patterns import Scope


@dataclass(frozen=True)
class RIA(ScoredMethod):
    """score = (share of the column + share of the row) · ‖X‖^exponent.

    Attributes:
        exponent: how much activations count; with 0 they do not.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"act_norm"})
    scope: ClassVar[Scope] = "matrix"

    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.exponent < math.inf:
            raise UsageError(f"exponent {self.exponent!r} must be finite and not negative.")

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """[out, in]: |W| over its column's and its row's sum, times act_norm [in]^exponent.

        Rows and columns of zeros score zero.
        """
        magnitude = weight.float().abs()
        tiny = torch.finfo(torch.float32).tiny
        columns = magnitude.sum(dim=0).clamp(min=tiny)
        rows = magnitude.sum(dim=1, keepdim=True).clamp(min=tiny)
        return (magnitude / columns + magnitude / rows) * stats["act_norm"] ** self.exponent
