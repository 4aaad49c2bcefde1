"""`gblm inspect DIR [DIR2] [--verify]`."""

from __future__ import annotations

from typing import Any

import click

from gblm.commands.common import Command, emit, megabytes, progress_bars, table


@click.command("inspect", cls=Command)
@click.argument("folder")
@click.argument("other", required=False)
@click.option(
    "--verify",
    is_flag=True,
    help="Check the packed FOLDER: hashes, headers, masks, patterns, exact unpacking, config.json; "
    "and, if OTHER is given, that this dense folder equals the unpacked weights bit for bit.",
)
@click.pass_context
def command(ctx: click.Context, folder: str, other: str | None, verify: bool) -> None:
    """Show what is in FOLDER: pattern, bits per weight including the mask, size against dense.

    OTHER is shown below it.
    """
    with progress_bars(ctx) as progress:
        from gblm.checkpoint import inspect
        from gblm.model.folder import ModelFolder
        from gblm.packed import check_loadable

        first = ModelFolder.open(folder)
        second = ModelFolder.open(other) if other else None
        found: dict[str, Any] = {}
        if verify:
            check_loadable(first)
            found["verified"] = inspect.verify(first, second, progress)
        if second is not None:
            found["other"] = inspect.inspect(second)
        facts = inspect.inspect(first) | found
    emit(ctx, facts, lambda: _show(facts))


def _show(facts: dict[str, Any]) -> None:
    _show_one(facts)
    if "other" in facts:
        _show_one(facts["other"])
    if (found := facts.get("verified")) is not None:
        equal = f", equal to {found['compared_with']}" if found["compared_with"] else ""
        click.echo(
            f"verified: {found['files']} files, {found['linears']} packed weights, "
            f"{found['dense_tensors']} other tensors{equal}"
        )


def _show_one(facts: dict[str, Any]) -> None:
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
