"""The record of a check as tables of plain text: lines, times, decode loop, pruning, leftovers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gblm.gpu_check.weights import CUBLAS

Table = tuple[list[str], list[list[str]]]


def tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """Header and rows of each table, the lines first."""
    sections = record["sections"]
    yield _lines(record["lines"])
    yield from _times(sections["times"]["rows"])
    yield _decode(sections["decode"]["rows"])
    yield _pruning(sections["pruning"]["rows"])
    yield _sections(sections)


def _lines(lines: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [line["line"], f"{line['bound']:g}", _number(line["value"], "{:.3g}"), line["state"]]
        for line in lines
    ]
    return ["line", "bound", "measured", ""], rows


def _times(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """One table per shape: microseconds of cuBLAS, and how often faster the others are."""
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        tokens = sorted({row["tokens"] for row in own})
        shape = "x".join(map(str, own[0]["shape"]))
        lines = []
        for contender in dict.fromkeys((row["contender"], row["spec"]) for row in own):
            found = {
                row["tokens"]: row for row in own if (row["contender"], row["spec"]) == contender
            }
            lines.append(
                [" ".join(contender).strip(), *(_cell(found.get(number)) for number in tokens)]
            )
        yield [f"{label} {shape}, tokens:", *map(str, tokens)], lines


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    mark = "" if row["captured"] else "*"
    if row["contender"] == CUBLAS or row["x_cublas"] is None:
        return f"{row['us']:.1f} us{mark}"
    return f"{row['x_cublas']:.2f}x{mark}"


def _decode(rows: Sequence[Mapping[str, Any]]) -> Table:
    lines = [
        [
            f"{row['contender']} {row['spec']}".strip(),
            str(row["batch"]),
            f"{row['tokens_per_second']:.1f}",
            _number(row["x_dense"], "{:.2f}x"),
        ]
        for row in rows
    ]
    return ["decode loop", "batch", "tokens/s", "dense"], lines


def _pruning(rows: Sequence[Mapping[str, Any]]) -> Table:
    lines = [
        [f"{row['method']} {row['pattern']}", f"{row['layers_per_minute']:.1f} layers/min"]
        if row["what"] == "prune"
        else [f"{row['statistic']} {row['columns']}", f"{row['tokens_per_second']:.0f} tokens/s"]
        for row in rows
    ]
    return ["pruning", "speed"], lines


def _sections(sections: Mapping[str, Any]) -> Table:
    rows = [
        [name, f"{own['seconds']:.0f} s", *(str(len(own[key])) for key in _COUNTED)]
        for name, own in sections.items()
    ]
    return ["section", "took", *_COUNTED], rows


_COUNTED = ("rows", "skipped", "failed")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
