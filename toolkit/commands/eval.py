"""`gblm eval MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import (
    Command,
    backend_option,
    device_option,
    dtype_option,
    emit,
    progress_bars,
    record_option,
    save_record,
    table,
)


@click.command("eval", cls=Command)
@click.argument("model")
@click.option("--baseline", help="Dense model to compare with.")
@click.option(
    "--text",
    "source",
    default="pydoc",
    show_default=True,
    help="A .txt, .jsonl or .parquet file, or pydoc, wikitext2, c4 (held-out part).",
)
@click.option(
    "--seq-len", type=click.IntRange(2), default=2048, show_default=True, help="Tokens per window."
)
@click.option("--max-windows", type=click.IntRange(1), help="Use the first so many windows.")
@dtype_option
@device_option
@backend_option
@record_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    baseline: str | None,
    device: str,
    backend: str | None,
    output: Path | None,
    **protocol: Any,
) -> None:
    """Measure the perplexity of MODEL, packed or dense, and print the whole protocol with it."""
    with progress_bars(ctx) as progress:
        from gblm.evaluate.perplexity import Protocol, evaluate

        result = evaluate(model, Protocol(**protocol), baseline, device, backend, progress)

    def text() -> None:
        rows = [[model, f"{result['perplexity']:.2f}"]]
        if baseline:
            rows.append([baseline, f"{result['perplexity_baseline']:.2f}"])
            rows.append(["ratio", f"{result['ratio']:.3f}"])
        table(["model", "perplexity"], rows)
        click.echo(f"protocol: {result['protocol']}")

    emit(ctx, result, text)
    save_record(output, {"kind": "perplexity", **result})
