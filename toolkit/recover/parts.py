"""Parts: what recovery trains of each tensor, apart from its mask and its format.

The model holds each weight as the packed folder stands for it, in the dtype of the computation. A
part holds the float32 parameters behind that weight. `take` turns the weight's gradient into the
parameters' gradients, and `give` returns the weight that follows from the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from gblm.sparse.weights import SparseWeight

Train = Literal["scales", "weights"]
# Scales move by factors, not by differences, so their learning rate has a unit of its own.
FACTOR_RATE = 2.0


class Part(ABC):
    """The trained parameters of one tensor, each with the factor of its learning rate."""

    parameters: list[tuple[nn.Parameter, float]]

    @abstractmethod
    def take(self, grad: Tensor) -> None:
        """Set the parameters' gradients from the tensor's gradient, which has its shape."""

    @abstractmethod
    def give(self) -> Tensor:
        """Return the tensor that the parameters stand for."""


class Vector(Part):
    """A tensor that is trained as it is, such as the weight of a norm or a bias."""

    def __init__(self, start: Tensor) -> None:
        self.value = nn.Parameter(start.detach().float().clone())
        self.parameters = [(self.value, 1.0)]

    def take(self, grad: Tensor) -> None:
        """See Part."""
        self.value.grad = grad.float()

    def give(self) -> Tensor:
        """See Part."""
        return self.value.detach()


class SparsePart(Part):
    """A pruned weight [out, in]; whatever is trained, its mask stays."""

    @abstractmethod
    def result(self, dtype: torch.dtype) -> SparseWeight:
        """Return the trained weight; floating values, or what codes stand for, are of `dtype`."""


class KeptFloats(SparsePart):
    """The kept values of a floating weight; pruned places have no parameter and no state."""

    def __init__(self, start: SparseWeight) -> None:
        self.mask = start.mask
        self.values = nn.Parameter(start.weight[start.mask].float())
        self.parameters = [(self.values, 1.0)]

    def take(self, grad: Tensor) -> None:
        """See Part."""
        self.values.grad = grad[self.mask].float()

    def give(self) -> Tensor:
        """See Part."""
        return _scatter(self.values.detach(), self.mask)

    def result(self, dtype: torch.dtype) -> SparseWeight:
        """See SparsePart."""
        return SparseWeight(self.give().to(dtype), self.mask)


class FloatScales(SparsePart):
    """A factor for each row and column of a floating weight: (1 + r) W (1 + c)."""

    def __init__(self, start: SparseWeight) -> None:
        self.start = start
        rows, columns = start.mask.shape
        device = start.mask.device
        self.rows = nn.Parameter(torch.zeros(rows, 1, device=device))
        self.columns = nn.Parameter(torch.zeros(1, columns, device=device))
        self.parameters = [(self.rows, FACTOR_RATE), (self.columns, FACTOR_RATE)]

    def take(self, grad: Tensor) -> None:
        """See Part: Σⱼ Gᵢⱼ Wᵢⱼ (1 + cⱼ) for a row, Σᵢ Gᵢⱼ Wᵢⱼ (1 + rᵢ) for a column."""
        product = grad.float() * self.start.weight
        self.rows.grad = (product * (1 + self.columns.detach())).sum(1, keepdim=True)
        self.columns.grad = (product * (1 + self.rows.detach())).sum(0, keepdim=True)

    def give(self) -> Tensor:
        """See Part."""
        return self.start.weight * (1 + self.rows.detach()) * (1 + self.columns.detach())

    def result(self, dtype: torch.dtype) -> SparseWeight:
        """See SparsePart."""
        return SparseWeight(self.give().to(dtype), self.start.mask)


class Codes(SparsePart):
    """Integer codes: their scales, and in front of their rounding the kept values.

    A value's gradient passes the rounding as if it were the identity inside the range of the codes
    (Bengio et al. 2013, arXiv 1308.3432); that of a scale follows as in LSQ (Esser et al. 2020,
    arXiv 1902.08153).
    """

    def __init__(self, start: SparseWeight, train: Train) -> None:
        if start.codes is None or start.scales is None:
            raise ValueError("this weight has no codes.")
        self.mask, self.start = start.mask, start
        # A range of codes that is narrower than their type's stays as narrow as it is.
        self.low, self.high = float(start.codes.min()), float(start.codes.max())
        self.factor = nn.Parameter(torch.zeros_like(start.scales, dtype=torch.float32))
        self.parameters = [(self.factor, FACTOR_RATE)]
        self.values: nn.Parameter | None = None
        if train == "weights":
            self.values = nn.Parameter(start.codes[self.mask] * self._per_value())
            self.parameters.append((self.values, 1.0))

    def take(self, grad: Tensor) -> None:
        """See Part."""
        kept = grad[self.mask].float()
        exact, codes = self._codes()
        inside = (exact > self.low) & (exact < self.high)
        # d(code · scale)/d scale; behind frozen codes it is the code itself.
        slope = codes if self.values is None else torch.where(inside, codes - exact, codes)
        out, groups = self.factor.shape
        by_group = _scatter(kept * slope, self.mask).view(out, groups, -1).sum(-1)
        self.factor.grad = by_group * self._scales()
        if self.values is not None:
            self.values.grad = kept * inside

    def give(self) -> Tensor:
        """See Part."""
        return _scatter(self._codes()[1] * self._per_value(), self.mask)

    def result(self, dtype: torch.dtype) -> SparseWeight:
        """See SparsePart."""
        # Adding zero makes +0 of the code of a small negative weight.
        codes = _scatter(self._codes()[1] + 0.0, self.mask).to(torch.int8)
        scales = self._scales().to(torch.bfloat16)
        return SparseWeight.from_codes(codes, scales, self.mask, dtype)

    def _codes(self) -> tuple[Tensor, Tensor]:
        """The kept values in units of their scales, clamped, before and after rounding."""
        if self.values is None:
            codes = self.start.codes[self.mask].float()  # type: ignore[index]
            return codes, codes
        exact = (self.values.detach() / self._per_value()).clamp(self.low, self.high)
        return exact, exact.round()

    def _scales(self) -> Tensor:
        """[out, groups] float32, rounded to bfloat16 as they are stored."""
        scales = self.start.scales.float() * self.factor.detach().exp()  # type: ignore[union-attr]
        return scales.to(torch.bfloat16).float()

    def _per_value(self) -> Tensor:
        """The scale of each kept value."""
        scales = self._scales()
        size = self.mask.shape[1] // scales.shape[1]
        return scales.repeat_interleave(size, dim=1)[self.mask]


def sparse_part(weight: SparseWeight, train: Train) -> SparsePart:
    """Return the part that trains a pruned weight.

    Args:
        weight: as the format unpacks it.
        train: "weights", all kept values and the scales of codes; "scales", only a factor for each
            row and column, or for each group of codes.
    """
    if weight.codes is not None:
        return Codes(weight, train)
    return KeptFloats(weight) if train == "weights" else FloatScales(weight)


def _scatter(kept: Tensor, mask: Tensor) -> Tensor:
    """Put kept values, in row order, at their places; zero elsewhere."""
    return torch.zeros(mask.shape, dtype=kept.dtype, device=kept.device).masked_scatter_(mask, kept)
