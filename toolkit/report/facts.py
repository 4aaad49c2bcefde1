"""What a report takes from records: quality, speed, ratios, curves, checks; as plain values.

The readers of records are in `quality`, `speed`, `models` and `gpu`. Records may come from
anywhere, so every figure is checked to be one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Quality:
    """The perplexity of one model.

    Attributes:
        name: of the model.
        protocol: the whole line; figures of different protocols stand in different charts.
        perplexity: may be infinite.
        ratio: to the dense baseline; None if it was not measured.
        num_bytes: of all tensors; None if the record does not know.
        bits: per pruned weight, masks and scales counted; None if unknown.
        text: fingerprint of the tokens; "" if unknown.
    """

    name: str
    protocol: str
    perplexity: float
    ratio: float | None = None
    num_bytes: float | None = None
    bits: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Drift:
    """How far one model's predictions are from its baseline's on one text.

    Attributes:
        name: of the model.
        beside: of the baseline.
        protocol: the whole line.
        figures: mean, p99 and max change of log-probs, nats; share of the same next token; mean and
            p99 of KL(dense ‖ model), nats, None where the engine gives none.
    """

    name: str
    beside: str
    protocol: str
    figures: tuple[float | None, ...]


@dataclass(frozen=True)
class Score:
    """A metric of one task, 0 to 1, with its standard error if it has one."""

    name: str
    protocol: str
    task: str
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Check:
    """A value that was held against a bound: a gate, or a part of an export's validation.

    Attributes:
        name: of the model.
        what: was checked.
        value: as text.
        bound: as text.
        passed: whether it holds.
    """

    name: str
    what: str
    value: str
    bound: str
    passed: bool


@dataclass(frozen=True)
class Speed:
    """Milliseconds per token of one model under one load: median, smallest, largest round."""

    name: str
    setting: str
    median: float
    low: float
    high: float
    valid: bool = True


@dataclass(frozen=True)
class Ratio:
    """One metric beside the baseline's, paired by round."""

    name: str
    setting: str
    metric: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timed:
    """One call on a GPU, beside the same one of cuBLAS in bfloat16.

    Attributes:
        table: its title; calls of one table share it.
        note: how it was measured, and where.
        name: of what was called.
        tokens: at once.
        microseconds: of a call.
        ratio: how many times faster than cuBLAS; None if that was not measured.
        share: of the bandwidth for reading; None if unknown.
    """

    table: str
    note: str
    name: str
    tokens: int
    microseconds: float
    ratio: float | None
    share: float | None


@dataclass(frozen=True)
class Measures:
    """All figures of one model under one load: label → median of the rounds."""

    name: str
    setting: str
    figures: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        chart: lines of one chart share it.
        name: of the line.
        x: label of the axis across.
        y: label of the axis upwards.
        points: (x, y).
        logs: axes that are logarithmic, as `charts.curves` takes them.
    """

    chart: str
    name: str
    x: str
    y: str
    points: tuple[tuple[float, float], ...]
    logs: str = ""


@dataclass
class Facts:
    """Everything of one or many records; `notes` are what makes figures less than they look."""

    quality: list[Quality] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    timed: list[Timed] = field(default_factory=list)
    measures: list[Measures] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Facts) -> None:
        """Take over another's, each thing once."""
        for one in fields(self):
            own = getattr(self, one.name)
            own += [item for item in getattr(other, one.name) if item not in own]


def finite(value: Any) -> float:
    """A number that is one.

    Raises:
        TypeError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{str(value)[:40]!r} is not a number")
    return float(value)


def finite_or_inf(value: Any) -> float:
    """A number, or infinity, which a perplexity or a difference may be.

    Raises:
        TypeError: it is neither.
    """
    return math.inf if value == math.inf else finite(value)


def maybe(values: Record, key: str) -> float | None:
    """A number, or None where there is none."""
    return None if values.get(key) is None else finite(values[key])


def words(value: Any) -> str:
    """A piece of text, on one line.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not text")
    return " ".join(value.split())[:300]


def model(value: Any) -> str:
    """The last part of a model's folder or hub id."""
    return words(value).rstrip("/").rpartition("/")[2]


def device(record: Record) -> str:
    """The machine that a record names."""
    provenance = record.get("provenance") or record.get("machine") or {}
    return words(provenance.get("device") or provenance.get("cpu") or "unknown machine")


def spread(row: Record) -> tuple[float, float, float]:
    """Median, smallest and largest."""
    return finite(row["median"]), finite(row["min"]), finite(row["max"])
