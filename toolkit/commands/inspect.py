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
    from gblm.model.folder import ModelFolder

    facts = inspect(ModelFolder.open(folder))
    emit(ctx, facts, lambda: _print(facts))


def _print(facts: dict[str, Any]) -> None:
    click.echo(f"{facts['folder']}: {facts['architecture']}, {facts['kind']}")
    if facts["kind"] == "dense":
        click.echo(
            f"{megabytes(facts['bytes'])}, {facts['sparsity']:.1%} of "
            f"{facts['layer_weights']:,} layer weights are zero"
        )
        return
    rows = [_row(group, str(group["linears"])) for group in facts["groups"]]
    if "head" in facts:
        rows.append(_row(facts["head"], facts["head"]["name"]))
    table(["pattern", "format", "dtype", "linears", "weights", "zeros", "bits/weight"], rows)
    click.echo(
        f"{megabytes(facts['bytes'])} packed, {megabytes(facts['bytes_if_dense'])} if dense "
        f"(ratio {facts['size_ratio']:.3f}); tensors stored as they are: "
        f"{megabytes(facts['bytes_dense_tensors'])}"
    )


def _row(group: dict[str, Any], linears: str) -> list[str]:
    return [
        group["pattern"],
        group["format"],
        group["dtype"],
        linears,
        f"{group['weights']:,}",
        f"{group['sparsity']:.1%}",
        f"{group['bits_per_weight']:.2f}",
    ]
