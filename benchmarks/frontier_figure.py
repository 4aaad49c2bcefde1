"""docs/frontier.svg: perplexity against bits per weight, and against decode time in vLLM.

    python benchmarks/frontier_figure.py

Left: all cases of the record of frontier.py, each at its largest calibration; the line joins what
nothing else beats in both. Right: those whose value type and pattern decoding.py has measured; the
times are of a 1.1B shape, the perplexities of SmolLM2-135M; a time is that of the baseline divided
by the ratio that was paired by round. The same records give the same bytes.
"""

from __future__ import annotations

import json
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
from pages import RESULTS, ROOT

FIGURE = ROOT / "docs" / "frontier.svg"
DECODING = RESULTS / "decoding-1-compiled.json"
PROTOCOL = "8w"
# Okabe and Ito's colours; shapes differ, too.
DENSE, SPARSE = ("#0072B2", "o"), ("#D55E00", "s")
# What is worse is drawn at the upper edge, with its figure.
WORST = 400.0
# Of decoding.py's rows, the case with the same values and pattern and the best pipeline.
DECODED = {
    "dense bf16": ("dense",),
    "dense int8": ("int8",),
    "dense int4": ("int4-gptq-rec", "int4-gptq"),
    "bf16 50 %": ("sparsegpt-50-rec", "sparsegpt-50"),
    "bf16 2:4": ("alps-24-rec", "sparsegpt-24-refit-rec", "sparsegpt-24-rec", "sparsegpt-24"),
    "int4 50 %": ("int4-50-rec",),
}
STYLE = {
    "svg.hashsalt": "frontier", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "white",
}  # fmt: skip
# Where a label may stand, in points from its point, best first.
PLACES = [(dx * far, dy * far) for far in (7, 13, 20, 28)
          for dx, dy in ((1, 0.3), (1, -1), (-1, 0.6), (-1, -1), (0, 1.2), (0, -1.6))]  # fmt: skip


def draw(record: dict[str, Any], decoding: dict[str, Any], path: Path) -> None:
    """Draw both panels."""
    best = best_rows(rows_of(record))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 5))
        figure.subplots_adjust(left=0.075, right=0.985, bottom=0.11, top=0.97, wspace=0.06)
        left, right = figure.subplots(1, 2, sharey=True)
        set_heights(left, [height(row) for row in best.values()])
        decoded = decoded_rows(best, decoding)
        against_bits(left, list(best.values()), list(decoded.values()))
        against_time(right, decoded, decoding)
        label_axes(left, right, decoding)
        figure.savefig(path, metadata={"Date": None})
    # matplotlib leaves blanks at the ends of lines.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def best_rows(rows: list[Row]) -> dict[str, Row]:
    """Each case at its largest calibration."""
    return {row.name: row for row in sorted(rows, key=lambda row: row.samples)}


def decoded_rows(best: dict[str, Row], decoding: dict[str, Any]) -> dict[str, Row]:
    """By the name of the row of decoding.py, the best pipeline that has been recorded."""
    rows = {}
    for name, choices in DECODED.items():
        row = next((best[case] for case in choices if case in best), None)
        if row is not None and name in decoding["cases"]:
            rows[name] = row
    return rows


def against_bits(axes: Axes, rows: list[Row], decoded: list[Row]) -> None:
    """All cases; labels for the front, what is not pruned, and what the right panel shows."""
    axes.set_xscale("log")
    front = pareto([(row.bits, height(row)) for row in rows])
    axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=1)
    named = []
    for row in rows:
        point = (row.bits, height(row))
        mark(axes, row, point)
        if point in front or not row.case.sparse or row in decoded:
            named.append((row.case.label.replace(" + reconstruct", " + rec."), row, point))
    set_limits(axes, [row.bits for row in rows])
    ticks = [tick for tick in (2, 3, 4, 6, 8, 12, 16) if axes.get_xlim()[0] <= tick]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    label_points(axes, named, [(row.bits, height(row)) for row in rows])


def against_time(axes: Axes, decoded: dict[str, Row], decoding: dict[str, Any]) -> None:
    """The cases whose decode time has been measured."""
    axes.set_xscale("log")
    named = []
    for name, row in decoded.items():
        point = (milliseconds(decoding, name), height(row))
        mark(axes, row, point)
        named.append((name, row, point))
    points = [point for _, _, point in named]
    if not points:
        return
    front = pareto(points)
    axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=1)
    set_limits(axes, [x for x, _ in points])
    axes.xaxis.set_major_locator(FixedLocator([15, 20, 30, 40, 50, 60, 80, 100]))
    label_points(axes, named, points)


def milliseconds(decoding: dict[str, Any], name: str) -> float:
    """Of one token: the baseline's, divided by the ratio that was paired by round."""
    baseline = decoding["cases"][decoding["baseline"]]["decode 1"]["tokens_per_second"]
    ratio: float = decoding["cases"][name]["decode 1"]["ratio"]
    return 1000 / (baseline * ratio)


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


def label_axes(left: Axes, right: Axes, decoding: dict[str, Any]) -> None:
    """Titles, and what the colours mean."""
    left.set_xlabel("bits per weight, masks and scales included")
    left.set_ylabel(f"perplexity, WikiText-2 {PROTOCOL}")
    threads = decoding["threads"]
    right.set_xlabel(
        f"ms per token in vLLM, 1.1B shape, {threads} thread{'s' if threads > 1 else ''}"
    )
    for axes, (text, (colour, _)) in zip(
        (left, left), (("not pruned", DENSE), ("pruned", SPARSE)), strict=True
    ):
        y = 0.98 if colour == DENSE[0] else 0.93
        axes.text(0.98, y, text, color=colour, transform=axes.transAxes, ha="right", va="top")


def main() -> None:
    """Draw the picture of the records."""
    draw(read(RECORD), json.loads(DECODING.read_text()), FIGURE)


if __name__ == "__main__":
    main()
