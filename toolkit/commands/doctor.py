"""`gblm doctor`."""

from __future__ import annotations

from typing import Any

import click

from gblm.commands.common import Command, emit


@click.command("doctor", cls=Command)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Show machine, versions and extras; self-test every backend."""
    from gblm.doctor import doctor
    from gblm.errors import MachineError

    facts = doctor()
    emit(ctx, facts, lambda: _print(facts))
    if not facts["ok"]:
        ctx.exit(MachineError.exit_code)


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
