"""Curves: what zeros and rounding cost one linear, as predicted from its inputs and outputs.

The formula stands in gblm.budget.sensitivity, which takes the statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gblm.choices import Choice
from gblm.patterns import NM, Dense, Unstructured
from gblm.values import ValueType, quantize

# Sparsities at which a curve is known; between them it is a straight line.
GRID = tuple(round(0.01 * step, 2) for step in range(96))
# Weights of a linear that are looked at: rows at equal distances.
SAMPLED = 1 << 17
# Columns whose weights compete in SparseGPT.
BLOCK = 128
# What a model loses is this share of the formula; fitted to uniformly pruned SmolLM2-135M.
SHARE = 0.68


@dataclass(frozen=True)
class Judgement:
    """How the pipeline of a recipe chooses and rounds.

    Attributes:
        values: the value types in question, `resolve`d per linear by full name, by kind.
        patterns: further patterns in question, besides unstructured and dense ones.
        makes_up: whether later columns make up for pruned weights.
        rounding: as in Recipe.
    """

    values: Mapping[str, Mapping[str, ValueType]]
    patterns: Sequence[NM]
    makes_up: bool
    rounding: str


@dataclass(frozen=True)
class Curve:
    """The predicted rise of the loss, in nats per token, of one linear.

    Attributes:
        sparse: by kind of values, for each sparsity of GRID; the first is the dense one.
        fixed: by pattern and kind of values.
    """

    sparse: Mapping[str, tuple[float, ...]]
    fixed: Mapping[tuple[str, str], float]

    def loss(self, choice: Choice) -> float:
        """Of a choice whose values and pattern are among those that were judged."""
        kind, pattern = choice.values.kind, choice.pattern
        if isinstance(pattern, Dense):
            return self.sparse[kind][0]
        if not isinstance(pattern, Unstructured):
            return self.fixed[str(pattern), kind]
        known = self.sparse[kind]
        place = pattern.sparsity / GRID[1]
        low = min(int(place), len(GRID) - 2)
        return known[low] + (place - low) * (known[low + 1] - known[low])


def curve(
    weight: Tensor,
    outputs: Tensor,
    drop: Tensor,
    rounding: Tensor,
    values: Mapping[str, ValueType],
    judgement: Judgement,
) -> Curve:
    """Judge one linear.

    Args:
        weight: [out, in] floating point.
        outputs: [out], mean over samples of Σ over tokens of (∂L/∂y)².
        drop: [in], what a unit error of a pruned weight costs; see `column_costs`.
        rounding: [in], the same of a rounded one.
        values: the value types by kind, resolved.
        judgement: the rest.
    """
    stride = max(1, weight.numel() // SAMPLED)
    rows, each = weight[::stride].float(), outputs[::stride].float()
    # H is twice a mean over samples of sums over tokens; a half each for it and for the curvature.
    each = SHARE * 0.25 * each * (outputs.sum() / each.sum().clamp_min(torch.finfo().tiny))
    scores = rows.square() * drop
    dropped, kept = scores * each.unsqueeze(1), {}
    for kind, own in values.items():
        error = _rounding_error(rows, own, rounding, judgement.rounding)
        kept[kind] = error.mul_(rounding).mul_(each.unsqueeze(1))
    fixed = {}
    for pattern in judgement.patterns:
        mask, more = pattern.keep(scores, "row"), crowding(pattern.sparsity, judgement.makes_up)
        for kind, error in kept.items():
            fixed[str(pattern), kind] = float(torch.where(mask, error, more * dropped).sum())
    sparse = _sparse(scores, dropped, kept, judgement.makes_up)
    return Curve(sparse, fixed)


def crowding(sparsity: float, makes_up: bool) -> float:
    """How much more dropped weights cost when others go, too: columns that go make up for little.

    The sum over pruned weights alone falls short of the errors of SparseGPT's sweeps by this much;
    a fit to three decoder layers of SmolLM2-135M at sparsities from 0.3 to 0.85.
    """
    return 1 / (1 - sparsity**2 / 2) if makes_up else 1.0


def _sparse(
    scores: Tensor, dropped: Tensor, kept: Mapping[str, Tensor], makes_up: bool
) -> dict[str, tuple[float, ...]]:
    """Totals at each sparsity of GRID; weights compete in blocks of columns, or in their row."""
    block = BLOCK if makes_up else 0
    more = torch.tensor([crowding(share, makes_up) for share in GRID], dtype=torch.float64)
    totals = {kind: torch.zeros(len(GRID), dtype=torch.float64) for kind in kept}
    columns = scores.shape[1]
    for start in range(0, columns, block or columns):
        stop = start + (block or columns)

        def competing(matrix: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return matrix[:, start:stop].reshape(1, -1) if block else matrix

        order = competing(scores).argsort(dim=1)
        size = order.shape[1]
        places = torch.tensor([int(share * size) for share in GRID])
        gone = more * _before(competing(dropped).gather(1, order), places)
        for kind, error in kept.items():
            ordered = competing(error).gather(1, order)
            totals[kind] += gone + float(ordered.double().sum()) - _before(ordered, places)
    return {kind: tuple(total.tolist()) for kind, total in totals.items()}


def _before(ordered: Tensor, places: Tensor) -> Tensor:
    """Sums over all rows of what stands before each place, float64 on the CPU."""
    by_place = ordered.double().sum(dim=0).cumsum(0).cpu()
    return torch.cat([by_place.new_zeros(1), by_place])[places]


def _rounding_error(rows: Tensor, values: ValueType, costs: Tensor, rounding: str) -> Tensor:
    """Squared distances to what is stored, [rows, in]."""
    if values.is_float:
        return torch.zeros_like(rows)
    every = torch.ones_like(rows, dtype=torch.bool)
    if rounding == "nearest":
        return (rows - quantize(rows, every, values).weight).square_()
    rounded = quantize(rows, every, values, rounding="mse", importance=costs)
    return (rows - rounded.weight).square_()
