"""The charts of a report, as inline SVG by matplotlib. No chart without data.

Names are drawn as shapes, so a page needs no font.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from gblm.errors import MachineError
from gblm.record import Ratio, Record
from gblm.report.sources import Folder

# Okabe and Ito's colours, told apart by most eyes; the shapes differ, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SHAPES = "osD^vP"
STYLE = {
    "svg.fonttype": "path", "svg.hashsalt": "gblm", "text.parse_math": False, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "axes.axisbelow": True,
}  # fmt: skip
WIDTH = 5.2
# A name longer than this is cut in a picture; tables have it whole.
LONGEST = 34
QUALITY, TIME = "perplexity", "tpot_ms_p50"


@dataclass(frozen=True)
class Figure:
    """A figure is a chart as inline SVG; the note under it says what it was measured with."""

    title: str
    picture: Markup
    note: str = ""


def draw(title: str, note: str, height: float, paint: Callable[[Any], None]) -> Figure:
    """Draw a figure.

    Args:
        title: what it shows, also for those who cannot see it.
        note: to stand under it.
        height: in inches; it is WIDTH wide.
        paint: draws on matplotlib's figure.

    Raises:
        MachineError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MachineError(
            "the pictures of a page need matplotlib: pip install 'gblm-toolkit[report]'."
        ) from error
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # Of signs that the font does not have.
        warnings.simplefilter("ignore")
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        paint(canvas)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(file, format="svg", transparent=True, metadata=metadata)
    # What belongs into a file of its own, and what was drawn in words, is left out.
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', text)
    head = Markup('<svg xmlns:xlink="http://www.w3.org/1999/xlink" {} role="img" aria-label="{}">')
    inner = text[text.index(">", text.index("<svg")) + 1 :]
    # Both are matplotlib's own, which escapes what it writes.
    box, body = Markup(size.group() if size else ""), Markup(inner)  # noqa: S704
    return Figure(title, head.format(box, title) + body, note)


def frontiers(records: Sequence[Record]) -> Iterator[Figure]:
    """Draw perplexity against size and time, of models that records know by one name."""
    sizes = {
        side: facts["bytes"] / 1e6
        for record in records
        for side, facts in record.sides.items()
        if isinstance(facts.get("bytes"), int)
    }
    yield from _against(records, "MB of all tensors", sizes)
    for record in records:
        for load in record.loads:
            times = {side: record.value(side, load, TIME) for side in record.sides}
            known = {side: value for side, value in times.items() if value}
            yield from _against(records, f"{TIME}, {load}", known)


def _against(records: Sequence[Record], x: str, known: dict[str, float]) -> Iterator[Figure]:
    """Draw a chart of each text; figures of different protocols never share one."""
    loads = dict.fromkeys(r.load for one in records for r in one.rows if r.metric == QUALITY)
    axis = x.partition(",")[0]
    for load in loads:
        marks = {
            row.side: (known[row.side], row.value)
            for record in records
            for row in record.rows
            if (row.load, row.metric) == (load, QUALITY) and row.value and row.side in known
        }
        finite = {name: mark for name, mark in marks.items() if all(map(math.isfinite, mark))}
        if len(finite) > 1:
            yield _scatter(f"Perplexity against {axis}", f"{load}; {x}", finite, axis)


def _scatter(title: str, note: str, marks: Mapping[str, tuple[float, float]], x: str) -> Figure:
    """Draw named points, on logarithmic axes where values differ much."""

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        for index, (name, point) in enumerate(marks.items()):
            axes.plot(*point, **_look(index), linestyle="", markersize=7, label=short(name))
        for scale, place in ((axes.set_xscale, 0), (axes.set_yscale, 1)):
            values = [point[place] for point in marks.values()]
            scale("log" if max(values) > 4 * min(values) else "linear")
        axes.set(xlabel=x, ylabel=QUALITY)
        _legend(canvas, len(marks))

    return draw(title, note, 3.2 + 0.18 * len(marks), paint)


def ratios(record: Record) -> Iterator[Figure]:
    """Draw how each load's figures compare with the baseline's, where there are rounds."""
    for load in record.loads:
        sides = [side for side in record.sides if side != record.baseline]
        known = {side: found for side in sides if (found := _ratios(record, side, load))}
        if known:
            yield _dots(load, known, f"times {record.baseline}")


def _ratios(record: Record, side: str, load: str) -> dict[str, Ratio]:
    found = {metric: record.ratio(side, load, metric) for metric in record.metrics}
    return {
        metric: ratio
        for metric, ratio in found.items()
        if ratio is not None and ratio.rounds and math.isfinite(ratio.high)
    }


def _dots(load: str, known: Mapping[str, Mapping[str, Ratio]], x: str) -> Figure:
    """Draw a line for each metric, and on it a mark with its interval for each side."""
    lines = list(dict.fromkeys(line for found in known.values() for line in found))

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        for index, (name, found) in enumerate(known.items()):
            shift = 0.6 * ((index + 0.5) / len(known) - 0.5)
            places = [lines.index(line) + shift for line in found]
            spread = [[r.median - r.low for r in found.values()],
                      [r.high - r.median for r in found.values()]]  # fmt: skip
            axes.errorbar([r.median for r in found.values()], places, xerr=spread, **_look(index),
                          linestyle="", markersize=5, label=short(name))  # fmt: skip
        axes.axvline(1, color="black", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(lines)), [short(line) for line in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set(xlabel=x)
        _legend(canvas, len(known))

    height = 1.1 + (0.16 + 0.14 * len(known)) * len(lines) + 0.2 * len(known)
    return draw("Ratio to the baseline", load, height, paint)


def sparsities(folders: Sequence[Folder]) -> Iterator[Figure]:
    """Draw sparsity over projections and decoder layers, all folders on one scale."""
    every = [share for folder in folders for share in folder.sparsity.values()]
    for folder in folders:
        if folder.sparsity:
            yield _sparsity(folder, *_scale(min(every), max(every)))


def _sparsity(folder: Folder, low: float, high: float) -> Figure:
    parts = list(dict.fromkeys(part for part, _ in folder.sparsity))
    depth = sorted({layer for _, layer in folder.sparsity})
    values = [[folder.sparsity.get((part, n), math.nan) for n in depth] for part in parts]

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        axes.grid(visible=False)
        image = axes.imshow(values, cmap="Blues", vmin=low, vmax=high, aspect="auto",
                            interpolation="none")  # fmt: skip
        axes.set_yticks(range(len(parts)), [part.rpartition(".")[2] for part in parts])
        every = max(1, math.ceil(len(depth) / 12))
        axes.set_xticks(range(0, len(depth), every), depth[::every])
        axes.set(xlabel="decoder layer")
        canvas.colorbar(image, ax=axes)

    note = "share of the weights that is not stored"
    return draw(f"Sparsity, {folder.name}", note, 0.9 + 0.22 * len(parts), paint)


def short(name: str) -> str:
    """Cut a name to what fits a picture."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _scale(low: float, high: float) -> tuple[float, float]:
    """Give limits of colours; where all is the same they are those of any share."""
    return (low, high) if high > low else (0.0, 1.0)


def _look(index: int) -> dict[str, str]:
    shape = SHAPES[(index + index // len(COLOURS)) % len(SHAPES)]
    return {"color": COLOURS[index % len(COLOURS)], "marker": shape}


def _legend(canvas: Any, count: int) -> None:
    canvas.legend(loc="outside lower center", ncols=1 if count > 3 else count, frameon=False)
