"""`gblm prune MODEL --output OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import (
    emit,
    folder_option,
    head_note,
    megabytes,
    overwrite_option,
    progress_bars,
    table,
)
from gblm.commands.recipe_options import RecipeCommand, read_recipe, recipe_options
from gblm.commands.recover import show_recovery

OWN = frozenset({"output", "overwrite", "resume", "dry_run"})


@click.command("prune", cls=RecipeCommand)
@click.argument("model", required=False)
@folder_option
@recipe_options
@overwrite_option
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Go on after the finished layers of the same command.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything and tell what would be written; write nothing.",
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    output: Path,
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    recipe: Path | None,
    **given: Any,
) -> None:
    """Prune MODEL (a local HF folder or a hub id) and write it packed.

    Nothing appears under the output's name until everything is complete; finished layers are kept
    beside it until then. Several processes: torchrun --nproc-per-node N -m gblm prune …
    """
    with progress_bars(ctx) as progress:
        from gblm.checkpoint.report import in_words
        from gblm.checkpoint.write import check_output
        from gblm.prune import run

        # Before a budget is spread, which takes a while.
        check_output(output, overwrite)
        chosen = read_recipe(ctx, recipe, given, OWN, progress)
        target = run.Output(output, overwrite, resume)
        report = run.dry_run(chosen, target) if dry_run else run.prune(chosen, target, progress)
    if dry_run:
        return emit(ctx, report, lambda: _print_dry_run(report))
    if not report:
        return  # rank 0 tells

    codes = any("values" in group for group in report["groups"])
    included = "mask and scales" if codes else "mask"

    def text() -> None:
        click.echo(
            f"{report['output']}: {chosen.method} {in_words(report)}, "
            f"{report['linears']} linears, {report['sparsity']:.1%} zeros"
        )
        click.echo(
            f"{megabytes(report['bytes_dense'])} dense -> "
            f"{megabytes(report['bytes_packed'])} packed "
            f"({report['bits_per_weight']:.2f} bits per pruned weight, {included} included"
            f"{head_note(report)}), {report['seconds']:.0f} s"
        )
        if "recover" in report:
            show_recovery(report["recover"])

    emit(ctx, {key: value for key, value in report.items() if key != "tensors"}, text)


def _print_dry_run(facts: dict[str, Any]) -> None:
    rows = [
        [
            row["pattern"],
            row["values"],
            str(row["linears"]),
            f"{row['weights']:,}",
            f"{row['bits_per_weight']:.2f}",
        ]
        for row in facts["groups"]
    ]
    table(["pattern", "values", "linears", "weights", "bits/weight"], rows)
    size = "exactly" if facts["exact"] else "at most"
    click.echo(
        f"packed: {size} {megabytes(facts['bytes_packed'])} of {megabytes(facts['bytes_dense'])} "
        f"dense, {facts['bits_per_weight']:.2f} bits per pruned weight; head {facts['head']}"
    )
    click.echo(f"disk while it runs, at most: {megabytes(facts['disk_bytes'])}")
    click.echo("dry run: nothing was written.")
