"""The answer to a budget: ranked configurations, their recipes, and one plain sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from gblm.budget.amount import Budget
from gblm.budget.configurations import Configuration, configurations, spending
from gblm.budget.linears import Spending
from gblm.budget.recipes import groups, in_words, recipe_for
from gblm.budget.subject import Subject, Wanted, examine
from gblm.errors import UsageError
from gblm.progress import Progress, no_progress
from gblm.recipe import Recipe

# Predictions of two configurations that differ by less than this share say nothing.
MARGIN = 0.02


@dataclass(frozen=True)
class Question:
    """What a user asks.

    Attributes:
        recipe: model, text, method and steps of all candidates; their pattern, values and layers
            are the answer's.
        budget: to hold.
        wanted: what linears may become.
    """

    recipe: Recipe
    budget: Budget
    wanted: Wanted = field(default_factory=Wanted)


def answer(question: Question, progress: Progress = no_progress) -> dict[str, Any]:
    """Rank configurations that hold a budget, and the dense ones beside them.

    Weights and calibration text are read, one decoder layer at a time, and the kernels are probed;
    nothing is written.

    Args:
        question: the model and the budget.
        progress: for progress bars.

    Returns:
        Plain JSON types. "rows": the configurations that hold the budget, the least predicted loss
        first, then the dense ones that do not, each with "name", "fits", "what" in words,
        "bits_per_weight" and "bytes" (at most), "ms_per_token" (None where unknown), "loss" (the
        predicted rise in nats per token), "ratio" (of perplexities, exp of it), "groups" and
        "recipe". "verdict": whether a dense model is the better answer. "notes": what was left out.

    Raises:
        UsageError: nothing holds the budget.
        GblmError: what `prune` would refuse before it computes.
    """
    subject = examine(question.recipe, question.wanted, progress)
    limit = spending(subject, question.budget)
    every = [_row(subject, question.recipe, limit, own) for own in configurations(subject, limit)]
    fits = sorted((row for row in every if row["fits"]), key=lambda row: float(row["loss"]))
    if not fits:
        raise UsageError(_too_small(question.budget, subject, limit))
    others = [row for row in every if not row["fits"]]
    rows = [*fits, *sorted(others, key=lambda row: float(row["bits_per_weight"]))]
    for rank, row in enumerate(rows, start=1):
        row["rank"] = rank
    return {
        "kind": "budget",
        "model": question.recipe.model,
        "budget": str(question.budget),
        "method": question.recipe.method,
        "weights": subject.weights,
        "rest_bytes": subject.rest_bytes,
        "rest_ms": round(1e3 * subject.rest_seconds, 4) if subject.rates else None,
        "pass": subject.facts,
        "rows": rows,
        "verdict": verdict(rows, question.budget),
        "notes": list(subject.notes),
    }


def _row(subject: Subject, base: Recipe, limit: Spending, own: Configuration) -> dict[str, Any]:
    linears, allocation = subject.linears, own.allocation
    size = sum(linear.num_bytes(allocation[linear.name]) for linear in linears)
    loss = sum(subject.loss(linear, allocation[linear.name]) for linear in linears)
    zeros = sum(x.weights * allocation[x.name].pattern.sparsity for x in linears)
    found, milliseconds = groups(linears, allocation), None
    if subject.rates is not None:
        seconds = sum(subject.seconds(linear, allocation[linear.name]) for linear in linears)
        milliseconds = round(1e3 * (seconds + subject.rest_seconds), 4)
    recipe = recipe_for(base, linears, allocation, subject.specs, subject.every)
    return {
        "name": own.name,
        "dense": own.is_dense,
        "fits": limit.holds(linears, allocation),
        "what": in_words(found),
        "bits_per_weight": round(8 * size / subject.weights, 4),
        "bytes": size + subject.rest_bytes,
        "sparsity": round(zeros / subject.weights, 4),
        "ms_per_token": milliseconds,
        "loss": round(loss, 6),
        "ratio": round(math.exp(min(loss, 700.0)), 6),
        "groups": found,
        "recipe": recipe.to_dict(),
    }


def verdict(rows: list[dict[str, Any]], budget: Budget) -> str:
    """One sentence: whether zeros are worth it at this budget, by prediction.

    Args:
        rows: of `answer`.
        budget: that was asked for.
    """
    dense = next((row for row in rows if row["fits"] and row["dense"]), None)
    sparse = next((row for row in rows if row["fits"] and not row["dense"]), None)
    if dense is not None and sparse is None:
        return f"{_named(dense)} is the answer at {budget}: nothing with zeros holds it."
    if sparse is None:
        return f"nothing holds {budget}."
    if dense is None:
        smallest = min(
            (row for row in rows if row["dense"]), key=lambda row: row["bytes"], default=None
        )
        beside = f"; {_named(smallest)} needs more" if smallest is not None else ""
        return f"no dense model holds {budget}{beside}: the best with zeros is {_named(sparse)}."
    if dense["ratio"] <= sparse["ratio"] * (1 + MARGIN):
        return (
            f"{_named(dense)} is the better answer at {budget}: the best with zeros is "
            f"{_named(sparse)}, which is no better by more than {MARGIN:.0%}."
        )
    return (
        f"zeros are worth it at {budget}: {_named(sparse)} against {_named(dense)}, the best dense "
        "model that holds it."
    )


def _named(row: dict[str, Any]) -> str:
    return f"{row['name']} ({row['bits_per_weight']:.2f} bits, {row['ratio']:.3f}x the perplexity)"


def _too_small(budget: Budget, subject: Subject, limit: Spending) -> str:
    """Why nothing holds a budget, and what would."""
    least = sum(
        min(limit.cost(linear, subject.sparse(linear, kind, 0.9)) for kind in subject.specs)
        for linear in subject.linears
    )
    if budget.unit == "bits":
        need = f"{8 * least / subject.weights:.2f}bits"
    elif budget.unit == "bytes":
        need = f"{(least + subject.rest_bytes) / 1e6:.1f}MB"
    else:
        need = f"{1e3 * (least + subject.rest_seconds):.2f}ms/token"
    return f"budget {budget} is too small: nine zeros of ten still take about {need}."
