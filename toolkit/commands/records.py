"""Records on the command line: how they are written and shown, and what their verdict means."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import click

from gblm.commands.common import emit, table
from gblm.errors import GateError
from gblm.record import Record
from gblm.report.tables import record_tables, said

noise_option = click.option(
    "--allow-noise", is_flag=True,
    help="Count rounds in which the machine did other things, too; the record names them.",
)  # fmt: skip


def hand_out(
    ctx: click.Context, record: Record, output: Path | None, metrics: Collection[str] = ()
) -> None:
    """Write a record where it is wanted, show it, and end with 5 where figures are missing.

    Raises:
        GateError: the record is not valid.
    """
    emit(ctx, record.as_json(), lambda: show(record, metrics))
    if output is not None:
        record.write(output)
    if not record.verdict.valid:
        where = "" if output is None else f" in {output}"
        reasons = record.verdict.reasons
        raise GateError(f"INVALID: {reasons[0]} ({len(reasons)} reasons{where}).")


def show(record: Record, metrics: Collection[str] = ()) -> None:
    """Print the tables of a record, where it was measured, and what to mind."""
    for one in record_tables(record, metrics):
        click.echo(one.note or one.title)
        table(one.header, one.rows)
        click.echo()
    facts = {key: value for key, value in record.provenance.items() if not isinstance(value, dict)}
    click.echo(", ".join(f"{key.replace('_', ' ')} {said(value)}" for key, value in facts.items()))
    for words in record.verdict.notes:
        click.echo(f"note: {words}")
    for reason in record.verdict.reasons:
        click.echo(f"INVALID: {reason}")
