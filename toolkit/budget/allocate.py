"""Allocations: what each linear becomes, so that a budget holds.

Uniform, by outliers (OWL), and by measured sensitivity. Parts of a linear that servers multiply as
one keep the same format and values; unstructured sparsities may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gblm.budget.linears import Allocation, Linear, Spending
from gblm.budget.owl import owl_sparsities
from gblm.choices import Choice
from gblm.patterns import Unstructured

MAX_SPARSITY = 0.9
# Means are found to a thousandth; of a decoder layer a hundredth is enough: few groups.
FINE, COARSE = 1000, 100
BISECTIONS = 60
Loss = Callable[[Linear, Choice], float]
Make = Callable[[Linear, float], Choice]


def uniform(linears: Sequence[Linear], make: Make, spending: Spending) -> Allocation | None:
    """The same sparsity for all: the lowest one that the budget holds.

    Args:
        linears: to allocate to.
        make: the choice of a linear at a sparsity.
        spending: the budget.

    Returns:
        None if even MAX_SPARSITY costs too much.
    """
    return _lowest(linears, lambda s: {own.name: make(own, s) for own in linears}, spending, FINE)


def owl(
    linears: Sequence[Linear], make: Make, spending: Spending, outliers: Sequence[float]
) -> Allocation | None:
    """A sparsity for each decoder layer; see gblm.budget.owl. Their mean is what the budget sets.

    Args:
        linears: to allocate to.
        make: the choice of a linear at a sparsity.
        spending: the budget.
        outliers: of every decoder layer.
    """

    def allocate(sparsity: float) -> Allocation:
        by_layer = owl_sparsities(outliers, sparsity)
        # Up, so that rounding never costs more than was asked for.
        steps = [-int(-own * COARSE // 1) / COARSE for own in by_layer]
        rounded = [min(max(own, 0.0), MAX_SPARSITY) for own in steps]
        return {own.name: make(own, rounded[own.layer]) for own in linears}

    return _lowest(linears, allocate, spending, FINE)


def _lowest(
    linears: Sequence[Linear],
    allocate: Callable[[float], Allocation],
    spending: Spending,
    steps: int,
) -> Allocation | None:
    for step in range(1, int(MAX_SPARSITY * steps) + 1):
        allocation = allocate(step / steps)
        if spending.holds(linears, allocation):
            return allocation
    return None


@dataclass(frozen=True)
class Option:
    """One thing that a linear may become: what it costs and the loss it brings."""

    choice: Choice
    cost: float
    loss: float


# Of a unit: by format and values, the options of each of its linears.
Families = Mapping[str, Mapping[str, Sequence[Option]]]
Picked = dict[str, Option]


def measured(
    linears: Sequence[Linear],
    choices: Callable[[Linear], Iterable[Choice]],
    spending: Spending,
    loss: Loss,
) -> Allocation | None:
    """The least total loss that the budget holds, by marginal loss per cost.

    Lagrange's multiplier λ of the budget is bisected: each unit takes the options of least
    loss + λ · cost. What the convex hull leaves of the budget goes to single steps up, the one of
    the largest gain per cost first.

    Args:
        linears: to allocate to.
        choices: what a linear may become.
        spending: the budget.
        loss: of a linear that becomes something.

    Returns:
        None if even the cheapest options cost too much.
    """
    units = _units(linears, choices, spending, loss)

    def total(picks: Iterable[Picked]) -> float:
        return sum(option.cost for picked in picks for option in picked.values())

    high = 1.0
    while total(picks := [_pick(unit, high) for unit in units]) > spending.limit:
        high *= 16.0
        if high > 1e40:
            return None
    low, best = 0.0, picks
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5 if low else high / 16.0
        picks = [_pick(unit, middle) for unit in units]
        if total(picks) <= spending.limit:
            high, best = middle, picks
        else:
            low = middle
    spare = spending.limit - total(best)
    _spend(units, best, spare)
    return {name: option.choice for picked in best for name, option in picked.items()}


def _units(
    linears: Sequence[Linear],
    choices: Callable[[Linear], Iterable[Choice]],
    spending: Spending,
    loss: Loss,
) -> list[Families]:
    """Options by unit and family; families that a part of the unit cannot have are left out."""
    members: dict[str, list[Linear]] = {}
    for linear in linears:
        members.setdefault(linear.unit, []).append(linear)
    units: list[Families] = []
    for own in members.values():
        families: dict[str, dict[str, list[Option]]] = {}
        for linear in own:
            for choice in choices(linear):
                option = Option(choice, spending.cost(linear, choice), loss(linear, choice))
                of_family = families.setdefault(family(choice), {})
                of_family.setdefault(linear.name, []).append(option)
        units.append({key: rows for key, rows in families.items() if len(rows) == len(own)})
    return units


def family(choice: Choice) -> str:
    """Equal for choices that parts of one served linear may have side by side."""
    if isinstance(choice.pattern, Unstructured):
        return f"bitmask/{choice.values}"
    return choice.fmt.spec


def _pick(unit: Families, price: float) -> Picked:
    """The options of the least loss + price · cost, all of one family."""

    def value(picked: Picked) -> float:
        return sum(option.loss + price * option.cost for option in picked.values())

    every = [
        {name: min(options, key=lambda o: o.loss + price * o.cost) for name, options in own.items()}
        for own in unit.values()
    ]
    return min(every, key=value)


def _spend(units: Sequence[Families], picks: list[Picked], spare: float) -> None:
    """Change one linear or unit after another as long as that lowers the loss within `spare`."""
    while True:
        best: tuple[float, int, Picked, float] | None = None
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
    """Another option for one linear; or for all, in another family of single options."""
    now = family(next(iter(picked.values())).choice)
    for key, own in unit.items():
        if key == now:
            for name, options in own.items():
                yield from ({name: option} for option in options)
        else:
            steps = zip(*own.values(), strict=False)
            yield from (dict(zip(own, step, strict=True)) for step in steps)
