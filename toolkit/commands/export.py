"""`gblm export dense|pack|legacy SOURCE --output OUT`."""

from __future__ import annotations

from pathlib import Path

import click

from gblm.commands.common import (
    Command,
    emit,
    head_note,
    megabytes,
    options,
    overwrite_option,
    progress_bars,
)
from gblm.commands.recipe_options import head_option, values_options, values_spec

# Repeated here because the layouts themselves need torch; a test compares them.
LAYOUTS = ("sparse-24-bitmask", "sparse-bitmask")
output_options = options(
    click.argument("source"),
    click.option(
        "--output", type=click.Path(path_type=Path), required=True, help="Folder to make."
    ),
    overwrite_option,
)


@click.group("export")
def command() -> None:
    """Write a packed model for other tools, or pack a model pruned by other tools."""


@command.command("dense", cls=Command)
@output_options
@click.pass_context
def dense(ctx: click.Context, source: str, output: Path, overwrite: bool) -> None:
    """Unpack the packed folder SOURCE into an ordinary HF folder with zeros."""
    with progress_bars(ctx) as progress:
        from gblm.export.dense import export_dense
        from gblm.folder import resolve

        result = export_dense(resolve(source), output, overwrite, progress)
    emit(ctx, result, lambda: click.echo(
        f"{output}: {result['linears']} linears unpacked, "
        f"{megabytes(result['bytes_packed'])} packed -> {megabytes(result['bytes_dense'])} dense"
    ))  # fmt: skip


@command.command("pack", cls=Command)
@output_options
@click.option(
    "--pattern", help="Pattern the zeros must follow, found out if left out; dense keeps all."
)
@values_options
@head_option
@click.option("--ignore", multiple=True, help="Glob of module names to leave dense; repeatable.")
@click.pass_context
def pack(
    ctx: click.Context,
    source: str,
    output: Path,
    overwrite: bool,
    pattern: str | None,
    values: str,
    group_size: str | None,
    head: str,
    ignore: tuple[str, ...],
) -> None:
    """Pack SOURCE, a dense HF folder whose zeros are already there. Never prunes.

    With integer --values the weights are rounded to the nearest code, with --head the output
    head.
    """
    spec = values_spec(values, group_size)
    with progress_bars(ctx) as progress:
        from gblm.export.pack import export_pack

        result = export_pack(
            source, output, pattern, ignore, overwrite, progress, values=spec, head=head
        )
    facts = {key: value for key, value in result.items() if key != "tensors"}
    emit(ctx, facts | {"output": str(output)}, lambda: click.echo(
        f"{output}: {result['linears']} linears packed, {result['sparsity']:.1%} zeros, "
        f"{megabytes(result['bytes_dense'])} dense -> {megabytes(result['bytes_packed'])} packed"
        f"{head_note(result)}"
    ))  # fmt: skip


@command.command("legacy", cls=Command)
@output_options
@click.option("--to", type=click.Choice(LAYOUTS), help="Format to write a folder of gblm in.")
@click.pass_context
def legacy(ctx: click.Context, source: str, output: Path, overwrite: bool, to: str | None) -> None:
    """Convert SOURCE, a sparse checkpoint of compressed-tensors, bit for bit; or back with --to."""
    with progress_bars(ctx) as progress:
        from gblm.export.legacy import export_legacy

        result = export_legacy(source, output, to, overwrite, progress)
    facts = {key: value for key, value in result.items() if key != "tensors"}
    size = result["bytes_packed"] if to is None else result["bytes"]
    emit(ctx, facts | {"output": str(output)}, lambda: click.echo(
        f"{output}: {result['linears']} linears converted to {to or 'gblm'}, {megabytes(size)}"
    ))  # fmt: skip
