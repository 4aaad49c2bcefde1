"""Options of `gblm eval` as the protocols and tasks they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gblm.commands.common import options
from gblm.errors import UsageError

if TYPE_CHECKING:
    from gblm.evaluate.perplexity import Protocol
    from gblm.evaluate.tasks import Tasks

ENGINES = ("hf", "packed", "vllm", "onnx")

text_options = options(
    click.option(
        "--text", "sources", multiple=True,
        help="A .txt, .jsonl or .parquet file, or pydoc, wikitext2, c4 (held-out part); again for "
        "each domain. Default: pydoc, the papers' wikitext2 with their protocols, none with "
        "--tasks.",
    ),
    click.option(
        "--protocol", "name", type=click.Choice(("gblm", "wanda", "own")), default="own",
        show_default=True, help="Windows of 2048 tokens (gblm), 4096 (wanda), or --seq-len.",
    ),
    click.option("--seq-len", type=click.IntRange(2), help="Tokens per window. Default: 2048."),
    click.option(
        "--stride", type=click.IntRange(1),
        help="Tokens from window to window; only new ones count. Default: --seq-len.",
    ),
    click.option("--max-windows", type=click.IntRange(1), help="Use the first so many windows."),
    click.option(
        "--bos/--no-bos", default=None,
        help="Begin windows with what the tokenizer puts before a prompt. Default: yes, but not "
        "with --protocol gblm or wanda: the papers leave it out.",
    ),
)  # fmt: skip

task_options = options(
    click.option(
        "--tasks", help="Tasks of lm-evaluation-harness with commas; papers: the papers' seven."
    ),
    click.option(
        "--task-path", "path", type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder with task files of your own.",
    ),
    click.option("--limit", type=click.IntRange(1), help="The first so many examples of a task."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the tasks."),
)  # fmt: skip


def protocols(
    sources: tuple[str, ...],
    name: str,
    seq_len: int | None,
    dtype: str,
    tasks: bool,
    bos: bool | None,
    **windows: Any,
) -> tuple[Protocol, ...]:
    """One protocol per text.

    Raises:
        UsageError: options contradict each other.
    """
    from gblm.evaluate.perplexity import SEQ_LENS, Protocol

    fixed = SEQ_LENS.get(name)
    if fixed and (seq_len or windows["stride"]):
        raise UsageError(
            f"--protocol {name} is windows of {fixed} tokens without overlap: leave --seq-len and "
            "--stride out, or take --protocol own."
        )
    length = fixed or seq_len or 2048
    if (windows["stride"] or 1) > length:
        raise UsageError(
            f"--stride {windows['stride']} would leave out tokens: at most --seq-len {length}."
        )
    if not sources and not (tasks and name == "own"):
        sources = ("wikitext2",) if fixed else ("pydoc",)
    names = [Path(source).name for source in sources]
    if len(set(names)) < len(names):
        raise UsageError("--text: the texts must have different names, which name the figures.")
    bos = not fixed if bos is None else bos
    return tuple(
        Protocol(source, length, dtype=dtype, name=name, bos=bos, **windows) for source in sources
    )


def tasks_of(tasks: str | None, **settings: Any) -> Tasks | None:
    """What --tasks asks for.

    Raises:
        UsageError: a setting of tasks without tasks, or no name.
    """
    from gblm.evaluate.tasks import Tasks, task_names

    if tasks is None:
        if settings["path"] or settings["limit"]:
            raise UsageError("--task-path and --limit say something of --tasks only.")
        return None
    names = task_names(tasks)
    if not names:
        raise UsageError("--tasks names no task.")
    return Tasks(names, **settings)
