"""Candidates: the ways to hold a budget, ranked by predicted loss, each with its recipe."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from gblm.errors import UsageError
from gblm.progress import Progress, no_progress
from gblm.recipe import LayerChoice, Recipe
from gblm.search.allocate import (
    Allocation,
    LinearSpec,
    measured,
    total_bytes,
)
from gblm.search.examine import EVERYTHING, Examined, Space, examine
from gblm.sparse.formats import Format
from gblm.sparse.formats.manifest import group_targets
from gblm.sparse.patterns import Dense, Pattern, Unstructured

logger = logging.getLogger(__name__)
Unit = Literal["bits", "bytes"]
WORDS: dict[str, tuple[Unit, float]] = {
    "bit": ("bits", 1), "bits": ("bits", 1),
    "kb": ("bytes", 1e3), "mb": ("bytes", 1e6), "gb": ("bytes", 1e9), "tb": ("bytes", 1e12),
    "kib": ("bytes", 2**10), "mib": ("bytes", 2**20), "gib": ("bytes", 2**30),
    "tib": ("bytes", 2**40),
}  # fmt: skip
# Sparsities that a measured allocation chooses among: few groups, and no worse than all.
STEPS = tuple(round(0.05 * step, 2) for step in range(4, 18))


@dataclass(frozen=True)
class Budget:
    """A budget bounds a packed model; str() gives the text it was read from.

    "bits" are counted per weight of the linears to prune, with masks and scales; "bytes" are those
    of all tensors of the packed folder.
    """

    unit: Unit
    amount: float
    text: str

    def __str__(self) -> str:
        return self.text

    def limit(self, weights: int, rest: int) -> float:
        """Give the bytes that all packed linears together may take.

        Args:
            weights: how many weights the linears have.
            rest: bytes of the packed folder's other tensors.
        """
        return self.amount * weights / 8 if self.unit == "bits" else self.amount - rest


def parse_budget(text: str) -> Budget:
    """Read `3.5bits`, `150MB`, `2.1GB` or `1.9GiB`.

    Raises:
        UsageError: the text is none of these, or the amount is not above 0.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?|\.\d{1,6})\s*([A-Za-z]{2,4})", text.strip())
    word = WORDS.get(match[2].lower()) if match else None
    if match is None or word is None:
        raise UsageError(
            f"budget {text[:40]!r} is unknown: give bits per pruned weight (3.5bits) or bytes of "
            "the packed model (150MB, 2.1GB)."
        )
    amount = float(match[1]) * word[1]
    if amount <= 0:
        raise UsageError(f"budget {text[:40]!r}: the amount must be above 0.")
    return Budget(word[0], amount, text.strip())


def answer(
    recipe: Recipe, budget: Budget, space: Space = EVERYTHING, progress: Progress = no_progress
) -> dict[str, Any]:
    """Rank the candidates that hold a budget, with the dense ones that do not behind them.

    Weights and calibration text are read, one decoder layer at a time; nothing is written.

    Args:
        recipe: gives model, text, method and steps of all candidates.
        budget: that they hold.
        space: the patterns and values that their linears may have.
        progress: for progress bars.

    Returns:
        Plain JSON types. "rows": the candidates that hold the budget, the least predicted loss
        first, then the dense ones that do not. Each has "name", "fits", "what" in words,
        "bits_per_weight" and "bytes" (at most), "loss" (the predicted rise in nats per token),
        "ratio" (of perplexities, exp of it) and "recipe". "verdict": the best in words, and whether
        it is dense.

    Raises:
        UsageError: nothing holds the budget.
        GblmError: whatever `prune` would refuse before it computes.
    """
    model = examine(recipe, space, progress)
    limit = budget.limit(model.weights, model.rest_bytes)
    every = [
        _row(model, recipe, limit, name, allocation)
        for name, allocation in allocations(model, limit).items()
    ]
    fits = sorted((row for row in every if row["fits"]), key=lambda row: float(row["loss"]))
    if not fits:
        raise UsageError(_too_small(budget, model))
    others = [row for row in every if not row["fits"]]
    rows = [*fits, *sorted(others, key=lambda row: float(row["bits_per_weight"]))]
    name = rows[0]["name"]
    verdict = (
        f"zeros are worth it at {budget}, by prediction: {name} is better than any dense model."
    )
    if rows[0]["dense"]:
        verdict = f"{name} is the answer at {budget}, by prediction: nothing with zeros is better."
    return {"budget": str(budget), "rows": rows, "verdict": verdict}


def best(
    recipe: Recipe, budget: Budget, space: Space = EVERYTHING, progress: Progress = no_progress
) -> Recipe:
    """Give the recipe of the candidate with the least predicted loss; see `answer`."""
    row = answer(recipe, budget, space, progress)["rows"][0]
    logger.info("%s: %s, %.2f bits per weight", budget, row["what"], row["bits_per_weight"])
    return Recipe.from_dict(row["recipe"])


def allocations(model: Examined, limit: float) -> dict[str, Allocation]:
    """Give every candidate by name, each allocation once.

    Dense models of each integer value type come first, whatever they take: they are what sparse
    ones must beat. All others hold the budget.

    Args:
        model: to allocate to.
        limit: bytes of all linears together.
    """
    found: dict[tuple[Format, ...], tuple[str, Allocation]] = {}
    for name, allocation in [*_controls(model), *_within(model, limit)]:
        if allocation is not None:
            key = tuple(allocation[linear.name] for linear in model.linears)
            found.setdefault(key, (name, allocation))
    return dict(found.values())


def _controls(model: Examined) -> Iterator[tuple[str, Allocation]]:
    for kind in model.specs:
        if kind != "float":
            yield f"{kind} dense", _alike(model, kind, Dense())


def _alike(model: Examined, kind: str, pattern: Pattern) -> Allocation:
    """Give all linears the same."""
    return {linear.name: model.fmt(linear, kind, pattern) for linear in model.linears}


def _within(model: Examined, limit: float) -> Iterator[tuple[str, Allocation | None]]:
    """Spend the budget in several ways; None where nothing of the sort holds it."""
    patterns = model.judgement.patterns
    steps = [Unstructured(step) for step in STEPS] if model.has_unstructured else []

    def least_loss(kinds: Iterable[str], patterns: Iterable[Pattern]) -> Allocation | None:
        ways = partial(_ways, model, list(kinds), list(patterns))
        return measured(model.linears, ways, limit, model.loss)

    for kind in model.kinds_with_zeros:
        for pattern in patterns:
            every = _alike(model, kind, pattern)
            holds = total_bytes(model.linears, every) <= limit
            yield f"{kind} {pattern}", every if holds else None
            yield f"{kind} {pattern} or dense, measured", least_loss([kind], [pattern])
        if steps:
            yield f"{kind} measured", least_loss([kind], steps)
    yield "dense measured", least_loss(_around(model, limit), [])


def _around(model: Examined, limit: float) -> list[str]:
    """Name the two kinds of values between whose dense models the budget lies, or the nearest.

    Choosing among more of them is better by prediction, and worse: docs/log.md, 2026-12-02.
    """
    linears = model.linears
    sizes = {kind: total_bytes(linears, _alike(model, kind, Dense())) for kind in model.specs}
    fitting = sorted((kind for kind in sizes if sizes[kind] <= limit), key=sizes.__getitem__)
    above = sorted(sizes.keys() - fitting, key=sizes.__getitem__)
    return [*fitting[-1:], *above[:1]]


def _ways(
    model: Examined, kinds: Iterable[str], patterns: Iterable[Pattern], linear: LinearSpec
) -> Iterator[Format]:
    """List what a linear may become: dense, or of one of the patterns, with each kind of values."""
    for kind in kinds:
        for pattern in (Dense(), *(patterns if kind in model.kinds_with_zeros else ())):
            yield model.fmt(linear, kind, pattern)


def _row(
    model: Examined, base: Recipe, limit: float, name: str, allocation: Allocation
) -> dict[str, Any]:
    size = total_bytes(model.linears, allocation)
    loss = sum(model.loss(linear, allocation[linear.name]) for linear in model.linears)
    zeros = sum(x.weights * allocation[x.name].pattern.sparsity for x in model.linears)
    return {
        "name": name,
        "dense": all(isinstance(fmt.pattern, Dense) for fmt in allocation.values()),
        "fits": size <= limit,
        "what": in_words(model.linears, allocation),
        "bits_per_weight": round(8 * size / model.weights, 4),
        "bytes": size + model.rest_bytes,
        "sparsity": round(zeros / model.weights, 4),
        "loss": round(loss, 6),
        "ratio": round(math.exp(min(loss, 700.0)), 6),
        "recipe": recipe_for(base, model, allocation).to_dict(),
    }


def recipe_for(base: Recipe, model: Examined, allocation: Mapping[str, Format]) -> Recipe:
    """Give the recipe of an allocation, without steps that would have nothing to do.

    Args:
        base: gives everything but pattern, values, layers and ends.
        model: the linears that were allocated to.
        allocation: what each becomes.
    """
    names: dict[tuple[str, str], list[str]] = {}
    weights: dict[tuple[str, str], int] = {}
    for linear in model.linears:
        fmt = allocation[linear.name]
        way = (str(fmt.pattern), model.specs[fmt.values.kind])
        names.setdefault(way, []).append(linear.name)
        weights[way] = weights.get(way, 0) + linear.weights
    most = max(weights, key=lambda way: weights[way])
    layers = tuple(
        LayerChoice(targets=group_targets(own, model.every), pattern=pattern, values=values)
        for (pattern, values), own in names.items()
        if (pattern, values) != most
    )
    rounded = any(not fmt.values.is_float for fmt in allocation.values())
    pruned = any(not isinstance(fmt.pattern, Dense) for fmt in allocation.values())
    changes = {
        "pattern": most[0],
        "values": most[1],
        "layers": layers,
        "dense_ends": 0,
        "rounding": base.rounding if rounded else "nearest",
        "refit": base.refit if pruned else None,
    }
    return base.model_copy(update=changes)


def in_words(linears: Iterable[LinearSpec], allocation: Allocation) -> str:
    """Say an allocation in a few words, such as "int4 0.35 to 0.7, int8 dense"."""
    alike: dict[tuple[str, str], list[LinearSpec]] = {}
    for linear in linears:
        fmt = allocation[linear.name]
        pattern = "" if isinstance(fmt.pattern, Unstructured) else str(fmt.pattern)
        alike.setdefault((fmt.values.kind, pattern), []).append(linear)
    words = []
    for (kind, pattern), own in sorted(
        alike.items(), key=lambda item: -sum(linear.weights for linear in item[1])
    ):
        shares = sorted({allocation[linear.name].pattern.sparsity for linear in own})
        ends = f"{shares[0]:g}" if len(shares) == 1 else f"{shares[0]:g} to {shares[-1]:g}"
        words.append(f"{kind} {pattern or ends}")
    return ", ".join(words)


def _too_small(budget: Budget, model: Examined) -> str:
    """Say why nothing holds a budget, and what would."""
    steps = [Unstructured(STEPS[-1])] if model.has_unstructured else []
    ways = partial(_ways, model, model.specs, [*model.judgement.patterns, *steps])
    least = sum(min(map(linear.num_bytes, ways(linear))) for linear in model.linears)
    if budget.unit == "bits":
        need = f"{8 * least / model.weights:.2f}bits"
    else:
        need = f"{(least + model.rest_bytes) / 1e6:.1f}MB"
    return f"budget {budget} is too small: these patterns and values take {need} at least."
