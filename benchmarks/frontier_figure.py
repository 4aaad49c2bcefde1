"""docs/frontier.svg: perplexity against bits per weight.

    python benchmarks/frontier_figure.py

All cases of the record of frontier.py, each at its largest calibration; the line joins what nothing
else beats in both. The same record gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from frontier_record import RECORD, read
from frontier_tables import Row, rows_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from matplotlib.transforms import Bbox
from pages import ROOT

FIGURE = ROOT / "docs" / "frontier.svg"
PROTOCOL = "8w"
# Okabe and Ito's colours; shapes differ, too.
DENSE, SPARSE = ("#0072B2", "o"), ("#D55E00", "s")
# What is worse is drawn at the upper edge, with its figure.
WORST = 400.0
STYLE = {
    "svg.hashsalt": "frontier", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "white",
}  # fmt: skip
# Where a label may stand, in points from its point, best first.
PLACES = [(dx * far, dy * far) for far in (7, 13, 20, 28)
          for dx, dy in ((1, 0.3), (1, -1), (-1, 0.6), (-1, -1), (0, 1.2), (0, -1.6))]  # fmt: skip


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw all cases of a record."""
    rows = list(best_rows(rows_of(record)).values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 5))
        figure.subplots_adjust(left=0.1, right=0.985, bottom=0.11, top=0.97)
        axes = figure.subplots()
        set_heights(axes, [height(row) for row in rows])
        against_bits(axes, rows)
        label_axes(axes)
        figure.savefig(path, metadata={"Date": None})
    # matplotlib leaves blanks at the ends of lines.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def best_rows(rows: list[Row]) -> dict[str, Row]:
    """Each case at its largest calibration."""
    return {row.name: row for row in sorted(rows, key=lambda row: row.samples)}


def against_bits(axes: Axes, rows: list[Row]) -> None:
    """All cases; labels for the front and for what is not pruned."""
    axes.set_xscale("log")
    front = pareto([(row.bits, height(row)) for row in rows])
    axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=1)
    named = []
    for row in rows:
        point = (row.bits, height(row))
        mark(axes, row, point)
        if point in front or not row.case.sparse:
            named.append((row.case.label.replace(" + reconstruct", " + rec."), row, point))
    set_limits(axes, [row.bits for row in rows])
    ticks = [tick for tick in (2, 3, 4, 6, 8, 12, 16) if axes.get_xlim()[0] <= tick]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    label_points(axes, named, [(row.bits, height(row)) for row in rows])


def height(row: Row) -> float:
    """Mean perplexity, at most WORST."""
    found = row.perplexity(PROTOCOL)
    if found is None:
        raise ValueError(f"{row.name}: no perplexity {PROTOCOL}.")
    return min(found[0], WORST)


def mark(axes: Axes, row: Row, point: tuple[float, float]) -> None:
    """A point with its spread; a caret where it lies above the edge."""
    colour, shape = SPARSE if row.case.sparse else DENSE
    mean, deviation = row.perplexity(PROTOCOL) or point
    shown = mean <= WORST
    bar, shape = (deviation, shape) if shown else (None, "^")
    axes.errorbar(
        *point, yerr=bar, color=colour, linewidth=1, marker=shape, markersize=5, clip_on=False
    )


def set_heights(axes: Axes, heights: list[float]) -> None:
    """The common axis of perplexities; its labels are plain numbers."""
    axes.set_yscale("log")
    axes.set_ylim(min(heights) / 1.12, min(max(heights) * 1.15, WORST))
    ticks = [tick for tick in (20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400)
             if min(heights) / 1.12 <= tick <= axes.get_ylim()[1]]  # fmt: skip
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point equals or beats in both, from left to right."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def set_limits(axes: Axes, across: list[float]) -> None:
    """Room for labels at the sides."""
    axes.set_xlim(min(across) / 1.12, max(across) * 1.25)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def label_points(
    axes: Axes,
    named: list[tuple[str, Row, tuple[float, float]]],
    points: list[tuple[float, float]],
) -> None:
    """Put each label where it hides neither a point nor an earlier label."""
    taken = [around(axes, point) for point in points]
    for text, row, point in sorted(named, key=lambda entry: entry[2]):
        mean, _ = row.perplexity(PROTOCOL) or point
        full = f"{text} ({mean:.0f})" if mean > WORST else text
        taken.append(place(axes, full, (SPARSE if row.case.sparse else DENSE)[0], point, taken))


def place(
    axes: Axes, text: str, colour: str, point: tuple[float, float], taken: list[Bbox]
) -> Bbox:
    """Write a label in the first free of PLACES, else in the least crowded; returns its box."""
    label = axes.annotate(
        text, point, (0, 0), textcoords="offset points", fontsize=9, color=colour, va="center"
    )
    crowd = {}
    for dx, dy in PLACES:
        move(label, dx, dy)
        box = label.get_window_extent()
        crowd[dx, dy] = sum(box.overlaps(other) for other in taken) + outside(axes, box)
    move(label, *min(crowd, key=lambda offset: crowd[offset]))
    return label.get_window_extent()


def move(label: Annotation, dx: float, dy: float) -> None:
    """Put a label so far from its point, at the side that it grows away from."""
    label.set_position((dx, dy))
    label.set_horizontalalignment("left" if dx > 0 else "right" if dx < 0 else "center")


def around(axes: Axes, point: tuple[float, float]) -> Bbox:
    """The box of a marker, in pixels."""
    x, y = axes.transData.transform(point)
    return Bbox.from_extents(x - 4, y - 4, x + 4, y + 4)


def outside(axes: Axes, box: Bbox) -> int:
    """3 for a label that leaves its panel, which is worse than hiding something."""
    frame = axes.get_window_extent()
    return 3 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)


def label_axes(axes: Axes) -> None:
    """Titles, and what the colours mean."""
    axes.set_xlabel("bits per weight, masks and scales included")
    axes.set_ylabel(f"perplexity, WikiText-2 {PROTOCOL}")
    for text, (colour, _), y in (("not pruned", DENSE, 0.98), ("pruned", SPARSE, 0.93)):
        axes.text(0.98, y, text, color=colour, transform=axes.transAxes, ha="right", va="top")


def main() -> None:
    """Draw the picture of the records."""
    draw(read(RECORD), FIGURE)


if __name__ == "__main__":
    main()
