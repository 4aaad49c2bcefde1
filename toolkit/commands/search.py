"""`gblm search MODEL --budget B`: measure the best ways to hold a budget, or only predict them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gblm.commands.common import Command, emit, progress_bars, table
from gblm.commands.recipe_options import is_given, read_recipe, search_options
from gblm.files import write_json

if TYPE_CHECKING:
    from gblm.search.candidates import Question

MEASURE = ("limit", "text")
OWN = frozenset({"budget", "output", "write", *MEASURE})
# What candidates are made with as far as no option, preset or recipe says otherwise.
PRESET, ROUNDING = "fast", "obs"


@click.command("search", cls=Command)
@click.argument("model", required=False)
@click.option(
    "--budget",
    required=True,
    help="What the packed model may take: 3.5bits (per pruned weight, masks and scales counted), "
    "2.1GB (all of it).",
)
@click.option(
    "--write",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="File for the recipe of the best candidate; gblm prune --recipe takes it.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to make the best candidates in and measure them; without it they are only ranked "
    "by prediction.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Candidates within the budget, the best predicted ones; dense models come on top.",
)
@click.option(
    "--text",
    default="pydoc",
    show_default=True,
    help="Held-out text, as in `gblm eval --text`, of which 32 windows of 512 tokens are measured.",
)
@search_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    budget: str,
    output: Path | None,
    write: Path | None,
    recipe: Path | None,
    **given: Any,
) -> None:
    """Spread a budget over the linears of MODEL, and measure the best ways to do it.

    Candidates are ranked by a prediction, which takes one pass forward and backward over a little
    text. With --output the best are pruned, the perplexity of each is measured, and the best is
    kept. The same command goes on where it was cut off; a larger --limit adds candidates.
    """
    settings = {name: given.pop(name) for name in MEASURE}
    if output is None and (name := next((n for n in MEASURE if is_given(ctx, n)), None)):
        raise click.UsageError(
            f"--{name.replace('_', '-')} says how candidates are measured: give --output, too."
        )
    with progress_bars(ctx) as progress:
        question = _question(ctx, budget, recipe, given)
        if output is None:
            _predict(ctx, question, write, progress)
        else:
            _measure(ctx, question, output, settings, write, progress)


def _predict(ctx: click.Context, question: Question, write: Path | None, progress: Any) -> None:
    from gblm.search.candidates import answer

    result = answer(question, progress)
    if write is not None:
        write_json(write, result["rows"][0]["recipe"])
    emit(ctx, result, lambda: _print_answer(result))


def _measure(
    ctx: click.Context,
    question: Question,
    folder: Path,
    settings: dict[str, Any],
    write: Path | None,
    progress: Any,
) -> None:
    from gblm.search.run import Measuring, best, search, slug

    protocol = replace(Measuring(folder).protocol, source=settings["text"])
    how = Measuring(folder, settings["limit"], protocol)
    record = search(question, how, progress)
    name = best(record)
    if write is not None:
        write_json(write, record.sides[name]["recipe"])
    found = {"best": {"name": name, "folder": str(folder / slug(name))}}

    def text() -> None:
        _print_record(record)
        click.echo(f"best within {question.budget}: {found['best']['folder']}")

    emit(ctx, record.as_json() | found, text)


def _question(
    ctx: click.Context, budget: str, recipe: Path | None, given: dict[str, Any]
) -> Question:
    """Give what the command line asks, with `given` as the values of `search_options`."""
    from gblm.search.candidates import Question, parse_budget
    from gblm.search.examine import Space
    from gblm.sparse.values import parse_values

    amount = parse_budget(budget)
    if recipe is not None:
        return Question(read_recipe(ctx, recipe, given, OWN), amount)
    values = (str(parse_values(given["values"])),) if given["values"] else Space.values
    space = Space(values, _patterns(given["pattern"]))
    # Rounding belongs to integer values; recipes without any leave it out.
    fields = given | {"values": "int8", "pattern": "dense"}
    if given["preset"] is None:
        fields |= {"rounding": ROUNDING} if given["method"] else {"preset": PRESET}
    return Question(read_recipe(ctx, None, fields, OWN), amount, space)


def _patterns(text: str | None) -> tuple[str, ...]:
    """Give the patterns that may be used: all of them, or the one that --pattern names."""
    from gblm.search.examine import Space
    from gblm.sparse.patterns import NM, parse

    if text is None:
        return Space.patterns
    if text == "dense":
        return ()
    if text == "unstructured" or isinstance(parse(text), NM):
        return (text,)
    raise click.UsageError(
        f"--pattern {text} does not go with a budget, which decides the sparsity: give "
        "unstructured, N:M or dense."
    )


def _title(name: str, fits: bool) -> str:
    return name if fits else f"{name} (over budget)"


def _print_answer(result: Mapping[str, Any]) -> None:
    rows = [
        [
            _title(row["name"], row["fits"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['sparsity']:.0%}",
            f"{row['ratio']:.3f}",
            row["what"],
        ]
        for row in result["rows"]
    ]
    table(["candidate", "bits", "MB", "zeros", "ppl ratio", "what"], rows)
    click.echo(result["verdict"])
    click.echo("ppl ratio: predicted, against the unpruned model; it ranks, it is no measurement.")
    for note in result["notes"]:
        click.echo(f"note: {note}")


def _print_record(record: Any) -> None:
    """Print what was measured beside what was predicted, the best candidate first."""
    from gblm.search.run import METRIC, UNPRUNED, ranked

    load = record.loads[0]

    def shown(number: float | None, digits: int) -> str:
        return "infinite" if number is None else f"{number:.{digits}f}"

    rows = []
    for name in ranked(record):
        facts, ratio = record.sides[name], record.ratio(name, load, METRIC)
        rows.append([
            _title(name, facts["fits"]),
            f"{facts['bits_per_weight']:.2f}",
            f"{facts['bytes'] / 1e6:.1f}",
            shown(record.value(name, load, METRIC), 2),
            shown(ratio and ratio.median, 3),
            f"{facts['predicted']['ratio']:.3f}",
        ])  # fmt: skip
    rows.append(["unpruned", "", "", shown(record.value(UNPRUNED, load, METRIC), 2), "1.000", ""])
    table(["candidate", "bits", "MB", "perplexity", "ratio", "predicted"], rows)
    click.echo(f"protocol: {load}")
    for note in record.verdict.notes:
        click.echo(f"predicted: {note}")
