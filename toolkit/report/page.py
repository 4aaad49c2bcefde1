"""The pages of a report: HTML without scripts, which loads nothing, and Markdown for READMEs.

Both show the same tables; text from files is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from gblm import __version__
from gblm.report import figures
from gblm.report.sources import Sources
from gblm.report.tables import Table, record_tables


def html(sources: Sources, title: str) -> str:
    """Make the page.

    Raises:
        MachineError: matplotlib, which draws the pictures, is not installed.
    """
    template = files("gblm.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        version=__version__,
        title=title,
        sources=sources,
        frontiers=list(figures.frontiers([record for _, record in sources.records])),
        records=[
            (f"{record.kind}: {file}", list(figures.ratios(record)), list(record_tables(record)))
            for file, record in sources.records
        ],
        folders=[folder.table for folder in sources.folders],
        sparsities=list(figures.sparsities(sources.folders)),
        environments=list(sources.environments()),
    ) + "\n"  # fmt: skip


def markdown(sources: Sources, title: str) -> str:
    """Make a page of tables."""
    lines = [f"# {escape(title)}", ""]
    for heading, words in (
        ("**INVALID measurements:**", sources.invalid),
        ("To be kept in mind:", sources.notes),
    ):
        if words:
            lines += [heading, "", *(f"- {escape(one)}" for one in words), ""]
    for file, record in sources.records:
        lines += [f"## {escape(record.kind)}: {escape(file)}", ""]
        lines += [line for table in record_tables(record) for line in show(table)]
    for folder in sources.folders:
        lines += show(folder.table)
    lines += ["## How to repeat it", ""]
    # An indented block, which no recorded command can close.
    lines += [*(f"    {' '.join(command.split())}" for command in sources.commands), ""]
    lines += [line for table in sources.environments() for line in show(table)]
    return "\n".join(lines).rstrip() + "\n"


def show(table: Table) -> Iterator[str]:
    """Write a table, numbers to the right."""
    yield from (f"### {escape(table.title)}", "")
    if table.note:
        yield from (escape(table.note), "")
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    lines = [[escape(cell) for cell in row] for row in (table.header, *table.rows)]
    lines.insert(1, rule)
    yield from (f"| {' | '.join(cells)} |" for cells in lines)
    yield ""


def escape(text: str) -> str:
    """Keep text what it is: no markup, no HTML, no new cell."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
