"""The tables of a report: rows of text, the same on the page and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gblm.record import Record


@dataclass(frozen=True)
class Table:
    """A table has a note on what its figures were measured with, "" if nothing is to be said."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def record_tables(record: Record) -> Iterator[Table]:
    """Show every figure of a record: a table of its sides, then its rows."""
    keys = tuple(dict.fromkeys(key for facts in record.sides.values() for key in facts))
    if keys:
        rows = tuple((side, *(said(facts.get(key)) for key in keys))
                     for side, facts in record.sides.items())  # fmt: skip
        yield Table("What was measured", "", ("", *(key.replace("_", " ") for key in keys)), rows)
    if len(record.metrics) == 1:
        (metric,) = record.metrics
        lines = [(load, load, metric) for load in record.loads]
        yield _figures(record, label(record, metric), "", lines)
        return
    for load in record.loads:
        found = dict.fromkeys(row.metric for row in record.rows if row.load == load)
        lines = [(label(record, metric), load, metric) for metric in found]
        yield _figures(record, load.partition(",")[0], load, lines)


def _figures(record: Record, title: str, load: str, lines: Sequence[tuple[str, str, str]]) -> Table:
    """Make a line for each name, load and metric, and a column for each side."""
    compared = f"in brackets: times {record.baseline}" if record.baseline else ""
    rows = tuple(
        (name, *(cell(record, side, where, metric) for side in record.sides))
        for name, where, metric in lines
    )
    return Table(title, "; ".join(filter(None, (load, compared))), ("", *record.sides), rows)


def cell(record: Record, side: str, load: str, metric: str) -> str:
    """Write a figure, its 95 % interval if it has one, and how it compares with the baseline."""
    row = record.row(side, load, metric)
    if row is None:
        return "–"
    text = "not finite" if row.value is None else number(row.value, 4)
    if row.interval is not None:
        text += f" [{number(row.interval[0], 4)}, {number(row.interval[1], 4)}]"
    ratio = record.ratio(side, load, metric)
    return text if ratio is None or side == record.baseline else f"{text} ({number(ratio.median)})"


def label(record: Record, metric: str) -> str:
    """Write a metric with its unit."""
    unit = next((row.unit for row in record.rows if row.metric == metric), "")
    return f"{metric}, {unit}" if unit else metric


def number(value: float, count: int = 3) -> str:
    """Write a figure for people: `count` digits, no exponent for what is near 1."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e7:
        digits = max(0, count - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{count}g}"


def said(value: object) -> str:
    """Write a value of JSON in words."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{key} {said(inner)}" for key, inner in value.items())
    return number(value, 4) if isinstance(value, float) else str(value)
