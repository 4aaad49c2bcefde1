"""Configurations: the ways to spend a budget that are compared, dense ones among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from gblm.budget.allocate import measured, owl, uniform
from gblm.budget.amount import Budget
from gblm.budget.linears import Allocation, Linear, Spending
from gblm.budget.subject import Subject
from gblm.choices import Choice
from gblm.errors import MachineError
from gblm.patterns import Dense, Unstructured

# Sparsities that a measured allocation chooses among: few groups, and no worse than all.
STEPS = tuple(round(0.05 * step, 2) for step in range(4, 18))


@dataclass(frozen=True)
class Configuration:
    """One way to spend a budget.

    Attributes:
        name: unique, such as "int4 measured".
        allocation: what each linear becomes.
    """

    name: str
    allocation: Allocation

    @property
    def is_dense(self) -> bool:
        """Whether it has no zeros."""
        return all(isinstance(choice.pattern, Dense) for choice in self.allocation.values())


def spending(subject: Subject, budget: Budget) -> Spending:
    """A budget in the currency of allocations.

    Raises:
        MachineError: it is a time, and times cannot be measured here.
    """
    if budget.unit == "ms":
        if subject.rates is None:
            raise MachineError(
                f"budget {budget}: {'; '.join(subject.notes)}. Give the budget in bits or bytes."
            )
        return Spending(subject.seconds, budget.amount / 1e3 - subject.rest_seconds)

    def cost(linear: Linear, choice: Choice) -> float:
        return linear.num_bytes(choice)

    if budget.unit == "bits":
        return Spending(cost, budget.amount * subject.weights / 8)
    return Spending(cost, budget.amount - subject.rest_bytes)


def configurations(subject: Subject, limit: Spending) -> list[Configuration]:
    """All of them, each allocation once; the dense int8 and int4 ones hold no budget."""
    found: dict[tuple[Choice, ...], Configuration] = {}
    for name, allocation in [*controls(subject), *_within(subject, limit)]:
        if allocation is not None:
            key = tuple(allocation[linear.name] for linear in subject.linears)
            found.setdefault(key, Configuration(name, allocation))
    return list(found.values())


def controls(subject: Subject) -> Iterator[tuple[str, Allocation]]:
    """Dense models of each value type: what sparse ones must beat."""
    for kind in subject.specs:
        if kind != "float":
            yield f"{kind} dense", {x.name: subject.dense(x, kind) for x in subject.linears}


def _within(subject: Subject, limit: Spending) -> Iterator[tuple[str, Allocation | None]]:
    """What is within the budget; None where nothing of the sort is."""
    linears = subject.linears
    for kind in subject.specs:
        yield from _fixed(subject, limit, kind)
        if "unstructured" not in subject.wanted.patterns:
            continue

        def make(linear: Linear, sparsity: float, kind: str = kind) -> Choice:
            return subject.sparse(linear, kind, sparsity)

        yield f"{kind} uniform", uniform(linears, make, limit)
        yield f"{kind} owl", owl(linears, make, limit, subject.sensitivity.outliers)
        loose = partial(_choices, subject, [kind], True, [])
        yield f"{kind} measured", measured(linears, loose, limit, subject.prudent_loss)
    mixed = partial(
        _choices, subject, list(subject.specs), "unstructured" in subject.wanted.patterns,
        [str(pattern) for pattern in subject.wanted.fixed],
    )  # fmt: skip
    yield "mixed measured", measured(linears, mixed, limit, subject.prudent_loss)


def _fixed(subject: Subject, limit: Spending, kind: str) -> Iterator[tuple[str, Allocation | None]]:
    """N:M for all linears, and N:M for some of them."""
    for pattern in subject.wanted.fixed:
        values = subject.values[kind]
        every = {own.name: Choice(pattern, values[own.name]) for own in subject.linears}
        if limit.holds(subject.linears, every):
            yield f"{kind} {pattern}", every
        some = partial(_choices, subject, [kind], False, [str(pattern)])
        found = measured(subject.linears, some, limit, subject.prudent_loss)
        yield f"{kind} {pattern} or dense, measured", found


def _choices(
    subject: Subject, kinds: list[str], loose: bool, patterns: list[str], linear: Linear
) -> Iterable[Choice]:
    """What a linear may become."""
    for kind in kinds:
        yield subject.dense(linear, kind)
        for pattern in subject.wanted.fixed:
            if str(pattern) in patterns:
                yield Choice(pattern, subject.values[kind][linear.name])
        for sparsity in STEPS if loose else ():
            yield Choice(Unstructured(sparsity), subject.values[kind][linear.name])
