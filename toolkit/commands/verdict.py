"""Validity on the command line: limits of noise, and what a verdict means for the caller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gblm.commands.common import options
from gblm.errors import GateError
from gblm.record import Record

if TYPE_CHECKING:
    from gblm.bench.noise import Limits

noise_options = options(
    click.option("--max-steal", type=click.FloatRange(0, 100), default=2, show_default=True,
                 help="Percent of the CPU time that a hypervisor may take."),
    click.option("--max-other-load", type=click.FloatRange(0, 100), default=10, show_default=True,
                 help="Percent of the CPU time that other processes may use."),
    click.option("--max-slow-read", type=click.FloatRange(0, 100), default=15, show_default=True,
                 help="Percent by which memory may be slower than in the best round."),
)  # fmt: skip


def limits_of(given: dict[str, Any]) -> Limits:
    """Take the limits of noise out of the options."""
    from gblm.bench.noise import Limits

    return Limits(
        given["max_steal"] / 100, given["max_other_load"] / 100, given["max_slow_read"] / 100
    )


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
