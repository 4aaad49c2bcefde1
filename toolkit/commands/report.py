"""`gblm report RUNS… --output FILE`."""

from __future__ import annotations

from pathlib import Path

import click

from gblm.commands.common import Command, emit, with_a_place

TITLE = "Pruned models"


@click.command("report", cls=Command)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=with_a_place, help="The page: one self-contained HTML file.",
)  # fmt: skip
@click.pass_context
def command(ctx: click.Context, /, runs: tuple[Path, ...], output: Path) -> None:
    """Show RUNS, which are record files (--output of bench and eval) and packed folders.

    Models are joined by name: the folder's in quality records, speed records and packed folders.
    Pictures need matplotlib: pip install 'gblm-toolkit[report]'.
    """
    from gblm.report.page import html
    from gblm.report.sources import read_sources

    sources = read_sources(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(html(sources, TITLE), encoding="utf-8")
    found = {"records": len(sources.records), "folders": len(sources.folders)}
    emit(ctx, {"output": str(output)} | found, lambda: click.echo(f"wrote {output}"))
