"""Allocation: what each linear becomes, so that all of them together hold a budget.

Uniform, or by predicted losses. Linears that servers multiply as one keep the same format and
values; their unstructured sparsities may differ.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from gblm.model.reader import Reader
from gblm.recipe import FUSED
from gblm.sparse.formats import Format, Shape
from gblm.sparse.formats.size import most_bytes
from gblm.sparse.patterns import Scope, Unstructured

MAX_SPARSITY = 0.9
STEPS_TO_ONE = 1000
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
        return most_bytes(fmt, self.shape, self.dtype, self.scope)


Allocation = dict[str, Format]
Loss = Callable[[LinearSpec, Format], float]


def linears_of(reader: Reader, names: Iterable[str], scope: Scope) -> tuple[LinearSpec, ...]:
    """Describe the linears to prune, in order.

    Args:
        reader: of the checkpoint.
        names: the full names of the linears.
        scope: where the method counts an unstructured sparsity.
    """
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


def uniform(
    linears: Sequence[LinearSpec], make: Callable[[LinearSpec, float], Format], limit: float
) -> Allocation | None:
    """Give all linears the same sparsity, the lowest that holds the budget.

    Args:
        linears: to allocate to.
        make: gives the format of a linear at a sparsity.
        limit: bytes of all linears together.

    Returns:
        None if even MAX_SPARSITY costs too much.
    """

    def allocate(step: int) -> Allocation:
        return {linear.name: make(linear, step / STEPS_TO_ONE) for linear in linears}

    steps = range(1, int(MAX_SPARSITY * STEPS_TO_ONE) + 1)
    first = bisect_left(steps, True, key=lambda step: total_bytes(linears, allocate(step)) <= limit)
    return allocate(steps[first]) if first < len(steps) else None


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
    loss + λ · bytes. What the convex hull leaves of the budget goes to single steps up, the one of
    the largest gain per byte first.

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
    _spend(units, best, limit - total(best))
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


def _spend(units: Sequence[Families], picks: list[Picked], spare: float) -> None:
    """Change one linear or unit after another as long as that lowers the loss within `spare`."""
    while True:
        best: tuple[float, int, Picked, int] | None = None
        for index, unit in enumerate(units):
            for changed in _changes(unit, picks[index]):
                cost = sum(new.cost - picks[index][name].cost for name, new in changed.items())
                gain = sum(picks[index][name].loss - new.loss for name, new in changed.items())
                if gain <= 0 or cost > spare:
                    continue
                rate = gain / cost if cost > 0 else float("inf")
                if best is None or rate > best[0]:
                    best = (rate, index, changed, cost)
        if best is None:
            return
        _, index, changed, cost = best
        picks[index] = picks[index] | changed
        spare -= cost


def _changes(unit: Families, picked: Picked) -> Iterable[Picked]:
    """Offer another option for one linear, or one of another family for the whole unit."""
    now = family(next(iter(picked.values())).fmt)
    for key, own in unit.items():
        if key == now:
            for name, options in own.items():
                yield from ({name: option} for option in options)
        else:
            steps = zip(*own.values(), strict=False)
            yield from (dict(zip(own, step, strict=True)) for step in steps)
