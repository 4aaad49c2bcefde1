"""`gblm plan MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import emit, progress_bars, table
from gblm.commands.recipe_options import RecipeCommand, read_recipe, recipe_options

OWN = frozenset({"ranks"})


@click.command("plan", cls=RecipeCommand)
@click.argument("model", required=False)
@recipe_options
@click.option(
    "--ranks",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that share the samples, as torchrun starts them.",
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    recipe: Path | None,
    ranks: int,
    **given: Any,
) -> None:
    """Predict peak memory, disk and time of pruning MODEL, from shapes and a short probe.

    Takes the options of `gblm prune`. No weight or text is read and nothing is written.
    """
    with progress_bars(ctx):
        from gblm.plan import plan

        facts = plan(read_recipe(ctx, recipe, given, OWN), ranks)
    emit(ctx, facts, lambda: _print(facts))


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
