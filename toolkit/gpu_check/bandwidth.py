"""What the device can do at most: bytes read per second, copied per second, operations per second.

Shares of the read bandwidth in all other sections are shares of what is found here.
"""

from __future__ import annotations

import torch

from gblm.gpu_check.place import Place
from gblm.gpu_check.section import Section

BYTES, SIDE = 1 << 31, 8192


def measure_limits(place: Place, section: Section, size: int = BYTES, side: int = SIDE) -> None:
    """Rows {"what", "per_second", "unit"}: read, copy, bf16.

    Args:
        place: where.
        section: takes the rows.
        size: bytes that are read.
        side: of the square matrices that are multiplied.
    """

    def read() -> None:
        numbers = place.normal(size // 4)
        best = min(place.time([numbers.sum]).seconds, place.time([numbers.amax]).seconds)
        _add(section, "read", size / best / 1e9, "GB/s")

    def copy() -> None:
        numbers = torch.zeros(size // 8, device=place.device)
        target = torch.empty_like(numbers)
        seconds = place.time([lambda: target.copy_(numbers)]).seconds
        _add(section, "copy", size / seconds / 1e9, "GB/s")

    def multiply() -> None:
        square = place.normal(side, side, dtype=torch.bfloat16)
        seconds = place.time([lambda: square @ square]).seconds
        _add(section, "bf16", 2 * side**3 / seconds / 1e12, "TFLOP/s")

    for name, work in (("read", read), ("copy", copy), ("bf16", multiply)):
        section.attempt(name, work)
        place.release()


def read_limit(section: Section) -> float | None:
    """Bytes per second that can be read: what a copy moves, where that is more."""
    found = {row["what"]: float(row["per_second"]) for row in section.rows}
    rates = [found[name] for name in ("read", "copy") if name in found]
    return 1e9 * max(rates) if rates else None


def _add(section: Section, what: str, rate: float, unit: str) -> None:
    section.rows.append({"what": what, "per_second": rate, "unit": unit})
