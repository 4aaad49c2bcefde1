"""`gblm search MODEL --budget B --output FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from gblm.commands.budget_options import budget_option, question
from gblm.commands.common import Command, emit, progress_bars, table
from gblm.commands.recipe_options import recipe_options
from gblm.record import command_line

OWN = frozenset({"budget", "output", "limit", "keep", "text", "eval_seq_len", "max_windows"})


@click.command("search", cls=Command)
@click.argument("model", required=False)
@budget_option(required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Candidates within the budget, the best predicted ones; dense models come on top.",
)
@click.option(
    "--keep",
    type=click.Choice(["best", "all"]),
    default="best",
    show_default=True,
    help="Which packed models stay in the folder.",
)
@click.option(
    "--text", default="pydoc", show_default=True, help="Held-out text, as in `gblm eval --text`."
)
@click.option(
    "--eval-seq-len",
    type=click.IntRange(2),
    default=512,
    show_default=True,
    help="Tokens per window of the held-out text.",
)
@click.option(
    "--max-windows", type=click.IntRange(1), default=32, show_default=True, help="Of that text."
)
@recipe_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    budget: str,
    output: Path,
    limit: int,
    keep: str,
    text: str,
    eval_seq_len: int,
    max_windows: int,
    recipe: Path | None,
    **given: Any,
) -> None:
    """Prune MODEL in the best ways that hold a budget, and measure the perplexity of each.

    The same command goes on where it was cut off; a larger --limit adds candidates.
    """
    with progress_bars(ctx) as progress:
        from gblm.budget.search import Search, search
        from gblm.evaluate.perplexity import Protocol

        asked = question(ctx, budget, recipe, given, OWN)
        protocol = Protocol(text, eval_seq_len, max_windows)
        wanted = Search(asked, output, limit, protocol, keep == "all", command_line(sys.argv[1:]))
        result = search(wanted, progress)
    emit(ctx, result, lambda: _print(result))


def _print(result: dict[str, Any]) -> None:
    dense = result["baseline"]["perplexity"]
    rows = [
        [
            row["name"] + ("" if row["fits"] else " (over budget)"),
            f"{row['measured']['bits_per_weight']:.2f}",
            f"{row['measured']['bytes'] / 1e6:.1f}",
            f"{row['measured']['perplexity']:.2f}",
            f"{row['measured']['ratio']:.3f}",
            f"{row['ratio']:.3f}",
            "yes" if row["on_frontier"] else "",
        ]
        for row in result["candidates"]
    ]
    rows.append(["unpruned", "", "", f"{dense:.2f}", "1.000", "", ""])
    table(["configuration", "bits", "MB", "perplexity", "ratio", "predicted", "frontier"], rows)
    click.echo(f"protocol: {result['baseline']['protocol']}")
    click.echo(f"best within {result['budget']}: {result['best']['folder']}")
    if result["figure"]:
        click.echo(f"picture: {result['figure']}")
    else:
        click.echo("no picture: it needs matplotlib (pip install 'gblm-toolkit[figure]').")
