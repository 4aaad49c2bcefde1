"""`gblm report RUNS… --html FILE`."""

from __future__ import annotations

from pathlib import Path

import click

from gblm.commands.common import Command, emit

TITLE = "Pruned models"


@click.command("report", cls=Command)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="One self-contained page."
)
@click.option(
    "--markdown",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The tables alone.",
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    runs: tuple[Path, ...],
    html: Path | None,
    markdown: Path | None,
) -> None:
    """Show RUNS, which are record files (--output of bench and eval) and packed folders.

    Models are joined by name: the folder's in quality records, speed records and packed folders.
    Pictures need matplotlib: pip install 'gblm-toolkit[report]'.
    """
    if html is None and markdown is None:
        raise click.UsageError("give --html FILE, --markdown FILE, or both.")
    from gblm.report.page import html as in_html
    from gblm.report.page import markdown as in_markdown
    from gblm.report.sources import read_sources

    sources = read_sources(runs)
    written = []
    for path, make in ((html, in_html), (markdown, in_markdown)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(make(sources, TITLE), encoding="utf-8")
            written.append(str(path))
    result = {"written": written, "records": len(sources.records), "folders": len(sources.folders)}
    emit(ctx, result, lambda: click.echo("\n".join(f"wrote {path}" for path in written)))
