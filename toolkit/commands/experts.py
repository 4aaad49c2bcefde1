"""`gblm experts MODEL --keep N --output OUT`: remove whole experts of a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import (
    Command,
    emit,
    folder_option,
    megabytes,
    overwrite_option,
    progress_bars,
)
from gblm.commands.recipe_options import field_options
from gblm.recipe import Calibration, Recipe

TEXT = ("num_samples", "seq_len", "seed", "bos")


@click.command("experts", cls=Command)
@click.argument("model")
@click.option("--keep", type=click.IntRange(1), required=True, help="Experts that a layer keeps.")
@folder_option
@click.option(
    "--by",
    type=click.Choice(("reap", "frequency")),
    default="reap",
    show_default=True,
    help="Keep those that add most to a token's hidden state (REAP), or that the router sends most "
    "tokens.",
)
@click.option(
    "--calibration",
    "source",
    default=Calibration().source,
    show_default=True,
    help=Calibration.model_fields["source"].description,
)
@field_options(Calibration, *TEXT)
@field_options(Recipe, "device", "dtype", "max_shard_size")
@overwrite_option
@click.pass_context
def command(
    ctx: click.Context, /, model: str, keep: int, output: Path, by: str, source: str, **given: Any
) -> None:
    """Write MODEL, a mixture of experts, with fewer experts in each decoder layer.

    The folder is an ordinary one with smaller routers, which gblm prune takes like any other.
    """
    with progress_bars(ctx) as progress:
        from gblm.prune.experts import remove_experts

        text = Calibration(source=source, **{name: given.pop(name) for name in TEXT})
        report = remove_experts(model, output, keep, by, text, progress=progress, **given)
    emit(ctx, report, lambda: click.echo(
        f"{output}: {keep} of {report['experts']} experts in each of {report['layers']} layers, "
        f"which {report['share']:.1%} of the text's tokens went to\n"
        f"{megabytes(report['bytes_before'])} -> {megabytes(report['bytes_after'])}, "
        f"{report['seconds']:.0f} s"
    ))  # fmt: skip
