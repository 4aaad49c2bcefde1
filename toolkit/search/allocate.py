"""Allocation: what each linear becomes, so that all of them together hold a budget.

Linears that servers multiply as one keep the same format and values; their unstructured sparsities
may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from gblm.model.reader import Reader
from gblm.recipe import FUSED
from gblm.sparse.formats import Format, Shape
from gblm.sparse.patterns import Scope, Unstructured

BISECTIONS = 60


@dataclass(frozen=True)
class LinearSpec:
    """A linear to prune is known by its full name, shape [out, in] and dtype in the checkpoint.

    `unit` is equal for linears that servers multiply as one; `scope` says where an unstructured
    sparsity is counted, by row or over the matrix.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    unit: str
    scope: Scope = "matrix"

    @property
    def weights(self) -> int:
        """Count the weights."""
        return prod(self.shape)

    def num_bytes(self, fmt: Format) -> int:
        """Give the most bytes that it takes when it is packed, masks and scales included."""
        return fmt.most_bytes(self.shape, self.dtype, self.scope)


Allocation = dict[str, Format]
Loss = Callable[[LinearSpec, Format], float]


def linears_of(reader: Reader, names: Iterable[str], scope: Scope) -> tuple[LinearSpec, ...]:
    """Describe the linears to prune, in order."""
    first_of = {part: parts[0] for parts in FUSED for part in parts}
    found = []
    for name in names:
        parent, _, last = name.rpartition(".")
        (rows, columns), dtype = reader.headers[f"{name}.weight"]
        unit = f"{parent}.{first_of.get(last, last)}"
        found.append(LinearSpec(name, (rows, columns), dtype, unit, scope))
    return tuple(found)


def total_bytes(linears: Iterable[LinearSpec], allocation: Mapping[str, Format]) -> int:
    """Give the most bytes that all linears take when they are packed."""
    return sum(linear.num_bytes(allocation[linear.name]) for linear in linears)


@dataclass(frozen=True)
class Option:
    """One thing that a linear may become: its bytes, and the loss that it brings."""

    fmt: Format
    cost: int
    loss: float


# The options of each linear of a unit, by what all of them must have in common.
Families = Mapping[str, Mapping[str, Sequence[Option]]]
Picked = dict[str, Option]


def measured(
    linears: Sequence[LinearSpec],
    ways: Callable[[LinearSpec], Iterable[Format]],
    limit: float,
    loss: Loss,
) -> Allocation | None:
    """Find the least total loss that holds the budget.

    Lagrange's multiplier λ of the budget is bisected: each unit takes the options of least
    loss + λ · bytes.

    Args:
        linears: to allocate to.
        ways: gives what a linear may become.
        limit: bytes of all linears together.
        loss: the loss of a linear that becomes something.

    Returns:
        None if even the smallest options cost too much.
    """
    units = _units(linears, ways, loss)

    def total(picks: Iterable[Picked]) -> int:
        return sum(option.cost for picked in picks for option in picked.values())

    high = 1.0
    while total(picks := [_pick(unit, high) for unit in units]) > limit:
        high *= 16.0
        if high > 1e40:
            return None
    low, best = 0.0, picks
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5 if low else high / 16.0
        picks = [_pick(unit, middle) for unit in units]
        if total(picks) <= limit:
            high, best = middle, picks
        else:
            low = middle
    return {name: option.fmt for picked in best for name, option in picked.items()}


def _units(
    linears: Sequence[LinearSpec], ways: Callable[[LinearSpec], Iterable[Format]], loss: Loss
) -> list[Families]:
    """Sort the options by unit and family, without families that a part of a unit cannot have."""
    members: dict[str, list[LinearSpec]] = {}
    for linear in linears:
        members.setdefault(linear.unit, []).append(linear)
    units: list[Families] = []
    for own in members.values():
        families: dict[str, dict[str, list[Option]]] = {}
        for linear in own:
            for fmt in ways(linear):
                option = Option(fmt, linear.num_bytes(fmt), loss(linear, fmt))
                of_family = families.setdefault(family(fmt), {})
                of_family.setdefault(linear.name, []).append(option)
        units.append({key: rows for key, rows in families.items() if len(rows) == len(own)})
    return units


def family(fmt: Format) -> str:
    """Give a name that is equal for formats that parts of one served linear may have together."""
    return f"bitmask/{fmt.values}" if isinstance(fmt.pattern, Unstructured) else fmt.spec


def _pick(unit: Families, price: float) -> Picked:
    """Take the options of the least loss + price · bytes, all of one family."""

    def value(option: Option) -> float:
        return option.loss + price * option.cost

    every = [
        {name: min(options, key=value) for name, options in own.items()} for own in unit.values()
    ]
    return min(every, key=lambda picked: sum(map(value, picked.values())))
