"""`gblm inspect DIR`."""

from __future__ import annotations

from typing import Any

import click

from gblm.commands.common import Command, emit, megabytes, table


@click.command("inspect", cls=Command)
@click.argument("folder")
@click.pass_context
def command(ctx: click.Context, folder: str) -> None:
    """Show what is in FOLDER: pattern, bits per weight including the mask, size against dense."""
    from gblm.checkpoint.inspect import inspect
    from gblm.folder import resolve

    facts = inspect(resolve(folder))
    emit(ctx, facts, lambda: _print(facts))


def _print(facts: dict[str, Any]) -> None:
    click.echo(f"{facts['folder']}: {facts['architecture']}, {facts['kind']}")
    if facts["kind"] == "dense":
        click.echo(
            f"{megabytes(facts['bytes'])}, {facts['sparsity']:.1%} of "
            f"{facts['layer_weights']:,} layer weights are zero"
        )
        return
    table(
        ["pattern", "format", "dtype", "linears", "weights", "zeros", "bits/weight"],
        [
            [
                g["pattern"],
                g["format"],
                g["dtype"],
                str(g["linears"]),
                f"{g['weights']:,}",
                f"{g['sparsity']:.1%}",
                f"{g['bits_per_weight']:.2f}",
            ]
            for g in facts["groups"]
        ],
    )
    click.echo(
        f"{megabytes(facts['bytes'])} packed, {megabytes(facts['bytes_if_dense'])} if dense "
        f"(ratio {facts['size_ratio']:.3f}); tensors stored as they are: "
        f"{megabytes(facts['bytes_dense_tensors'])}"
    )
