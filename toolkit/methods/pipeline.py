"""Pipeline: a mask, then least squares on what it keeps, then rounding - the steps of one linear.

Each step is optional and knows nothing of the others; here they are put in their order, and the
statistics that they share are derived once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gblm.methods import make_method
from gblm.methods.base import Method, ScoredMethod, Stats
from gblm.methods.obs import prepare_obs, round_obs
from gblm.methods.refit import Refit
from gblm.sparse.patterns import Dense, Pattern
from gblm.sparse.values import Rounding, ValueType, quantize
from gblm.sparse.weights import SparseWeight

DAMPING = 0.01


@dataclass(frozen=True)
class Pipeline:
    """A pipeline says what happens to a linear.

    Attributes:
        method: chooses the mask; with the pattern "dense" nothing is chosen.
        refit: moves the kept weights to the least squares; None leaves them as the method does.
        rounding: how kept weights become codes, where values are integers; see
            `gblm.sparse.values`. With "obs" and a dense pattern it is GPTQ; without `refit`,
            SparseGPT rounds while it prunes. The damping is the method's, where it has one.
    """

    method: Method
    refit: Refit | None = None
    rounding: Rounding = "nearest"

    @property
    def needs(self) -> frozenset[str]:
        """Name the statistics that the steps read."""
        own = {"hessian"} if self.refit is not None or self.rounding == "obs" else set()
        return self.method.needs | own

    @property
    def keeps_values(self) -> bool:
        """Tell whether kept weights stay bit for bit, until they are rounded to codes."""
        return isinstance(self.method, ScoredMethod) and self.refit is None

    @property
    def gradient_norm(self) -> str:
        """Name the norm of the gradients that the method reads, if it reads any."""
        return getattr(self.method, "gradient_norm", "l2")

    def prepare(self, stats: Stats, name: str = "", dense: bool = False) -> Stats:
        """Derive what several linears with the same input share; see `Method.prepare`.

        Args:
            stats: the statistics named in `needs`; not changed.
            name: of the first of these linears, for messages.
            dense: whether nothing is to be pruned, so that the method is not asked.

        Raises:
            InputError: the Hessian is not positive definite even with damping 1.
        """
        prepared = {} if dense else dict(self.method.prepare(stats, name))
        if self.rounding == "obs" and "inverse_factor" not in prepared:
            prepared |= prepare_obs(stats, getattr(self.method, "damping", DAMPING), name)
        if self.refit is not None and not dense:
            prepared["hessian"] = stats["hessian"]
        elif "hessian" not in self.method.needs:
            # It has been factored, and is the largest thing here.
            prepared.pop("hessian", None)
        return prepared

    def prune(
        self, weight: Tensor, stats: Stats, pattern: Pattern, values: ValueType, name: str = ""
    ) -> SparseWeight:
        """Take all steps of one linear.

        Args:
            weight: [out, in] floating point.
            stats: what `prepare` returned.
            pattern: which positions may stay.
            values: what kept weights are stored as, resolved for `in`.
            name: of the linear, for messages.

        Returns:
            With a value type that has codes, those and scales, too.

        Raises:
            InputError: a weight is NaN or Inf, or becomes so.
        """
        jointly = self.rounding == "obs" and not values.is_float and self.refit is None
        dense = isinstance(pattern, Dense)
        if jointly and not dense:
            joint = self.method.prune_quantized(weight, stats, pattern, values, name)
            if joint is not None:
                return joint
        if dense:
            pruned = SparseWeight(weight, torch.ones_like(weight, dtype=torch.bool))
        else:
            pruned = self.method.prune(weight, stats, pattern, name)
            if self.refit is not None:
                pruned = self.refit.apply(weight, pruned, stats["hessian"], name)
        if values.is_float:
            return pruned
        if self.rounding == "obs":
            # The sweep makes up for what the mask drops, too, unless something else has done so.
            start = weight if self.keeps_values else pruned.weight
            return round_obs(start, pruned.mask, values, stats, name)
        return quantize(pruned.weight, pruned.mask, values, name)


def make_pipeline(
    method: str, options: dict[str, Any], refit: Mapping[str, Any] | None, rounding: Rounding
) -> Pipeline:
    """Build a pipeline from what a recipe says.

    Args:
        method: a name of `gblm.methods.METHODS`.
        options: its dataclass fields.
        refit: the fields of Refit; None for no such step.
        rounding: see Pipeline.

    Raises:
        UsageError: the method or one of its options is unknown, or a value does not suit it.
    """
    step = Refit(**refit) if refit is not None else None
    return Pipeline(make_method(method, options), step, rounding)
