"""`gblm recover PACKED --output OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import (
    Command,
    device_option,
    emit,
    overwrite_option,
    progress_bars,
    table,
)
from gblm.commands.recipe_options import MIX

HEADER = ("text", "KL, nats", "same top-1", "perplexity", "dense")


@click.command("recover", cls=Command)
@click.argument("packed")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option("--baseline", help="The dense model. Default: the one that recipe.json names.")
@click.option(
    "--tokens", type=click.IntRange(1), default=65536, show_default=True, help="To train on."
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="As many of the tokens as fit into this time, by an estimate.",
)
@click.option(
    "--text",
    default=MIX,
    show_default=True,
    help="Sources and their shares: files, pydoc, wikitext2, c4, and self, what the dense model "
    "writes.",
)
@click.option(
    "--held-out",
    multiple=True,
    default=("pydoc", "self"),
    show_default=True,
    help="Text to measure KL on, before and after; again for each domain.",
)
@click.option(
    "--train",
    type=click.Choice(["auto", "weights", "scales"]),
    default="auto",
    show_default=True,
    help="All kept values; or norms and scales only, at almost no memory; auto takes weights where "
    "the machine can hold them.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1.5e-3,
    show_default=True,
    help="Of a weight's values, relative to their size; norms and factors take multiples of it.",
)
@click.option("--seq-len", type=click.IntRange(2), default=256, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--bos/--no-bos", default=True, show_default=True, help="Begin windows as prompts do."
)
@device_option
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
        from gblm.recipe import Recovering
        from gblm.recover.run import recover

        how = Recovering(**given)
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
