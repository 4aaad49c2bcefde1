"""`gblm recover PACKED --output OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import (
    Command,
    emit,
    folder_option,
    overwrite_option,
    progress_bars,
    table,
)
from gblm.commands.recipe_options import field_options
from gblm.recipe import Recipe, Recovering

HEADER = ("text", "KL, nats", "same top-1", "perplexity", "dense")
# What else a recovery may be told stands in the field "recover" of a recipe.
FIELDS = (
    "tokens", "minutes", "text", "held_out", "train", "learning_rate", "seq_len", "seed", "bos",
)  # fmt: skip


@click.command("recover", cls=Command)
@click.argument("packed")
@folder_option
@click.option("--baseline", help="The dense model. Default: the one it was made from.")
@field_options(Recovering, *FIELDS)
@field_options(Recipe, "device")
@overwrite_option
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where it was.")
@click.pass_context
def command(
    ctx: click.Context, /, packed: str, output: Path, baseline: str | None, device: str,
    overwrite: bool, resume: bool, **given: Any,
) -> None:  # fmt: skip
    """Train the packed folder PACKED towards its dense model; masks stay, no labels are used.

    The loss is the KL divergence of the whole next-token distribution. What it won is told on text
    that it was not trained on; if it won nothing, the folder keeps the weights as they were.
    """
    with progress_bars(ctx) as progress:
        from gblm.recover.run import recover

        how = Recovering.from_dict(given)
        report = recover(
            packed, output, how, baseline, device=device, overwrite=overwrite, resume=resume,
            progress=progress,
        )  # fmt: skip
    if report:
        emit(ctx, report, lambda: _show(report))


def _show(report: dict[str, Any]) -> None:
    show_recovery(report)
    click.echo(f"{report['output']}: {report['seconds']:.0f} s")


def show_recovery(report: dict[str, Any]) -> None:
    """Print what a recovery won on each held-out text."""
    rows = []
    for name, after in report["after"].items():
        before = report["before"][name]
        rows.append([
            name,
            *(f"{before[key]:.3f} → {after[key]:.3f}" for key in ("kl", "top1", "perplexity")),
            f"{after['perplexity_dense']:.3f}",
        ])  # fmt: skip
    table(HEADER, rows)
    kept = "" if report["kept"] else " (KL did not fall: the weights are those it started from)"
    click.echo(f"recovered on {report['tokens']} tokens{kept}")
