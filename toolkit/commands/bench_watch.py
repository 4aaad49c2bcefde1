"""`gblm bench watch`."""

from __future__ import annotations

from pathlib import Path

import click

from gblm.commands.common import Command, progress_bars, record_option
from gblm.commands.records import hand_out


@click.command("watch", cls=Command)
@click.argument("url_a")
@click.argument("url_b")
@click.option("--duration", type=click.FloatRange(1), default=600, show_default=True,
              help="Seconds to watch.")  # fmt: skip
@click.option("--interval", type=click.FloatRange(0.1), default=10, show_default=True,
              help="Seconds between readings.")  # fmt: skip
@click.option(
    "--api-key-file", "key_files", type=click.Path(path_type=Path, dir_okay=False), multiple=True,
    help="File with the key for /metrics; twice: A's and B's.",
)  # fmt: skip
@record_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    url_a: str,
    url_b: str,
    duration: float,
    interval: float,
    key_files: tuple[Path, ...],
    output: Path | None,
) -> None:
    """Compare two live vLLM servers by their /metrics; sends them no requests of its own.

    URL_A is the server to compare with, URL_B the candidate, both under real traffic.
    """
    if len(key_files) > 2:
        raise click.UsageError("--api-key-file: give one file for both servers, or two.")
    key_a, key_b = (key_files * 2)[:2] if key_files else (None, None)
    with progress_bars(ctx) as progress:
        from gblm.bench.metrics import Target
        from gblm.bench.watch import Window, watch

        a, b = Target.of("A", url_a, key_a), Target.of("B", url_b, key_b)
        record = watch(a, b, Window(duration, interval), progress)
    hand_out(ctx, record, output)
