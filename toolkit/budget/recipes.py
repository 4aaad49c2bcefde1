"""From an allocation to the recipe that `gblm prune` takes, and to a few words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gblm.budget.linears import Allocation, Linear
from gblm.choices import Choice
from gblm.formats.manifest import group_targets
from gblm.patterns import Dense, Unstructured
from gblm.recipe import LayerChoice, Recipe


def recipe_for(
    base: Recipe,
    linears: Sequence[Linear],
    allocation: Mapping[str, Choice],
    specs: Mapping[str, str],
    every: Iterable[str],
) -> Recipe:
    """The recipe whose choices are an allocation's, without steps that would have nothing to do.

    Args:
        base: everything but pattern, values and layers.
        linears: that are allocated to.
        allocation: what each becomes.
        specs: value types as they were asked for, by kind, such as "int4:auto".
        every: names of all linears of the decoder layers.
    """
    names: dict[tuple[str, str], list[str]] = {}
    weights: dict[tuple[str, str], int] = {}
    for linear in linears:
        choice = allocation[linear.name]
        way = (str(choice.pattern), specs[choice.values.kind])
        names.setdefault(way, []).append(linear.name)
        weights[way] = weights.get(way, 0) + linear.weights
    most = max(weights, key=lambda way: weights[way])
    known = tuple(every)
    layers = tuple(
        LayerChoice(targets=group_targets(own, known), pattern=pattern, values=values)
        for (pattern, values), own in names.items()
        if (pattern, values) != most
    )
    rounded = any(not choice.values.is_float for choice in allocation.values())
    pruned = any(not isinstance(choice.pattern, Dense) for choice in allocation.values())
    return base.model_copy(
        update={
            "pattern": most[0],
            "values": most[1],
            "layers": layers,
            "rounding": base.rounding if rounded else "nearest",
            "refit": base.refit if pruned else None,
        }
    )


def groups(linears: Sequence[Linear], allocation: Allocation) -> list[dict[str, Any]]:
    """The linears by kind of pattern and values, plain JSON types, those of most weights first."""
    found: dict[tuple[str, str], list[Linear]] = {}
    for linear in linears:
        choice = allocation[linear.name]
        loose = isinstance(choice.pattern, Unstructured)
        way = ("unstructured" if loose else str(choice.pattern), choice.values.kind)
        found.setdefault(way, []).append(linear)
    rows = []
    for (pattern, kind), own in found.items():
        sparsities = [allocation[linear.name].pattern.sparsity for linear in own]
        rows.append({
            "pattern": pattern,
            "values": kind,
            "linears": len(own),
            "weights": sum(linear.weights for linear in own),
            "sparsity_min": min(sparsities),
            "sparsity_max": max(sparsities),
        })  # fmt: skip
    return sorted(rows, key=lambda row: -int(row["weights"]))


def in_words(rows: Iterable[Mapping[str, Any]]) -> str:
    """Groups in a few words, such as "int4 0.35 to 0.7, int8 dense"."""
    words = []
    for row in rows:
        pattern = row["pattern"]
        if pattern == "unstructured":
            low, high = row["sparsity_min"], row["sparsity_max"]
            pattern = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        words.append(f"{row['values']} {pattern}")
    return ", ".join(words)
