"""An axis of a chart: from values to places, with round ticks, linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LOG_STEPS = (1, 2, 5)
MAX_TICKS = 7


@dataclass(frozen=True)
class Axis:
    """Values low to high, at places from `start` to `stop`.

    Attributes:
        label: what it shows, with its unit.
        low: value at `start`.
        high: value at `stop`; larger than `low`.
        start: place of `low`, in the units of the picture.
        stop: place of `high`.
        log: whether equal distances are equal ratios; `low` must be positive then.
    """

    label: str
    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    @classmethod
    def around(
        cls, label: str, values: Iterable[float], start: float, stop: float, log: bool = False
    ) -> Axis:
        """An axis with a little room at both ends of the finite values; there must be one."""
        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite), max(finite)
        if log and low > 0:
            room = max(1.05, (high / low) ** 0.06)
            return cls(label, low / room, high * room, start, stop, True)
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(label, low - room, high + room, start, stop)

    def place(self, value: float) -> float:
        """Where a value lies; values outside lie at the edge."""
        inside = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 2)

    def ticks(self) -> list[float]:
        """Round values within the axis, at most MAX_TICKS."""
        if self.log and self.high / self.low > 4:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [step * 10.0**decade for decade in decades for step in LOG_STEPS]
            inside = [value for value in found if self.low <= value <= self.high]
            return inside[:: -(-len(inside) // MAX_TICKS)]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]


def number(value: float | None, count: int = 3) -> str:
    """A figure for people: `count` digits, no exponent for what is near 1."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, count - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{count}g}"
