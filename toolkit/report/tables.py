"""The tables of a report: rows of text, the same on the page and on the command line."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from gblm.record import Ratio, Record

# More sides than this stand below each other, not beside each other.
MOST_COLUMNS = 6


@dataclass(frozen=True)
class Table:
    """A table has a note on what its figures were measured with, "" if nothing is to be said."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def record_tables(record: Record, metrics: Collection[str] = ()) -> Iterator[Table]:
    """Show the figures of a record: a table of its sides, then its rows."""
    keys = tuple(dict.fromkeys(key for facts in record.sides.values() for key in facts))
    if keys:
        rows = tuple((side, *(said(facts.get(key)) for key in keys))
                     for side, facts in record.sides.items())  # fmt: skip
        yield Table("What was measured", "", ("", *(key.replace("_", " ") for key in keys)), rows)
    shown = [metric for metric in record.metrics if not metrics or metric in metrics]
    if len(shown) == 1:
        yield _figures(
            record, label(record, shown[0]), "", [(load, load, shown[0]) for load in record.loads]
        )
        return
    for load in record.loads:
        found = dict.fromkeys(row.metric for row in record.rows if row.load == load)
        lines = [(label(record, metric), load, metric) for metric in found if metric in shown]
        if lines:
            yield _figures(record, load.partition(",")[0], load, lines)


def _figures(record: Record, title: str, load: str, lines: Sequence[tuple[str, str, str]]) -> Table:
    """Make a line for each name, load and metric, and a column for each side.

    Many sides stand below each other, with the times of their dense control, if they have one.
    """
    compared = f"in brackets: times {record.baseline}" if record.baseline else ""
    note = "; ".join(filter(None, (load, compared)))
    sides = [side for side in record.sides if any(record.row(side, *line[1:]) for line in lines)]
    cells = {side: tuple(cell(record, side, *line[1:]) for line in lines) for side in sides}
    if len(sides) <= MOST_COLUMNS:
        names = tuple(name for name, _, _ in lines)
        return Table(title, note, ("", *sides), tuple(zip(names, *cells.values(), strict=True)))
    header = ("", *(name for name, _, _ in lines), f"{lines[0][2]}, times its control")
    controls = [record.sides[side].get("control") for side in sides]
    found = [control and record.ratio(side, *lines[0][1:], control)
             for side, control in zip(sides, controls, strict=True)]  # fmt: skip
    rows = ((side, *cells[side], times(ratio) if ratio else "–")
            for side, ratio in zip(sides, found, strict=True))  # fmt: skip
    return Table(title, note, header, tuple(rows))


def cell(record: Record, side: str, load: str, metric: str) -> str:
    """Write a figure, its 95 % interval if it has one, and how it compares with the baseline."""
    row = record.row(side, load, metric)
    if row is None:
        return "–"
    text = "not finite" if row.value is None else number(row.value, 4)
    if row.interval is not None:
        text += f" [{number(row.interval[0], 4)}, {number(row.interval[1], 4)}]"
    ratio = record.ratio(side, load, metric)
    return text if ratio is None or side == record.baseline else f"{text} ({times(ratio)})"


def times(ratio: Ratio) -> str:
    """Write a ratio, with its 95 % interval where there are rounds."""
    if len(ratio.rounds) < 2:
        return number(ratio.median)
    return f"{number(ratio.median)} [{number(ratio.low)}, {number(ratio.high)}]"


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
