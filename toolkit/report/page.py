"""The page of a report: HTML without scripts, which loads nothing; text from files is escaped."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from gblm import __version__
from gblm.report import figures
from gblm.report.sources import Sources
from gblm.report.tables import record_tables


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
