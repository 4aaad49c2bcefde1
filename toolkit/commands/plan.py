"""`gblm plan MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.budget_options import budget_option, question, show, write_recipe
from gblm.commands.common import Command, emit, progress_bars, table
from gblm.commands.recipe_options import read_recipe, recipe_options

OWN = frozenset({"ranks", "budget", "write", "pick"})


@click.command("plan", cls=Command)
@click.argument("model", required=False)
@recipe_options
@click.option(
    "--ranks",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that share the samples, as torchrun starts them.",
)
@budget_option()
@click.option(
    "--write",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="With --budget: file for the recipe of the best configuration.",
)
@click.option(
    "--pick", type=click.IntRange(1), help="With --write: the row of the table (default 1)."
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    recipe: Path | None,
    ranks: int,
    budget: str | None,
    write: Path | None,
    pick: int | None,
    **given: Any,
) -> None:
    """Predict peak memory, disk and time of pruning MODEL, from shapes and a short probe.

    Takes the options of `gblm prune`. No weight or text is read and nothing is written.

    With --budget: rank the ways to hold a budget, by predicted perplexity. That takes one pass
    forward and backward over a little text, and the kernels are probed.
    """
    if budget is None and (write is not None or pick is not None):
        raise click.UsageError("--write and --pick go with --budget.")
    if budget is not None and ranks > 1:
        raise click.UsageError("--ranks does not go with --budget.")
    with progress_bars(ctx) as progress:
        if budget is not None:
            _spread(ctx, budget, recipe, given, write, pick, progress)
            return
        from gblm.plan import plan

        facts = plan(read_recipe(ctx, recipe, given, OWN), ranks)
    emit(ctx, facts, lambda: _print(facts))


def _spread(
    ctx: click.Context,
    budget: str,
    recipe: Path | None,
    given: dict[str, Any],
    write: Path | None,
    pick: int | None,
    progress: Any,
) -> None:
    """Answer a budget, and write the recipe if that is wanted."""
    from gblm.budget.answer import answer

    result = answer(question(ctx, budget, recipe, given, OWN), progress)
    if write is not None:
        write_recipe(write, result, pick or 1)
    emit(ctx, result, lambda: show(result))


def _print(facts: dict[str, Any]) -> None:
    on_gpu = facts["device"] != "cpu"
    head = ["phase", "peak RAM", *(["GPU"] if on_gpu else []), "time", "peak at"]
    rows = [["start", *[""] * (len(head) - 3), _time(facts["start_seconds"]), ""]]
    for phase in facts["phases"]:
        gpu = [_size(phase.get("gpu_bytes", 0))] if on_gpu else []
        row = [phase["phase"], _size(phase["ram_bytes"]), *gpu, _time(phase["seconds"])]
        rows.append([*row, phase["at"]])
    gpu = [_size(facts["gpu_bytes"])] if on_gpu else []
    rows.append(["in all", _size(facts["ram_bytes"]), *gpu, _time(facts["seconds"]), ""])
    table(head, rows)
    groups = [_group(group) for group in facts["groups"]]
    table(["pattern", "values", "linears", "weights", "bits/weight"], groups)
    disk = facts["disk"]
    click.echo(
        f"disk: {_size(disk['peak_bytes'])} at most, {_size(disk['output_bytes'])} of it the "
        f"output; {facts['dtype']}, {facts['threads']} threads, ranks {facts['ranks']}"
    )


def _group(group: dict[str, Any]) -> list[str]:
    return [
        group["pattern"],
        group["values"],
        str(group["linears"]),
        f"{group['weights']:,}",
        f"{group['bits_per_weight']:.2f}",
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds:.0f} s"
