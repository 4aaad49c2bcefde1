"""`gblm verify DIR`."""

from __future__ import annotations

import click

from gblm.commands.common import Command, emit, progress_bars


@click.command("verify", cls=Command)
@click.argument("folder")
@click.option("--against", help="Dense folder that the unpacked weights must equal bit for bit.")
@click.pass_context
def command(ctx: click.Context, folder: str, against: str | None) -> None:
    """Re-open the packed FOLDER: hashes, headers, masks, pattern, exact unpacking, config.json."""
    with progress_bars(ctx) as progress:
        from gblm.checkpoint.verify import verify
        from gblm.model.folder import ModelFolder
        from gblm.packed import check_loadable

        opened = ModelFolder.open(folder)
        check_loadable(opened)
        facts = verify(opened, ModelFolder.open(against) if against else None, progress)
    compared = f", equal to {against}" if against else ""
    emit(ctx, facts, lambda: click.echo(
        f"{folder}: ok, {facts['files']} files, {facts['linears']} packed weights, "
        f"{facts['dense_tensors']} other tensors{compared}"
    ))  # fmt: skip
