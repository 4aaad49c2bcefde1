"""`gblm doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import Command, emit, record_option, save_record, table

MINUTES = 8.0


@click.command("doctor", cls=Command)
@click.option("--gpu-check", is_flag=True, help="Check and measure everything on a CUDA device.")
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True),
    help=f"That the GPU check may take. Default: {MINUTES:g}.",
)  # fmt: skip
@record_option
@click.pass_context
def command(
    ctx: click.Context, gpu_check: bool, minutes: float | None, output: Path | None
) -> None:
    """Show machine, versions and extras; self-test every backend.

    With --gpu-check: results against float64, speed beside cuBLAS, pruning and decoding on this
    machine's GPU.
    """
    if gpu_check:
        _check_gpu(ctx, MINUTES if minutes is None else minutes, output)
        return
    if minutes is not None or output is not None:
        raise click.UsageError("--minutes and --output belong to --gpu-check.")
    from gblm.doctor import doctor
    from gblm.errors import MachineError

    facts = doctor()
    emit(ctx, facts, lambda: _print(facts))
    if not facts["ok"]:
        ctx.exit(MachineError.exit_code)


def _check_gpu(ctx: click.Context, minutes: float, output: Path | None) -> None:
    from gblm.gpu_check.check import gpu_check

    record = gpu_check(minutes)
    save_record(output, record)
    emit(ctx, record, lambda: _print_record(record))


def _print_record(record: dict[str, Any]) -> None:
    from gblm.gpu_check.table import tables

    for header, rows in tables(record):
        table(header, rows)
        click.echo()
    for name, section in record["sections"].items():
        for what in section["failed"]:
            click.echo(f"failed: {name}: {what}")
    facts = record["device"]
    click.echo(
        f"{facts['gpu']}, torch {facts['torch']}; medians, weights read from memory; * without a "
        f"CUDA graph; {record['seconds']:.0f} s"
    )


def _print(facts: dict[str, Any]) -> None:
    machine = facts["machine"]
    click.echo(
        f"gblm {facts['gblm']}, Python {facts['python']}, {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB"
    )
    click.echo("CUDA devices: " + (", ".join(facts["cuda"]) or "none"))
    click.echo("packages: " + ", ".join(f"{k} {v}" for k, v in facts["packages"].items()))
    missing = [name for name, there in facts["installed"].items() if not there]
    click.echo("not installed (optional): " + (", ".join(missing) or "nothing"))
    click.echo(f"vLLM plugin: {'registered' if facts['vllm_plugin'] else 'not registered'}")
    for name, result in facts["backends"].items():
        click.echo(f"backend {name}: {result}")
    for warning in facts["warnings"]:
        click.echo(f"warning: {warning}")
