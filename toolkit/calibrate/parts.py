"""Parts: what is trained of each tensor, apart from its mask and its format.

The model holds each weight as it will be stored, in the dtype of the computation. A part holds the
float32 parameters behind that weight. `take` turns the weight's gradient into the parameters'
gradients, and `give` returns the weight that follows from the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gblm.sparse.weights import SparseWeight

Train = Literal["scales", "weights"]
Kind = Literal["value", "norm", "factor"]
# What a norm or a value of zeros alone is taken to be large.
SMALL = 1e-3


class Trained(NamedTuple):
    """A parameter, its kind, and how large it is: learning rates are relative to that.

    Models differ a hundredfold in the size of their weights, so that no absolute rate suits two.
    """

    parameter: nn.Parameter
    kind: Kind
    size: float = 1.0


class Part(ABC):
    """A Part holds the trained parameters of one tensor."""

    parameters: list[Trained]

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
        self.parameters = [Trained(self.value, "norm", _size(self.value))]

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


class Places:
    """The kept places of a weight, as indices: a boolean mask takes ten times as long to follow."""

    def __init__(self, mask: Tensor) -> None:
        """Take the places from a mask [out, in] of bool."""
        self.shape = mask.shape
        kind = torch.int32 if mask.numel() < 1 << 31 else torch.int64
        self.index = mask.flatten().nonzero()[:, 0].to(kind)

    def gather(self, dense: Tensor) -> Tensor:
        """Return the values [kept] that a tensor [out, in] has there, in row order."""
        return dense.flatten().index_select(0, self.index)

    def scatter(self, kept: Tensor) -> Tensor:
        """Put values [kept] there; zero elsewhere."""
        zeros = torch.zeros(self.shape.numel(), dtype=kept.dtype, device=kept.device)
        return zeros.scatter_(0, self.index.long(), kept).view(self.shape)

    def mask(self) -> Tensor:
        """Return [out, in] bool, True = kept."""
        return self.scatter(torch.ones_like(self.index, dtype=torch.bool))


class Floats(SparsePart):
    """The weight is (1 + r) V (1 + c): values V, and a factor for each row and column.

    Pruned places have no parameter and no state.
    """

    def __init__(self, start: SparseWeight, train: Train) -> None:
        self.places = Places(start.mask)
        (rows, columns), device = start.mask.shape, start.mask.device
        self.values = self.places.gather(start.weight).float()
        self.rows = nn.Parameter(torch.zeros(rows, 1, device=device))
        self.columns = nn.Parameter(torch.zeros(1, columns, device=device))
        self.parameters = [Trained(self.rows, "factor"), Trained(self.columns, "factor")]
        if train == "weights":
            self.values = nn.Parameter(self.values)
            self.parameters.append(Trained(self.values, "value", _size(self.values)))

    def take(self, grad: Tensor) -> None:
        """See Part: Σⱼ Gᵢⱼ Vᵢⱼ (1 + cⱼ) for a row, Σᵢ Gᵢⱼ Vᵢⱼ (1 + rᵢ) for a column."""
        rows, columns = 1 + self.rows.detach(), 1 + self.columns.detach()
        grad = grad.float()
        product = grad * self.places.scatter(self.values.detach())
        self.rows.grad = (product * columns).sum(1, keepdim=True)
        self.columns.grad = (product * rows).sum(0, keepdim=True)
        if isinstance(self.values, nn.Parameter):
            self.values.grad = self.places.gather(grad * rows * columns)

    def give(self) -> Tensor:
        """See Part."""
        values = self.places.scatter(self.values.detach())
        return values * (1 + self.rows.detach()) * (1 + self.columns.detach())

    def result(self, dtype: torch.dtype) -> SparseWeight:
        """See SparsePart."""
        return SparseWeight(self.give().to(dtype), self.places.mask())


class Codes(SparsePart):
    """What is trained are the scales of codes and, in front of their rounding, the kept values.

    A value's gradient passes the rounding as if it were the identity inside the range of the codes
    (Bengio et al. 2013, arXiv 1308.3432); that of a scale follows as in LSQ (Esser et al. 2020,
    arXiv 1902.08153).
    """

    def __init__(self, start: SparseWeight, train: Train) -> None:
        if start.codes is None or start.scales is None:
            raise ValueError("this weight has no codes.")
        self.places, self.scales, self.codes = Places(start.mask), start.scales, start.codes
        # A range of codes that is narrower than their type's stays as narrow as it is.
        self.low, self.high = float(start.codes.min()), float(start.codes.max())
        self.factor = nn.Parameter(torch.zeros_like(start.scales, dtype=torch.float32))
        self.parameters = [Trained(self.factor, "factor")]
        self.values: nn.Parameter | None = None
        if train == "weights":
            exact = self._grouped(start.codes.float()) * self._scales()
            self.values = nn.Parameter(self.places.gather(exact.flatten(1)))
            self.parameters.append(Trained(self.values, "value", _size(self.values)))

    def take(self, grad: Tensor) -> None:
        """See Part."""
        grouped = self._grouped(grad.float())
        exact, codes = self._codes()
        # d(code · scale)/d scale is the code; in front of a rounding, what the rounding adds.
        slope = codes
        if self.values is not None:
            inside = (exact > self.low) & (exact < self.high)
            slope = torch.where(inside, codes - exact, codes)
            self.values.grad = self.places.gather((grouped * inside).flatten(1))
        self.factor.grad = ((grouped * slope).sum(-1, keepdim=True) * self._scales()).squeeze(-1)

    def give(self) -> Tensor:
        """See Part."""
        return (self._codes()[1] * self._scales()).flatten(1)

    def result(self, dtype: torch.dtype) -> SparseWeight:
        """See SparsePart."""
        # Adding zero makes +0 of the code of a small negative weight.
        codes = (self._codes()[1] + 0.0).flatten(1).to(torch.int8)
        scales = self._scales().squeeze(-1).to(torch.bfloat16)
        return SparseWeight.from_codes(codes, scales, self.places.mask(), dtype)

    def _codes(self) -> tuple[Tensor, Tensor]:
        """Give the weight in units of its scales, clamped, before and after rounding, by group."""
        if self.values is None:
            codes = self._grouped(self.codes.float())
            return codes, codes
        exact = self._grouped(self.places.scatter(self.values.detach())) / self._scales()
        exact = exact.clamp_(self.low, self.high)
        return exact, exact.round()

    def _scales(self) -> Tensor:
        """[out, groups, 1] float32, rounded to bfloat16 as they are stored."""
        scales = self.scales.float() * self.factor.detach().exp()
        return scales.to(torch.bfloat16).float().unsqueeze(-1)

    def _grouped(self, dense: Tensor) -> Tensor:
        """View [out, in] as [out, groups, columns of a group]."""
        return dense.reshape(*self.factor.shape, -1)


def sparse_part(weight: SparseWeight, train: Train) -> SparsePart:
    """Return the part that trains a pruned weight.

    Args:
        weight: as the format unpacks it.
        train: "weights", all kept values and factors; "scales", only a factor for each row and
            column, or for each group of codes.
    """
    return Floats(weight, train) if weight.codes is None else Codes(weight, train)


def _size(tensor: Tensor) -> float:
    """Return the root mean square."""
    return max(SMALL, float(tensor.detach().float().square().mean().sqrt()))
