"""From a command line to the question that gblm.budget answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gblm.commands.common import F, table
from gblm.commands.recipe_options import read_recipe, values_spec

if TYPE_CHECKING:
    from gblm.budget.answer import Question

# What candidates are made with as far as no option, preset or recipe says otherwise.
PRESET, ROUNDING = "fast", "obs"


def budget_option(required: bool = False) -> Callable[[F], F]:
    """The budget itself."""
    return click.option(
        "--budget",
        required=required,
        help="What the packed model may take: 3.5bits (per pruned weight, masks and scales "
        "counted), 2.1GB (all of it), 12ms/token (decoding on this machine).",
    )


def question(
    ctx: click.Context, budget: str, recipe: Path | None, given: dict[str, Any], own: frozenset[str]
) -> Question:
    """What the command line asks.

    Args:
        ctx: of the command.
        budget: its text.
        recipe: a file to take everything from but pattern, values and layers.
        given: values of `recipe_options`, and "model".
        own: options of the command itself.
    """
    from gblm.budget.amount import parse_budget
    from gblm.budget.answer import Question
    from gblm.budget.subject import Wanted

    asked = parse_budget(budget)
    if given["stats"] is not None:
        raise click.UsageError("--stats does not go with --budget: it takes gradients of its own.")
    if given["sparsity"] is not None:
        raise click.UsageError("--sparsity does not go with --budget, which decides it.")
    if recipe is not None:
        return Question(read_recipe(ctx, recipe, given, own), asked)
    values = _values(ctx, given)
    patterns = _patterns(ctx, given["pattern"])
    # Rounding belongs to integer values; recipes without any leave it out.
    fields = given | {"values": "int8", "group_size": None, "pattern": "dense"}
    if not (_is_given(ctx, "preset") or _is_given(ctx, "method")):
        fields["preset"] = PRESET
    if fields["preset"] is None and not _is_given(ctx, "rounding"):
        fields["rounding"] = ROUNDING
    return Question(read_recipe(ctx, None, fields, own), asked, Wanted(values, patterns))


def write_recipe(path: Path, result: Mapping[str, Any], pick: int) -> None:
    """Write the recipe of one row; `gblm prune --recipe` takes it.

    Args:
        path: of the file.
        result: of `gblm.budget.answer.answer`.
        pick: rank of the row.
    """
    rows = result["rows"]
    if not 1 <= pick <= len(rows):
        raise click.UsageError(f"--pick {pick}: the table has the rows 1 to {len(rows)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows[pick - 1]["recipe"], indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def show(result: Mapping[str, Any]) -> None:
    """Print the answer as a table."""
    rows = [
        [
            f"{row['rank']}  {row['name']}" + ("" if row["fits"] else " (over budget)"),
            f"{row['bits_per_weight']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            "unknown" if row["ms_per_token"] is None else f"{row['ms_per_token']:.2f}",
            f"{row['sparsity']:.0%}",
            f"{row['ratio']:.3f}",
            row["what"],
        ]
        for row in result["rows"]
    ]
    table(["configuration", "bits", "MB", "ms/token", "zeros", "ppl ratio", "what"], rows)
    click.echo(result["verdict"])
    click.echo(
        "ppl ratio: predicted, against the unpruned model; it ranks, it is no measurement. "
        "ms/token: linears and output head alone, one token, as probed here."
    )
    for note in result["notes"]:
        click.echo(f"note: {note}")


def _is_given(ctx: click.Context, name: str) -> bool:
    from click.core import ParameterSource

    return ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE


def _values(ctx: click.Context, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Value types that may be used: the one that --values names, else all."""
    size = given["group_size"]
    if _is_given(ctx, "values"):
        return (values_spec(given["values"], size),)
    return ("float", values_spec("int8", size), values_spec("int4", size))


def _patterns(ctx: click.Context, text: str) -> tuple[str, ...]:
    """Patterns that may be used: what --pattern names, else unstructured, 2:4 and 8:16."""
    from gblm.patterns import NM, parse

    if not _is_given(ctx, "pattern"):
        return ("unstructured", "2:4", "8:16")
    if text == "dense":
        return ()
    if text == "unstructured" or isinstance(parse(text), NM):
        return (text,)
    raise click.UsageError(
        f"--pattern {text} does not go with --budget, which decides the sparsity: give "
        "unstructured, N:M or dense."
    )
