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
    "and that the dense OTHER, if given, equals the unpacked weights bit for bit.",
)
@click.pass_context
def command(ctx: click.Context, folder: str, other: str | None, verify: bool) -> None:
    """Show what is in FOLDER: pattern, bits per weight including the mask, size against dense.

    With OTHER the two model folders are shown side by side.
    """
    with progress_bars(ctx) as progress:
        from gblm.checkpoint import inspect
        from gblm.model.folder import ModelFolder
        from gblm.packed import check_loadable

        first = ModelFolder.open(folder)
        second = ModelFolder.open(other) if other else None
        verified = None
        if verify:
            check_loadable(first)
            verified = inspect.verify(first, second, progress)
        facts = inspect.side_by_side(first, second) if second else inspect.inspect(first)
    if verified is not None:
        facts["verified"] = verified
    emit(ctx, facts, lambda: _show(facts))


def _show(facts: dict[str, Any]) -> None:
    if "rows" in facts:
        _show_both(facts)
    else:
        _show_one(facts)
    if (found := facts.get("verified")) is not None:
        equal = f", equal to {found['compared_with']}" if found["compared_with"] else ""
        click.echo(
            f"verified: {found['files']} files, {found['linears']} packed weights, "
            f"{found['dense_tensors']} other tensors{equal}"
        )


def _show_both(facts: dict[str, Any]) -> None:
    rows = [
        [row["what"].replace("_", " "), _cell(row["a"]), _cell(row["b"]),
         f"{row['ratio']:.3f}" if "ratio" in row else ""]
        for row in facts["rows"]
    ]  # fmt: skip
    table(["", facts["a"], facts["b"], "second / first"], rows)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


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
