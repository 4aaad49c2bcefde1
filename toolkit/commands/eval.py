"""`gblm eval MODEL`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gblm.commands.common import (
    Command,
    backend_option,
    options,
    progress_bars,
    record_option,
)
from gblm.commands.recipe_options import field_options
from gblm.commands.records import hand_out
from gblm.errors import UsageError
from gblm.recipe import Recipe

if TYPE_CHECKING:
    from gblm.evaluate.perplexity import Protocol
    from gblm.evaluate.tasks import Tasks

TEXT_KEYS = ("sources", "seq_len", "max_windows", "bos")
TASK_KEYS = ("tasks", "path", "limit")

text_options = options(
    click.option(
        "--text", "sources", multiple=True,
        help="A .txt, .jsonl or .parquet file, or pydoc, wikitext2, c4 (held-out part); again for "
        "each domain. Default: pydoc, none with --tasks.",
    ),
    click.option("--seq-len", type=click.IntRange(2), default=2048, show_default=True,
                 help="Tokens per window."),
    click.option("--max-windows", type=click.IntRange(1), help="Use the first so many windows."),
    click.option(
        "--bos/--no-bos", default=True, show_default=True,
        help="Begin windows with what the tokenizer puts before a prompt; the papers leave it out.",
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
)  # fmt: skip


@click.command("eval", cls=Command)
@click.argument("model")
@click.option("--baseline", help="Dense model to compare with. Default: what MODEL says it is of.")
@click.option("--no-baseline", "without_baseline", is_flag=True, help="Measure MODEL alone.")
@text_options
@task_options
@click.option("--gate", "gates", multiple=True, help="A bound, such as 'ppl <= 1.10x'; repeatable.")
@field_options(Recipe, "dtype", "device")
@backend_option
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the server's API key. Default: VLLM_API_KEY, if it is set.",
)
@record_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    gates: tuple[str, ...],
    output: Path | None,
    api_key_file: Path | None,
    **given: Any,
) -> None:
    """Measure MODEL's quality on texts and tasks, its dense baseline and the protocol beside it.

    MODEL is a dense, packed or exported folder, or the address of a running vLLM server. Exit
    status 5: a gate failed.
    """
    from gblm.evaluate.gates import check_gates, judge, parse_gate

    parsed = [parse_gate(gate) for gate in gates]
    texts, asked_tasks = ({key: given.pop(key) for key in keys} for keys in (TEXT_KEYS, TASK_KEYS))
    with progress_bars(ctx) as progress:
        from gblm.evaluate.run import Evaluation, is_address, run_evaluation

        tasks = tasks_of(**asked_tasks)
        asked = Evaluation(
            protocols=protocols(tasks=tasks is not None, **texts), tasks=tasks,
            needs_baseline=any(gate.needs_baseline for gate in parsed),
            api_key=_api_key(api_key_file, is_address(given["model"])), **given,
        )  # fmt: skip
        names = [protocol.text for protocol in asked.protocols]
        check_gates(parsed, names, tasks.names if tasks else ())
        record = run_evaluation(asked, progress)
    outcomes = judge(parsed, record)
    notes = (*record.verdict.notes, *(one.sentence() for one in outcomes))
    record = replace(record, verdict=replace(record.verdict, notes=notes))
    hand_out(ctx, record, output)
    failed = [one for one in outcomes if not one.passed]
    for one in failed:
        click.echo(f"gblm: {one.sentence()}", err=True)
    if failed:
        ctx.exit(5)


def protocols(sources: tuple[str, ...], tasks: bool, **how: Any) -> tuple[Protocol, ...]:
    """Make one protocol for each text.

    Raises:
        UsageError: two texts have one name.
    """
    from gblm.evaluate.perplexity import Protocol

    if not sources and not tasks:
        sources = ("pydoc",)
    made = tuple(Protocol(source, **how) for source in sources)
    if len({protocol.text for protocol in made}) < len(made):
        raise UsageError("--text: the texts must have different names, which name the figures.")
    return made


def tasks_of(tasks: str | None, **settings: Any) -> Tasks | None:
    """Read what --tasks asks for.

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


def _api_key(file: Path | None, served: bool) -> str | None:
    from gblm.network import KEY_VARIABLE, read_key

    if file is not None:
        return read_key(file)
    return os.environ.get(KEY_VARIABLE) or None if served else None
