"""What the commands share: global options in any position, logging, progress bars, output."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import click

from gblm.errors import GblmError, MachineError

logger = logging.getLogger(__name__)
LOG_SECONDS = 15.0
AT_WORK = "still at work"
LONGEST_MESSAGE = 800
F = TypeVar("F", bound=Callable[..., Any])


def global_options() -> Iterator[click.Option]:
    """Make the options that stand before a command's name or behind it; the context keeps them."""
    for names, kind, text in (
        (["--json", "as_json"], {"is_flag": True}, "One JSON object on stdout, logs on stderr."),
        (["-q", "--quiet"], {"is_flag": True}, "Errors only."),
        (["-v", "--verbose"], {"count": True}, "More log lines; tracebacks."),
        (["--no-progress"], {"is_flag": True}, "No progress bars or lines."),
    ):
        yield click.Option(names, help=text, expose_value=False, callback=_keep, **kind)


class Command(click.Command):
    """A command that also takes the global options behind its name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += global_options()

    def invoke(self, ctx: click.Context) -> Any:
        """Set up logging, then run."""
        configure_logging(ctx.ensure_object(dict))
        return super().invoke(ctx)


def _keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value:
        ctx.ensure_object(dict)[parameter.name] = value


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Bundle option decorators; the first one stands first in the help."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def commas(read: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Make the callback of an option whose words stand between commas, or that is repeated.

    Args:
        read: a word; it raises ValueError with a sentence. Each value counts once.
    """

    def callback(ctx: click.Context, option: click.Parameter, value: Any) -> tuple[Any, ...]:
        texts = value if isinstance(value, tuple) else () if value is None else (value,)
        try:
            words = (word.strip() for text in texts for word in text.split(","))
            return tuple(dict.fromkeys(map(read, words)))
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, option) from error

    return callback


def whole_number(word: str) -> int:
    """Read a positive whole number.

    Raises:
        ValueError: it is none.
    """
    if not (word.isascii() and word.isdigit() and 0 < int(word) < 10**6):
        raise ValueError(f"{word[:40]!r} is not a positive whole number.")
    return int(word)


folder_option = click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Folder to make."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing folder.")
backend_option = click.option(
    "--backend", help="Kernel for packed weights: cpu, mma_sp, delta, triton, "
    "reference (all packed) or dense (expanded at load). Default: the first that does not refuse.",
)  # fmt: skip


def configure_logging(state: dict[str, Any]) -> None:
    """Send our log lines to stderr, at the level of -q and -v; others only when they warn."""
    level = logging.INFO - 10 * min(1, state.get("verbose", 0))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("gblm").setLevel(logging.ERROR if state.get("quiet") else level)


def emit(ctx: click.Context, result: dict[str, Any], text: Callable[[], None]) -> None:
    """Print the result: as JSON with --json, else with `text()` unless --quiet."""
    if ctx.obj.get("as_json"):
        click.echo(json.dumps(result, ensure_ascii=False))
    elif not ctx.obj.get("quiet"):
        text()


def with_a_place(ctx: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    """Refuse a file that cannot be written where it is to lie, before work and not after it."""
    if file is not None:
        folder = next(parent for parent in file.absolute().parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise click.BadParameter(f"{folder} is no folder that can be written to.", ctx, option)
    return file


record_option = click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=with_a_place,
    help="JSON file for the record.",
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain table: the first column to the left, the others to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        first, rest = line[0].ljust(widths[0]), zip(line[1:], widths[1:], strict=True)
        click.echo("  ".join([first, *(cell.rjust(width) for cell, width in rest)]).rstrip())


@contextmanager
def progress_bars(ctx: click.Context) -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Show progress on stderr: bars on a terminal, elsewhere a line after 15 silent seconds.

    Transformers' own bars are switched off.

    Yields:
        Takes a phase and its number of steps, returns what to call per step.
    """
    wanted = not (ctx.obj.get("no_progress") or ctx.obj.get("quiet"))
    shown = wanted and sys.stderr.isatty()
    if not shown:
        # tqdm, inside other libraries, reads this once, when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging as transformers_logging

    if not ctx.obj.get("verbose"):
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as bars:

        def phase(name: str, steps: int) -> Callable[[], None]:
            task = bars.add_task(name, total=steps)
            return lambda: bars.advance(task)

        counted = Counted()
        life = heartbeat(lambda: counted.words if bars.finished else None)
        with life if wanted else nullcontext():
            yield phase if shown or not wanted else counted


class Counted:
    """Counts the steps of the last phase, for those who see no bars."""

    def __init__(self) -> None:
        self.words = AT_WORK

    def __call__(self, name: str, steps: int) -> Callable[[], None]:
        """Take a phase and its number of steps, return what to call per step."""
        done = 0
        self.words = f"{name}: 0 of {steps}"

        def step() -> None:
            nonlocal done
            done += 1
            self.words = f"{name}: {done} of {steps}" if done < steps else AT_WORK

        return step


class _Ear(logging.Handler):
    """Hears when something was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.heard = time.monotonic()


@contextmanager
def heartbeat(words: Callable[[], str | None]) -> Iterator[None]:
    """Log some words when our log was silent for 15 seconds: engines start without a line."""
    ear, over, ours = _Ear(), threading.Event(), logging.getLogger("gblm")

    def watch() -> None:
        while not over.wait(LOG_SECONDS / 15):
            text = words()
            if text and time.monotonic() - ear.heard >= LOG_SECONDS:
                logger.info("%s", text)

    thread = threading.Thread(target=watch, daemon=True)
    ours.addHandler(ear)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        ours.removeHandler(ear)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out; for that of a CPU PyTorch has no class of its own."""
    kind, text = type(error), str(error)
    return (
        kind is MemoryError
        or kind.__name__ == "OutOfMemoryError"
        or (kind is RuntimeError and "DefaultCPUAllocator: can't allocate memory" in text)
    )


def report_error(error: Exception, state: dict[str, Any]) -> int:
    """Print one sentence and give the exit code; with -v, or for a bug, the traceback, too."""
    if isinstance(error, OSError):
        error = MachineError(f"{error.filename or 'the system'}: {error.strerror or error}.")
    elif is_out_of_memory(error):
        what = str(error).strip().rstrip(".") or "nothing is free"
        error = MachineError(f"out of memory: {what}. Lower --seq-len, or use another device.")
    known = isinstance(error, GblmError)
    code = error.exit_code if isinstance(error, GblmError) else 1
    if state.get("verbose") or not known:
        traceback.print_exception(error, file=sys.stderr)
    text = str(error) if known else f"bug: {type(error).__name__}: {error}"
    # What libraries say may have many lines; -v shows them.
    message = shorten(text, LONGEST_MESSAGE, placeholder=" …")
    if state.get("as_json"):
        click.echo(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False))
    click.echo(f"gblm: error: {message}", err=True)
    return code


def megabytes(count: float) -> str:
    """Write bytes as MB with one digit."""
    return f"{count / 1e6:.1f} MB"


def head_note(report: dict[str, Any]) -> str:
    """Say what a command adds about a packed output head; nothing if there is none."""
    head = report.get("head")
    if head is None:
        return ""
    name = "output head and embeddings" if head.get("embeddings") else "output head"
    return f"; {name} {head['values']}, {head['bits_per_weight']:.2f} bits per weight"
