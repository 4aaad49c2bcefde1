"""Charts as inline SVG: points, curves, intervals. Text is escaped; nothing is loaded or run.

Drawn 420 units wide, so that they stay readable at the width of a phone. Lines and text take the
colours of the page; what is data has the class "mark" and a title that says its figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from gblm.report.axes import Axis, number

WIDTH, HEIGHT = 420, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 44
# Okabe and Ito's colours, told apart by most eyes; shapes and dashes differ, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
CHARACTER, LINE = 6.1, 12
# A name longer than this is cut in a picture; tables have it whole.
LONGEST = 34


@dataclass(frozen=True)
class Point:
    """One named point.

    Attributes:
        name: beside it, where there is room.
        x: of finite value.
        y: of finite value.
        low: lower end of its vertical interval; none if None.
        high: upper end.
        kind: index of colour and shape.
    """

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    kind: int = 0


@dataclass(frozen=True)
class Series:
    """One named curve through points (x, y), by rising x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """A middle with both ends, one line of an interval chart."""

    name: str
    middle: float
    low: float
    high: float


def points(
    title: str,
    marks: Sequence[Point],
    x: str,
    y: str,
    kinds: Sequence[str] = (),
    worst: float = math.inf,
) -> Markup:
    """A scatter with the front that nothing else beats downwards and to the left.

    Args:
        title: what it shows, for those who cannot see it.
        marks: at least one.
        x: label of the axis across.
        y: label of the axis upwards; logarithmic.
        kinds: names of the colours, by `Point.kind`.
        worst: points above it are drawn at the upper edge, with their figure.
    """
    ends = [min(v, worst) for p in marks for v in (p.y, p.low, p.high) if v is not None]
    across = Axis.around(x, [p.x for p in marks], LEFT, WIDTH - RIGHT)
    up = Axis.around(y, ends, HEIGHT - BOTTOM, TOP + (LINE + 6) * bool(kinds), min(ends) > 0)
    found = [frame(across, up), _front(marks, across, up)]
    taken = [(across.place(p.x) - 6, up.place(p.y) - 6, 12.0, 12.0) for p in marks]
    for p in sorted(marks, key=lambda p: (p.y, p.x)):
        found.append(_point(p, across, up, "edge" if p.y > worst else None))
        name = f"{short(p.name)} ({number(p.y)})" if p.y > worst else short(p.name)
        found.append(_label(name, across.place(p.x), up.place(p.y), taken))
    found.append(legend(kinds))
    return svg(title, found)


def curves(title: str, series: Sequence[Series], x: str, y: str, logs: str = "") -> Markup:
    """Lines through points.

    Args:
        title: what it shows.
        series: at least one with a point.
        x: label of the axis across.
        y: label of the axis upwards.
        logs: which axes are logarithmic: "", "x", "y", "xy".
    """
    rows = len(series)
    every = [point for one in series for point in one.points]
    across = Axis.around(x, [a for a, _ in every], LEFT, WIDTH - RIGHT, "x" in logs)
    up = Axis.around(y, [b for _, b in every], HEIGHT - BOTTOM, TOP + LINE * rows + 2, "y" in logs)
    found = [frame(across, up)]
    for index, one in enumerate(series):
        places = [(across.place(a), up.place(b)) for a, b in one.points]
        path = " ".join(f"{a},{b}" for a, b in places)
        found.append(
            Markup(
                '<polyline class="curve" points="{}" stroke="{}" stroke-dasharray="{}"/>'
            ).format(path, colour(index), DASHES[index % len(DASHES)])
        )
        if len(places) <= 40:
            found += [_shape(index, a, b, f"{one.name}: {number(p[0])}, {number(p[1])}")
                      for (a, b), p in zip(places, one.points, strict=True)]  # fmt: skip
        else:
            found.append(_shape(index, *places[-1], f"{one.name}: {len(places)} values"))
    found.append(legend([one.name for one in series], LINE))
    return svg(title, found)


def intervals(title: str, rows: Sequence[Interval], x: str, one: float | None = 1.0) -> Markup:
    """One line per name: its middle and both ends; and a line at `one`, where nothing differs."""
    ends = [value for row in rows for value in (row.low, row.high)]
    height = TOP + 34 * len(rows) + BOTTOM
    across = Axis.around(x, [*ends, *([one] if one else [])], 16, WIDTH - 16)
    found = [_across(across, TOP, height - BOTTOM)]
    if one is not None:
        found.append(_line(across.place(one), TOP, across.place(one), height - BOTTOM, "one"))
    for index, row in enumerate(rows):
        top = TOP + 34 * index
        figures = f"{number(row.middle)} ({number(row.low)} to {number(row.high)})"
        found += [
            text(16, top + 12, f"{short(row.name)}: {figures}", "start"),
            _line(across.place(row.low), top + 24, across.place(row.high), top + 24, "whisker"),
            _shape(0, across.place(row.middle), top + 24, f"{row.name}: {figures}"),
        ]
    return svg(title, found, height)


def svg(
    title: str, parts: Sequence[Markup], height: float = HEIGHT, width: float = WIDTH
) -> Markup:
    """The picture around its parts."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, round(height, 1), title, Markup("").join(parts)
    )


def text(x: float, y: float, words: str, anchor: str = "middle", turn: float = 0) -> Markup:
    """Words at a place, turned by so many degrees."""
    x, y = round(x, 1), round(y, 1)
    return Markup(
        '<text x="{}" y="{}" text-anchor="{}" transform="rotate({} {} {})">{}</text>'
    ).format(x, y, anchor, turn, x, y, words)


def short(name: str) -> str:
    """A name that fits a picture."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def colour(index: int) -> str:
    """Of a series."""
    return COLOURS[index % len(COLOURS)]


def frame(across: Axis, up: Axis) -> Markup:
    """Both axes with ticks, grid and labels."""
    parts = [_across(across, up.stop, up.start)]
    for tick in up.ticks():
        y = up.place(tick)
        parts += [_line(across.start, y, across.stop, y, "grid")]
        parts += [text(across.start - 5, y + 4, number(tick), "end")]
    middle = (up.start + up.stop) / 2
    parts.append(text(12, middle, up.label, turn=-90))
    return Markup("").join(parts)


def legend(names: Sequence[str], step: float = 0) -> Markup:
    """Names of the colours: under each other, or beside each other when `step` is 0."""
    parts, x, y = [], float(LEFT + 6), float(TOP + 2)
    for index, name in enumerate(names):
        parts += [_shape(index, x, y, ""), text(x + 9, y + 4, short(name), "start")]
        x, y = (x, y + step) if step else (x + 26 + CHARACTER * len(short(name)), y)
    return Markup("").join(parts)


def _across(axis: Axis, top: float, bottom: float) -> Markup:
    parts = []
    for tick in axis.ticks():
        x = axis.place(tick)
        parts += [_line(x, top, x, bottom, "grid"), text(x, bottom + 15, number(tick))]
    parts.append(text((axis.start + axis.stop) / 2, bottom + 35, axis.label))
    return Markup("").join(parts)


def _point(point: Point, across: Axis, up: Axis, form: str | None) -> Markup:
    x, y = across.place(point.x), up.place(point.y)
    said = f"{point.name}: {number(point.x)}, {number(point.y)}"
    mark = _shape(point.kind, x, y, said, form)
    if point.low is None or point.high is None:
        return mark
    return _line(x, up.place(point.low), x, up.place(point.high), "whisker") + mark


def _front(marks: Sequence[Point], across: Axis, up: Axis) -> Markup:
    """A line through the points that no other one equals or beats in both."""
    best, front = math.inf, []
    for p in sorted(marks, key=lambda p: (p.x, p.y)):
        if p.y < best:
            best = p.y
            front.append(f"{across.place(p.x)},{up.place(p.y)}")
    return Markup('<polyline class="front" points="{}"/>').format(" ".join(front))


def _label(name: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> Markup:
    """A name where it hides nothing; without such a place it is left to the title and the table."""
    wide = CHARACTER * len(name)
    for dx, dy in ((8, 4), (-8 - wide, 4), (-wide / 2, -8), (-wide / 2, 18), (8, -8), (8, 16)):
        box = (x + dx, y + dy - 10, wide, 12.0)
        inside = box[0] > LEFT and box[0] + wide < WIDTH and TOP < box[1] < HEIGHT - BOTTOM - 8
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            end = dx < -8 and dy == 4
            return text(x - 8 if end else x + dx, y + dy, name, "end" if end else "start")
    return Markup("")


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    apart = a[0] + a[2] < b[0] or b[0] + b[2] < a[0] or a[1] + a[3] < b[1] or b[1] + b[3] < a[1]
    return not apart


def _shape(index: int, x: float, y: float, said: str, form: str | None = None) -> Markup:
    """A mark: form and colour follow the index; "edge" is a caret. Without words, of a legend."""
    forms = (
        f"M{x - 4},{y}a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
        f"M{x - 4},{y - 4}h8v8h-8z",
        f"M{x},{y - 5}l5,9h-10z",
        f"M{x},{y - 5}l5,5l-5,5l-5,-5z",
    )
    title = Markup("<title>{}</title>").format(said) if said else ""
    return Markup('<path class="{}" d="{}" fill="{}">{}</path>').format(
        "mark" if said else "key",
        f"M{x - 5},{y + 6}l5,-9l5,9" if form == "edge" else forms[index % len(forms)],
        colour(index),
        title,
    )


def _line(x: float, y: float, to_x: float, to_y: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        escape(kind), x, y, to_x, to_y
    )
