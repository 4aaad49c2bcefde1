"""Validity on the command line: what a verdict means for the caller."""

from __future__ import annotations

from pathlib import Path

import click

from gblm.errors import GateError
from gblm.record import Record

noise_option = click.option(
    "--allow-noise", is_flag=True,
    help="Count rounds in which the machine did other things, too; the record names them.",
)  # fmt: skip


def print_verdict(record: Record) -> None:
    """Print the notes of a record, and why figures are missing."""
    for words in record.verdict.notes:
        click.echo(f"note: {words}")
    for reason in record.verdict.reasons:
        click.echo(f"INVALID: {reason}")


def fail_if_invalid(record: Record, output: Path | None) -> None:
    """End with exit code 5 where figures are missing."""
    reasons = record.verdict.reasons
    if not record.verdict.valid:
        where = "" if output is None else f" in {output}"
        raise GateError(f"INVALID: {reasons[0]} ({len(reasons)} reasons{where}).")
