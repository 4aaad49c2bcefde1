"""Charts as inline SVG, by matplotlib. Names are drawn as shapes, so a page needs no font."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from gblm.errors import MachineError

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
# Of a mask's picture: at most so many cells down and across.
CELLS = (72, 96)
Interval = tuple[float, float, float]


@contextmanager
def drawing(title: str, height: float) -> Iterator[tuple[Any, list[Markup]]]:
    """Give a figure to draw on and a list that holds its SVG afterwards.

    Args:
        title: what it shows, for those who cannot see it.
        height: in inches; it is WIDTH wide.

    Raises:
        MachineError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MachineError(
            "the pictures of a page need matplotlib: pip install 'gblm-toolkit[report]', or write "
            "--markdown alone."
        ) from error
    made: list[Markup] = []
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # Of signs that the font does not have.
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, made
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    made.append(_inline(title, file.getvalue()))


def _inline(title: str, text: str) -> Markup:
    """The SVG without what belongs into a file of its own, and without what was drawn in words."""
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', body)
    inner = body[body.index(">", body.index("<svg")) + 1 :]
    return (
        Markup('<svg xmlns:xlink="http://www.w3.org/1999/xlink" {} role="img" aria-label="').format(
            Markup(size.group() if size else "")  # noqa: S704 (matplotlib's own, four numbers)
        )
        + title
        + Markup('">')
        + Markup(inner)  # noqa: S704 (drawn by matplotlib, which escapes what it writes)
    )


def scatter(title: str, marks: Mapping[str, tuple[float, float]], x: str, y: str) -> Markup:
    """Draw named points on logarithmic axes.

    Args:
        title: what it shows.
        marks: name → (x, y), positive; at least one.
        x: label of the axis across.
        y: label of the axis upwards.
    """
    with drawing(title, 3.2 + 0.18 * len(marks)) as (figure, made):
        axes = figure.subplots()
        for index, (name, point) in enumerate(marks.items()):
            axes.plot(*point, **_look(index), linestyle="", markersize=7, label=short(name))
        for scale, values in ((axes.set_xscale, 0), (axes.set_yscale, 1)):
            every = [point[values] for point in marks.values()]
            scale("log" if max(every) > 4 * min(every) else "linear")
        axes.set(xlabel=x, ylabel=y)
        _legend(figure, len(marks))
    return made[0]


def dots(
    title: str,
    lines: Sequence[str],
    series: Mapping[str, Mapping[str, Interval]],
    x: str,
    one: float | None = None,
) -> Markup:
    """Draw a line for each name, with a mark and its interval for each series.

    Args:
        title: what it shows.
        lines: names, from the top.
        series: name → line → middle, low and high.
        x: label of the axis across, logarithmic where values differ much.
        one: where to draw a line at which nothing differs.
    """
    row = 0.16 + 0.14 * len(series)
    with drawing(title, 1.1 + row * len(lines) + 0.2 * len(series)) as (figure, made):
        axes = figure.subplots()
        for index, (name, found) in enumerate(series.items()):
            shift = 0.6 * ((index + 0.5) / len(series) - 0.5)
            places = [lines.index(line) + shift for line in found]
            middles = [value[0] for value in found.values()]
            spread = [[max(0.0, m - low) for m, low, _ in found.values()],
                      [max(0.0, high - m) for m, _, high in found.values()]]  # fmt: skip
            axes.errorbar(middles, places, xerr=spread, **_look(index), linestyle="", markersize=5,
                          label=short(name))  # fmt: skip
        every = [v for found in series.values() for value in found.values() for v in value]
        if min(every) > 0 and max(every) > 20 * min(every):
            axes.set_xscale("log")
        if one is not None:
            axes.axvline(one, color="black", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(lines)), [short(line) for line in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set(xlabel=x)
        _legend(figure, len(series))
    return made[0]


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    limits: tuple[float, float],
) -> Markup:
    """Draw a table as colours; NaN leaves a gap.

    Args:
        title: what it shows, which stands at the colours, too.
        rows: names, from the top.
        columns: names, from the left.
        values: [rows][columns].
        limits: values that are pale and dark; pictures to compare share them.
    """
    with drawing(title, 0.9 + 0.22 * len(rows)) as (figure, made):
        axes = figure.subplots()
        axes.grid(visible=False)
        low, high = limits
        # Where all is the same it is neither pale nor dark.
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        image = axes.imshow(values, cmap="Blues", vmin=low, vmax=high, aspect="auto",
                            interpolation="none")  # fmt: skip
        axes.set_yticks(range(len(rows)), rows)
        every = max(1, math.ceil(len(columns) / 12))
        axes.set_xticks(range(0, len(columns), every), list(columns)[::every])
        axes.set(xlabel="decoder layer")
        figure.colorbar(image, ax=axes)
    return made[0]


def mask_picture(title: str, mask: Tensor, limits: tuple[float, float]) -> Markup:
    """Draw a mask [out, in] bool from above, the kept share of its columns over it.

    Args:
        title: what it shows.
        mask: [out, in] bool.
        limits: the kept shares that are white and blue; pictures to compare share them.
    """
    tall = min(4.0, max(1.2, 4.4 * mask.shape[0] / mask.shape[1]))
    with drawing(title, 1.4 + tall) as (figure, made):
        top, axes = figure.subplots(2, 1, sharex=True, height_ratios=(0.6, tall))
        columns = mask.float().mean(dim=0)
        top.fill_between(range(mask.shape[1]), columns, step="mid", color=COLOURS[0], linewidth=0)
        top.set(ylim=(0, 1), ylabel="kept")
        axes.grid(visible=False)
        extent = (-0.5, mask.shape[1] - 0.5, mask.shape[0] - 0.5, -0.5)
        axes.imshow(downsample(mask), cmap="Blues", vmin=limits[0], vmax=limits[1], aspect="auto",
                    interpolation="none", extent=extent)  # fmt: skip
        axes.set(xlabel="column", ylabel="row")
    return made[0]


def downsample(mask: Tensor) -> Tensor:
    """Average a mask [out, in] to kept shares [at most CELLS] float32."""
    size = (min(mask.shape[0], CELLS[0]), min(mask.shape[1], CELLS[1]))
    pooled: Tensor = torch.nn.functional.adaptive_avg_pool2d(mask.float()[None, None], size)
    return pooled[0, 0]


def short(name: str) -> str:
    """Cut a name to what fits a picture."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _look(index: int) -> dict[str, str]:
    shape = SHAPES[(index + index // len(COLOURS)) % len(SHAPES)]
    return {"color": COLOURS[index % len(COLOURS)], "marker": shape}


def _legend(figure: Any, count: int) -> None:
    figure.legend(loc="outside lower center", ncols=1 if count > 3 else count, frameon=False)
