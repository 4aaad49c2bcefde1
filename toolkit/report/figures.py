"""Which charts a report shows. No chart without data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup

from gblm.record import Record
from gblm.report import charts
from gblm.report.sources import Folder
from gblm.report.tables import label

# More lines than this are no chart; the table has them.
MOST_LINES = 40
QUALITY, TIME = "perplexity", "tpot_ms_p50"


@dataclass(frozen=True)
class Figure:
    """A figure is a chart as inline SVG; the note under it says what it was measured with."""

    title: str
    picture: Markup
    note: str = ""


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
    for load in loads:
        marks = {
            row.side: (known[row.side], row.value)
            for record in records
            for row in record.rows
            if (row.load, row.metric) == (load, QUALITY) and row.value and row.side in known
        }
        finite = {name: mark for name, mark in marks.items() if all(map(math.isfinite, mark))}
        if len(finite) > 1:
            title = f"Perplexity against {x.partition(',')[0]}"
            note = "; ".join((load, x))
            yield Figure(title, charts.scatter(title, finite, x.partition(",")[0], QUALITY), note)


def of_record(record: Record) -> Iterator[Figure]:
    """Draw ratios to the baseline where there are rounds, and each metric over many loads."""
    sides = [side for side in record.sides if side != record.baseline]
    for load in record.loads:
        series = {side: _ratios(record, side, load) for side in sides}
        yield from _dots("Ratio to the baseline", series, f"times {record.baseline}", load, 1.0)
    for metric in record.metrics:
        loads = list(dict.fromkeys(row.load for row in record.rows if row.metric == metric))
        if len(loads) > 2:
            over = {side: _over_loads(record, side, loads, metric) for side in record.sides}
            yield from _dots(metric, over, label(record, metric), "")


def _dots(
    title: str,
    series: dict[str, dict[str, charts.Interval]],
    x: str,
    note: str,
    one: float | None = None,
) -> Iterator[Figure]:
    known = {side: found for side, found in series.items() if found}
    lines = list(dict.fromkeys(line for found in known.values() for line in found))
    if 0 < len(lines) <= MOST_LINES:
        yield Figure(title, charts.dots(title, lines, known, x, one), note)


def _ratios(record: Record, side: str, load: str) -> dict[str, charts.Interval]:
    found = {metric: record.ratio(side, load, metric) for metric in record.metrics}
    return {
        metric: (ratio.median, ratio.low, ratio.high)
        for metric, ratio in found.items()
        if ratio is not None and ratio.rounds and math.isfinite(ratio.high)
    }


def _over_loads(
    record: Record, side: str, loads: Sequence[str], metric: str
) -> dict[str, charts.Interval]:
    rows = (record.row(side, load, metric) for load in loads)
    return {
        row.load: (row.value, *(row.interval or (row.value, row.value)))
        for row in rows
        if row is not None and row.value is not None and math.isfinite(row.value)
    }


def sparsities(folders: Sequence[Folder]) -> Iterator[Figure]:
    """Draw sparsity over projections and decoder layers, all folders on one scale."""
    every = [share for folder in folders for share in folder.sparsity.values()]
    for folder in folders:
        parts = list(dict.fromkeys(part for part, _ in folder.sparsity))
        depth = sorted({layer for _, layer in folder.sparsity})
        if parts:
            values = [[folder.sparsity.get((part, n), math.nan) for n in depth] for part in parts]
            names = [part.rpartition(".")[2] for part in parts]
            title, limits = f"Sparsity, {folder.name}", (min(every), max(every))
            picture = charts.heat(title, names, list(map(str, depth)), values, limits)
            yield Figure(title, picture, "share of the weights that is not stored")


def masks(folders: Sequence[Folder]) -> Iterator[Figure]:
    """Draw each folder's masks, linear by linear on one scale."""
    for place in dict.fromkeys(place for folder in folders for place in folder.masks):
        own = {folder.name: folder.masks[place] for folder in folders if place in folder.masks}
        cells = torch.cat([charts.downsample(mask).flatten() for mask in own.values()])
        # All but the rarest cells.
        low, high = (float(torch.quantile(cells, share)) for share in (0.02, 0.98))
        limits = (low, high) if high > low else (0.0, 1.0)
        for name, mask in own.items():
            title = f"Layer {place[1]}, {place[0]}, {name}"
            scale = f"white {limits[0]:.0%} kept or less, blue {limits[1]:.0%} or more"
            yield Figure(title, charts.mask_picture(f"Mask: {title}", mask, limits), scale)
