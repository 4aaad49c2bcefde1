"""`gblm compare A B`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import Command, emit, table


@click.command("compare", cls=Command)
@click.argument("a", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.pass_context
def command(ctx: click.Context, /, a: Path, b: Path) -> None:
    """Show two model folders side by side; `gblm report` shows records."""
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


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
