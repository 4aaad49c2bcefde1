"""`gblm search MODEL --budget B`: rank the ways to hold a budget, and write the best recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gblm.commands.common import Command, emit, progress_bars, table, with_a_place
from gblm.commands.recipe_options import (
    FAST,
    read_recipe,
    search_options,
    space_of,
    spread_recipe,
    with_preset,
)
from gblm.files import write_json

if TYPE_CHECKING:
    from gblm.recipe import Recipe
    from gblm.search.candidates import Budget
    from gblm.search.examine import Space

OWN = frozenset({"budget", "write"})


@click.command("search", cls=Command)
@click.argument("model", required=False)
@click.option(
    "--write",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=with_a_place,
    help="File for the recipe of the best candidate; gblm prune --recipe takes it.",
)
@search_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    budget: str | None,
    write: Path | None,
    recipe: Path | None,
    **given: Any,
) -> None:
    """Spread a budget over the linears of MODEL, and rank the ways to do it.

    They are ranked by a prediction, which takes one pass forward and backward over a little text.
    gblm prune --recipe makes the best of them from what --write wrote, gblm eval measures it; gblm
    prune --budget takes the best by itself.
    """
    with progress_bars(ctx) as progress:
        from gblm.search.candidates import answer

        result = answer(*_question(ctx, budget, recipe, given), progress)
    if write is not None:
        write.parent.mkdir(parents=True, exist_ok=True)
        write_json(write, result["rows"][0]["recipe"])
    emit(ctx, result, lambda: _show(result))


def _question(
    ctx: click.Context, budget: str | None, recipe: Path | None, given: dict[str, Any]
) -> tuple[Recipe, Budget, Space]:
    """Give what the command line asks, with `given` as the values of `search_options`."""
    from gblm.search.candidates import parse_budget
    from gblm.search.examine import EVERYTHING

    if budget is None:
        raise click.UsageError("give a --budget, such as 3.5bits or 150MB.")
    amount = parse_budget(budget)
    if recipe is not None:
        return read_recipe(ctx, recipe, given, OWN), amount, EVERYTHING
    steps = {"rounding": FAST["rounding"]} if given["method"] else {}
    chosen = with_preset(budget=budget, **given, **steps)
    return spread_recipe(chosen), amount, space_of(given["values"], given["pattern"])


def _show(result: Mapping[str, Any]) -> None:
    rows = [
        [
            row["name"] if row["fits"] else f"{row['name']} (over budget)",
            f"{row['bits_per_weight']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['ratio']:.3f}",
            row["what"],
        ]
        for row in result["rows"]
    ]
    table(["candidate", "bits", "MB", "ppl ratio", "what"], rows)
    click.echo(result["verdict"])
    click.echo("ppl ratio: predicted, against the unpruned model; it ranks, it is no measurement.")
