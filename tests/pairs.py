"""Few cases in which every two values of different parameters still meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(
    *axes: Sequence[Any], allowed: Callable[..., bool] = lambda *case: True
) -> list[tuple[Any, ...]]:
    """Choose cases greedily until each pair of values that some allowed case holds was chosen.

    Args:
        axes: the values of each parameter.
        allowed: says of one case whether it can be run at all.

    Returns:
        Cases with one value of each axis, in an order that is the same in every process.
    """
    places = list(combinations(range(len(axes)), 2))
    indices = product(*(range(len(axis)) for axis in axes))
    left = {
        case: {(a, case[a], b, case[b]) for a, b in places}
        for case in indices
        if allowed(*(axis[i] for axis, i in zip(axes, case, strict=True)))
    }
    wanted = set().union(*left.values())
    chosen = []
    while wanted:
        best = max(left, key=lambda case: len(left[case] & wanted))
        chosen.append(tuple(axis[i] for axis, i in zip(axes, best, strict=True)))
        wanted -= left.pop(best)
    return chosen
