"""The charts of a report, each with the table of its figures. No chart without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from markupsafe import Markup
from torch import Tensor

from gblm.report import charts, pictures
from gblm.report.axes import number
from gblm.report.charts import Interval, Point, Series
from gblm.report.facts import Facts, Ratio
from gblm.report.folders import LinearFacts, PackedFacts
from gblm.report.tables import by_protocol

# More lines than this are a tangle; further ones get a chart of their own.
MOST_LINES = 6
# Perplexities so many times the best are drawn at the edge, or the others could not be told apart.
WORST = 8.0
# What a metric is called in a chart of ratios, and which way is better.
DIRECTIONS = {
    "tok_s": "more is better",
    "per_s": "more is better",
    "user": "more is better",
    "share": "more is better",
    "speed": "more is better",
    "decoding": "more is faster",
}


# Title of a map of all linears → its unit, and the value of one.
MAPS: dict[str, tuple[str, Callable[[LinearFacts], float]]] = {
    "Sparsity": ("share not stored", lambda linear: linear.sparsity),
    "Bits per weight": ("bits, masks and scales counted", lambda linear: linear.bits),
    "Unevenness of columns": (
        "standard deviation of the columns' kept shares",
        lambda linear: linear.column_spread,
    ),
}
# Title of a map → what a linear is there.
KINDS: dict[str, Callable[[LinearFacts], str]] = {
    "Backend on this machine's CPU": lambda linear: linear.backend,
    "Pattern and values": lambda linear: f"{linear.pattern} {linear.values}",
}
Value = TypeVar("Value")
Table = tuple[list[str], list[str], list[list[Value | None]]]


@dataclass(frozen=True)
class Figure:
    """One chart.

    Attributes:
        title: above it.
        picture: inline SVG.
        note: under it: what it was measured with.
        header: of the table of its figures.
        rows: of that table.
    """

    title: str
    picture: Markup
    note: str = ""
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def quality(facts: Facts) -> Iterator[Figure]:
    """Perplexity against size, one chart for each protocol and text."""
    for (protocol, _), rows in by_protocol(facts.quality).items():
        for key, label in (("num_bytes", "MB of all tensors"), ("bits", "bits per weight")):
            scale = 1e6 if key == "num_bytes" else 1
            own = [row for row in rows if getattr(row, key) is not None]
            marks = [Point(row.name, getattr(row, key) / scale, row.perplexity,
                           kind=int(row.ratio != 1.0))
                     for row in own if row.perplexity < float("inf")]  # fmt: skip
            if len(marks) > 1:
                title, worst = f"Perplexity against {label}", WORST * min(p.y for p in marks)
                table = tuple((r.name, number(getattr(r, key) / scale), number(r.perplexity),
                               number(r.ratio)) for r in own)  # fmt: skip
                yield Figure(
                    title,
                    charts.points(title, marks, label, "perplexity", ("dense", "packed"), worst),
                    protocol,
                    ("model", label, "perplexity", "× dense"),
                    table,
                )
                break


def quality_and_speed(facts: Facts) -> Iterator[Figure]:
    """Perplexity against measured time, where one model has both."""
    for (protocol, _), rows in by_protocol(facts.quality).items():
        known = {row.name: row for row in rows if row.perplexity < float("inf")}
        for setting in dict.fromkeys(speed.setting for speed in facts.speeds):
            own = [s for s in facts.speeds if s.setting == setting and s.name in known]
            if len(own) < 2:
                continue
            marks = [Point(s.name, s.median, known[s.name].perplexity,
                           kind=int(known[s.name].ratio != 1.0)) for s in own]  # fmt: skip
            title = "Perplexity against measured time"
            yield Figure(
                title,
                charts.points(title, marks, "ms per token, decoding", "perplexity",
                              ("dense", "packed")),
                f"{protocol}; {setting}",
                ("model", "ms per token", "perplexity"),
                tuple((s.name, number(s.median), number(known[s.name].perplexity)) for s in own),
            )  # fmt: skip


def speeds(facts: Facts) -> Iterator[Figure]:
    """Time per token of every model under one load, and ratios to the baseline."""
    for setting in dict.fromkeys(speed.setting for speed in facts.speeds):
        own = [s for s in facts.speeds if s.setting == setting]
        title = "Milliseconds per token, decoding"
        rows = [Interval(s.name, s.median, s.low, s.high) for s in own]
        yield _intervals(title, rows, "ms per token: median, smallest and largest round", setting)
    for setting in dict.fromkeys(ratio.setting for ratio in facts.ratios):
        yield from _ratios([ratio for ratio in facts.ratios if ratio.setting == setting], setting)


def curves(facts: Facts) -> Iterator[Figure]:
    """Latency over load or quantile, and kernels over tokens."""
    for chart in dict.fromkeys(curve.chart for curve in facts.curves):
        every = [curve for curve in facts.curves if curve.chart == chart]
        for start in range(0, len(every), MOST_LINES):
            own = every[start : start + MOST_LINES]
            title, _, note = chart.partition(", ")
            series = [Series(curve.name, curve.points) for curve in own]
            first = own[0]
            yield Figure(
                title,
                charts.curves(title, series, first.x, first.y, first.logs),
                note,
                ("", *(number(x) for x, _ in first.points)),
                tuple((c.name, *(number(y) for _, y in c.points)) for c in own),
            )


def layers(folders: Sequence[PackedFacts]) -> Iterator[tuple[str, list[Figure]]]:
    """Heat maps over projections and decoder layers, then over heads: all folders on one scale."""
    for title, (unit, value) in MAPS.items():
        tables = {folder.name: _table(folder, value) for folder in folders}
        cells = [c for _, _, rows in tables.values() for row in rows for c in row if c is not None]
        # What is the same everywhere stands in the folder's line.
        if cells and number(min(cells)) != number(max(cells)):
            limits = min(cells), max(cells)
            yield (
                title,
                [
                    Figure(name, pictures.heat(f"{title}, {name}", *table, unit, limits))
                    for name, table in tables.items()
                ],
            )
    for title, kind in KINDS.items():
        kinds = list(dict.fromkeys(kind(one) for folder in folders for one in folder.linears))
        if len(kinds) > 1:
            yield (
                title,
                [
                    Figure(
                        name := folder.name,
                        pictures.kinds(f"{title}, {name}", *_table(folder, kind), kinds),
                    )
                    for folder in folders
                ],
            )
    own = [folder for folder in folders if folder.heads]
    if own:
        title, shares = "Heads", [s for folder in own for row in folder.heads.values() for s in row]
        yield f"{title}: kept share of the output projection's columns", [
            Figure(
                folder.name,
                pictures.heat(f"{title}, {folder.name}", [f"layer {n}" for n in folder.heads],
                              [str(n) for n in range(max(map(len, folder.heads.values())))],
                              list(folder.heads.values()), "share kept",
                              (min(shares), max(shares))),
            )
            for folder in own
        ]  # fmt: skip


def masks(folders: Sequence[PackedFacts]) -> Iterator[tuple[str, list[Figure]]]:
    """By linear: each folder's mask on one scale, then how unevenly its columns are kept."""
    names = dict.fromkeys(name for folder in folders for name in folder.masks)
    for name in names:
        own = {folder.name: folder.masks[name] for folder in folders if name in folder.masks}
        limits = _limits(list(own.values()))
        series = [Series(label, _sorted_columns(mask)) for label, mask in own.items()]
        scale = f"white {limits[0]:.0%} kept or less, blue {limits[1]:.0%} or more"
        found = [
            Figure(label, pictures.mask_picture(f"Mask of {name}, {label}", mask, limits), scale)
            for label, mask in own.items()
        ]
        found.append(
            Figure(
                "Columns by kept share",
                charts.curves(f"{name}: columns by kept share", series[:MOST_LINES],
                              "share of columns", "kept share of the column"),
                "A flat line keeps every input alike; a steep one drops whole columns, the "
                "structural pattern of arXiv 2311.04902.",
            )
        )  # fmt: skip
        layer, _, part = name.partition(".")
        yield f"Layer {layer}, {part}", found


def _table(folder: PackedFacts, value: Callable[[LinearFacts], Value]) -> Table[Value]:
    """Projections, decoder layers, and a value for each pair that is packed."""
    found = {(linear.part, linear.layer): value(linear) for linear in folder.linears}
    parts = list(dict.fromkeys(part for part, _ in found))
    depth = sorted({layer for _, layer in found})
    rows = [[found.get((part, layer)) for layer in depth] for part in parts]
    return [part.rpartition(".")[2] for part in parts], [str(layer) for layer in depth], rows


def _intervals(
    title: str, rows: Sequence[Interval], label: str, note: str, one: float | None = None
) -> Figure:
    return Figure(
        title,
        charts.intervals(title, rows, label, one),
        note,
        ("", "median", "low", "high"),
        tuple((r.name, number(r.middle), number(r.low), number(r.high)) for r in rows),
    )


def _ratios(found: Sequence[Ratio], setting: str) -> Iterator[Figure]:
    """A chart for each model, or for each metric where there are more models than metrics."""
    names = list(dict.fromkeys(ratio.name for ratio in found))
    metrics = list(dict.fromkeys(ratio.metric for ratio in found))
    by_metric = len(names) > len(metrics)
    for key in metrics if by_metric else names:
        own = [r for r in found if key == (r.metric if by_metric else r.name)]
        rows = [Interval(r.name if by_metric else directed(r.metric), r.median, r.low, r.high)
                for r in own]  # fmt: skip
        title = f"{directed(key) if by_metric else key}: ratio to the baseline"
        yield _intervals(title, rows, "ratio and its interval", setting, 1.0)


def directed(metric: str) -> str:
    """A metric, and which way is better."""
    words = next((said for end, said in DIRECTIONS.items() if metric.endswith(end)), "")
    return f"{metric} ({words or 'less is better'})"


def _limits(found: Sequence[Tensor]) -> tuple[float, float]:
    """Kept shares between which the pictures' colours run: all but the rarest cells."""
    cells = torch.cat([pictures.downsample(mask).flatten() for mask in found])
    low, high = (float(torch.quantile(cells, share)) for share in (0.02, 0.98))
    return (low, high) if high > low else (0.0, 1.0)


def _sorted_columns(mask: Tensor) -> list[tuple[float, float]]:
    """Kept shares of the columns, rising, at most 100 of them, over their rank."""
    shares = mask.float().mean(dim=0).sort().values
    picks = torch.linspace(0, len(shares) - 1, min(100, len(shares))).round().long()
    return [(float(pick) / max(1, len(shares) - 1), float(shares[pick])) for pick in picks]
