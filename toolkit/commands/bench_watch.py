"""`gblm bench watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import Command, emit, progress_bars, record_option, save_record, table

LABELS = {
    "ttft": "TTFT (s)",
    "tpot": "TPOT (s)",
    "itl": "inter-token latency (s)",
    "e2e": "end to end (s)",
    "throughput": "generated (tok/s)",
    "aborted": "aborted (%)",
    "failed": "failed (%)",
    "http_5xx": "HTTP 5xx (%)",
}


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
        from gblm.bench.scrape import Target
        from gblm.bench.watch import Window, watch

        a, b = Target.of("A", url_a, key_a), Target.of("B", url_b, key_b)
        record = watch(a, b, Window(duration, interval), progress)
    emit(ctx, record, lambda: print_summary(record))
    save_record(output, record)


def print_summary(record: dict[str, Any]) -> None:
    """Both sides, then a verdict per metric, then what to mind."""
    rows = []
    for metric, row in record["metrics"].items():
        cells = [f"{_number(row[side]['mean'])}" for side in "ab"]
        cells += [_quantile(row[side].get(word)) for word in ("p50", "p99") for side in "ab"]
        rows.append([LABELS[metric], *cells])
    table(["", "A mean", "B mean", "A p50", "B p50", "A p99", "B p99"], rows)
    for metric, row in record["metrics"].items():
        click.echo(f"{LABELS[metric].split(' (')[0]}: {row['verdict']}")
    load = record["load"]
    requests = ", ".join(f"{s.upper()} {load[s]['finished']:.0f} requests" for s in "ab")
    window = record["window"]
    click.echo(
        f"{requests}; {window['valid']} of {window['intervals']} intervals; 95 % confidence. "
        "Quantiles lie anywhere in the bucket in brackets."
    )
    for text in record["caveats"]:
        click.echo(f"caveat: {text}")
    for text in record["problems"]:
        click.echo(f"problem: {text}.")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _quantile(found: dict[str, float | None] | None) -> str:
    """The interpolated value and the bucket."""
    if not found:
        return "–"
    if found["value"] is None:
        return f"> {found['low']:g}"
    return f"{found['value']:.3g} ({found['low']:g}–{found['high']:g})"
