"""`gblm compare A B`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import Command, emit, table


@click.command("compare", cls=Command)
@click.argument("a", type=click.Path(exists=True, path_type=Path))
@click.argument("b", type=click.Path(exists=True, path_type=Path))
@click.pass_context
def command(ctx: click.Context, /, a: Path, b: Path) -> None:
    """Show two model folders, or two records of one kind, side by side.

    Records are those of `gblm eval`, `bench serving`, `bench models`, `bench onnx`, `bench
    kernels` and `doctor --gpu-check` (--output), search.json, and onnx_report.json of an export.
    Figures of different protocols are refused.
    """
    from gblm.evaluate.side_by_side import compare

    found = compare(a, b)
    emit(ctx, found, lambda: _show(found))


def _show(found: dict[str, Any]) -> None:
    rows = [
        [row["what"], _cell(row["a"]), _cell(row["b"]),
         f"{row['ratio']:.3f}" if "ratio" in row else ""]
        for row in found["rows"]
    ]  # fmt: skip
    table(["", found["a"], found["b"], "B / A"], rows)
    if "protocol" in found:
        click.echo(f"protocol of both: {found['protocol']}")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
