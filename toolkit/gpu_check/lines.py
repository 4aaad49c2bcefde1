"""What a GPU is hoped to show: each line with its bound, what was measured, and met or missed.

A missed line is a result like any other; it fails nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gblm.gpu_check.library import LIBRARY_NAMES
from gblm.gpu_check.place import PLENTIFUL
from gblm.gpu_check.weights import CUBLAS

Rows = Sequence[Mapping[str, Any]]
Sections = Mapping[str, Mapping[str, Any]]

# Large linears: with small ones, launches and the ends of waves count more than the kernel.
LARGE = ("7b gate_up", "7b down", "70b gate_up")
DECODE, PREFILL = (1, 2, 4, 8, 16), (256, 1024, 4096)


@dataclass(frozen=True)
class Line:
    """One expectation.

    Attributes:
        text: for people.
        bound: of the value.
        value: from the sections; None where nothing was measured.
        at_most: whether the bound is an upper one.
    """

    text: str
    bound: float
    value: Callable[[Sections], float | None]
    at_most: bool = False

    def judge(self, sections: Sections) -> dict[str, Any]:
        """The line with its value, as plain JSON types."""
        value = self.value(sections)
        state = "not measured"
        if value is not None:
            met = value <= self.bound if self.at_most else value >= self.bound
            state = "met" if met else "missed"
        return {
            "line": self.text, "bound": self.bound, "at_most": self.at_most, "value": value,
            "state": state,
        }  # fmt: skip


def _rows(sections: Sections, name: str) -> Rows:
    found: Rows = sections.get(name, {}).get("rows", [])
    return found


def _worst_error(sections: Sections) -> float | None:
    rows = [row for row in _rows(sections, "correctness") if row["backend"] != CUBLAS]
    return max((float(row["error"]) for row in rows), default=None)


def _replays(sections: Sections) -> float | None:
    rows = [row for row in _rows(sections, "correctness") if row["backend"] != CUBLAS]
    return min((float(row["replays"]) for row in rows), default=None)


def worst_of_the_best(spec: str, tokens: Sequence[int], what: str) -> Callable[..., float | None]:
    """Of each large linear and number of tokens gblm's best backend; of those the worst.

    Args:
        spec: of the format.
        tokens: numbers of tokens.
        what: key of a row of times.
    """

    def value(sections: Sections) -> float | None:
        best: dict[tuple[str, int], float] = {}
        for row in _rows(sections, "times"):
            wanted = row["spec"] == spec and row["label"] in LARGE and row["tokens"] in tokens
            own = row["contender"] not in LIBRARY_NAMES
            if wanted and own and row[what] is not None:
                place = (row["label"], row["tokens"])
                best[place] = max(best.get(place, 0.0), float(row[what]))
        return min(best.values(), default=None)

    return value


def _prefill(sections: Sections) -> list[float]:
    """Speed beside cuBLAS at every size of prefill."""
    return [
        float(row["x_cublas"])
        for row in _rows(sections, "times")
        if row["contender"] == PLENTIFUL and row["tokens"] in PREFILL and row["spec"] == "nm/2:4"
        if row["x_cublas"] is not None
    ]


def _loop(spec: str) -> Callable[[Sections], float | None]:
    def value(sections: Sections) -> float | None:
        rows = [r for r in _rows(sections, "decode") if r["spec"] == spec and r["batch"] == 1]
        return max((float(r["x_dense"]) for r in rows if r["x_dense"] is not None), default=None)

    return value


def _clean(sections: Sections) -> float | None:
    return min((float(row["clean"]) for row in _rows(sections, "sanitizer")), default=None)


LINES = (
    Line("relative error of every backend", 1e-3, _worst_error, at_most=True),
    Line("CUDA graphs give what eager calls give", 1, _replays),
    Line("compute-sanitizer finds nothing", 1, _clean),
    Line("2:4 bf16, up to 16 tokens: share of the read bandwidth", 0.8,
         worst_of_the_best("nm/2:4", DECODE, "share_of_read")),
    Line("2:4 bf16, up to 16 tokens: times cuBLAS bf16", 1.5,
         worst_of_the_best("nm/2:4", DECODE, "x_cublas")),
    Line("2:4 int8, up to 16 tokens: times cuBLAS bf16", 2.6,
         worst_of_the_best("nm/2:4/int8:128", DECODE, "x_cublas")),
    Line("2:4 fp8, up to 16 tokens: times cuBLAS bf16", 2.6,
         worst_of_the_best("nm/2:4/fp8:128", DECODE, "x_cublas")),
    Line("2:4 int4, up to 16 tokens: times cuBLAS bf16", 3.8,
         worst_of_the_best("nm/2:4/int4:128", DECODE, "x_cublas")),
    Line("unstructured 50 %, 1 token: times cuBLAS bf16", 1.3,
         worst_of_the_best("bitmask/0.5", (1,), "x_cublas")),
    Line("unstructured 70 %, 1 token: times cuBLAS bf16", 2.0,
         worst_of_the_best("bitmask/0.7", (1,), "x_cublas")),
    Line("2:4 prefill with plentiful memory, slowest size: times cuBLAS bf16", 0.98,
         lambda sections: min(_prefill(sections), default=None)),
    Line("2:4 prefill with plentiful memory, fastest size: times cuBLAS bf16", 1.2,
         lambda sections: max(_prefill(sections), default=None)),
    Line("decode loop 2:4 bf16, batch 1: times dense", 1.4, _loop("nm/2:4")),
    Line("decode loop 2:4 int8, batch 1: times dense", 2.3, _loop("nm/2:4/int8:128")),
)  # fmt: skip


def judge(sections: Sections) -> list[dict[str, Any]]:
    """Every line."""
    return [line.judge(sections) for line in LINES]
