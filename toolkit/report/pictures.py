"""Pictures of numbers in rows and columns: heat maps, and masks with their densities beside them.

A mask's picture is an 8-bit PNG inside the SVG; stronger blue keeps more.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from markupsafe import Markup
from torch import Tensor

from gblm.report.axes import number
from gblm.report.charts import LINE, WIDTH, colour, short, svg, text

BLUE = (0, 114, 178)
# At most so many cells down and across; each is the mean of the weights that it stands for.
CELLS = (72, 96)
BINS = 192
PROFILE = 44


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    unit: str,
    limits: tuple[float, float],
) -> Markup:
    """A table as colours.

    Args:
        title: what it shows.
        rows: names, from the top.
        columns: names, from the left.
        values: [rows][columns]; None leaves a gap.
        unit: what the values are.
        limits: the values that are pale and blue; pictures to compare share them.
    """
    low, high = limits

    def paint(value: float) -> tuple[str, float, str]:
        share = (value - low) / (high - low) if high > low else 0.5
        return f"rgb{BLUE}", round(0.08 + 0.92 * share, 3), number(value)

    parts, bottom = _cells(rows, columns, values, paint)
    said = f"{unit}: {number(low)} (pale) to {number(high)}"
    parts.append(text(WIDTH - 8, bottom + 17, said, "end"))
    return svg(title, parts, bottom + 24)


def kinds(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[str | None]],
    known: Sequence[str],
) -> Markup:
    """A table of words as colours; arguments as of `heat`.

    Args:
        title: what it shows.
        rows: names, from the top.
        columns: names, from the left.
        values: [rows][columns]; None leaves a gap.
        known: every word, in the order of the colours; pictures to compare share it.
    """

    def paint(value: str) -> tuple[str, float, str]:
        return colour(known.index(value)), 0.85, value

    parts, bottom = _cells(rows, columns, values, paint)
    for index, name in enumerate(known):
        y = bottom + 10 + LINE * index
        parts += [
            Markup('<rect x="8" y="{}" width="9" height="9" fill="{}"/>').format(y, colour(index)),
            text(22, y + 8, short(name), "start"),
        ]
    return svg(title, parts, bottom + 14 + LINE * len(known))


Value = TypeVar("Value")


def _cells(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[Value | None]],
    paint: Callable[[Value], tuple[str, float, str]],
) -> tuple[list[Markup], int]:
    """Names, and cells with the colour, opacity and words that `paint` gives; their lower end."""
    left = 8 + 6 * max(map(len, rows))
    wide, tall = (WIDTH - left - 8) / len(columns), 15
    parts = []
    for r, (name, line) in enumerate(zip(rows, values, strict=True)):
        parts.append(text(left - 4, r * tall + 12, name, "end"))
        for c, value in enumerate(line):
            if value is None:
                continue
            fill, opacity, said = paint(value)
            parts.append(
                Markup(
                    '<rect class="mark" x="{}" y="{}" width="{}" height="{}" fill="{}" '
                    'fill-opacity="{}"><title>{}</title></rect>'
                ).format(
                    round(left + c * wide, 1), r * tall + 1, round(wide - 0.6, 1), tall - 1.2,
                    fill, opacity, f"{name} {columns[c]}: {said}",
                )
            )  # fmt: skip
    bottom = len(rows) * tall + 13
    every = max(1, -(-len(columns) * 20 // (WIDTH - left)))
    parts += [text(left + (c + 0.5) * wide, bottom, name)
              for c, name in enumerate(columns) if c % every == 0]  # fmt: skip
    return parts, bottom


def mask_picture(title: str, mask: Tensor, limits: tuple[float, float]) -> Markup:
    """A mask from above, the kept share of its columns over it and of its rows beside it.

    Args:
        title: what it shows.
        mask: [out, in] bool.
        limits: the kept shares that are white and blue; pictures to compare share them.
    """
    cells = downsample(mask)
    wide = WIDTH - PROFILE - 50
    tall = min(340.0, max(90.0, wide * mask.shape[0] / mask.shape[1]))
    top = PROFILE + 6
    picture = Markup(
        '<image class="mark" x="8" y="{}" width="{}" height="{}" preserveAspectRatio="none" '
        'href="{}"><title>{}</title></image>'
    ).format(top, wide, round(tall, 1), data_uri(cells, limits), title)
    columns, rows = mask.float().mean(dim=0), mask.float().mean(dim=1)
    parts = [
        picture,
        _profile(columns, 8, wide, lambda at, share: (at, PROFILE - PROFILE * share)),
        _profile(rows, top, tall, lambda at, share: (8 + wide + 6 + PROFILE * share, at)),
        text(8, top + tall + LINE + 2, f"{mask.shape[1]} columns →", "start"),
        text(WIDTH - 4, top + 10, f"{mask.shape[0]}", "end"),
        text(WIDTH - 4, top + 22, "rows ↓", "end"),
    ]
    return svg(title, parts, top + tall + 20)


def downsample(mask: Tensor) -> Tensor:
    """Kept shares [at most CELLS] float32 of a mask [out, in]."""
    size = (min(mask.shape[0], CELLS[0]), min(mask.shape[1], CELLS[1]))
    pooled: Tensor = torch.nn.functional.adaptive_avg_pool2d(mask.float()[None, None], size)
    return pooled[0, 0]


def data_uri(cells: Tensor, limits: tuple[float, float]) -> str:
    """Kept shares [rows, columns] as a PNG, in an address."""
    low, high = limits
    levels = ((cells - low) / max(high - low, 1e-6)).clamp(0, 1).mul(255).round().to(torch.uint8)
    rows, columns = levels.shape
    lines = b"".join(b"\0" + bytes(line.tolist()) for line in levels)
    ramp = bytes(round(255 + (to - 255) * i / 255) for i in range(256) for to in BLUE)
    # Bit depth 8, colours from a palette, and the only compression, filter and order there are.
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", ramp),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _profile(
    shares: Tensor,
    start: float,
    length: float,
    place: Callable[[float, float], tuple[float, float]],
) -> Markup:
    """The band between the smallest and largest kept share of neighbours, 0 to 1."""
    size = -(-len(shares) // BINS)
    bins = list(shares.split(size))
    step = length / len(bins)
    upper = [place(start + (i + 0.5) * step, float(part.max())) for i, part in enumerate(bins)]
    lower = [place(start + (i + 0.5) * step, float(part.min())) for i, part in enumerate(bins)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
    return Markup('<polygon class="band" points="{}"/>').format(path)
