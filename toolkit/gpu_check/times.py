"""Times at LLaMA's shapes, from weights out of the caches, beside cuBLAS in bf16 and fp8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gblm.formats import Shape
from gblm.gpu_check.place import PLENTIFUL, Place
from gblm.gpu_check.section import Section
from gblm.gpu_check.weights import (
    CUBLAS,
    FP8,
    SHAPES,
    SPECS,
    Contender,
    as_fp8,
    cublas,
    cublas_fp8,
    packed,
    serving,
)
from gblm.kernels.cuda.sparse_tensor_core import MAX_TOKENS

TOKENS = (1, 16, 4096, 8, 256, 64, 1024, 4, 32, 2)


def measure_times(
    place: Place,
    section: Section,
    read_limit: float | None,
    shapes: Mapping[str, Shape] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    specs: Sequence[str] = SPECS,
) -> None:
    """A row per shape, number of tokens and contender, see `_row`.

    Args:
        place: where.
        section: takes the rows.
        read_limit: bytes per second; None if it is not known.
        shapes: [out, in] by name, most important first.
        tokens: numbers of tokens, most important first.
        specs: of formats.
    """
    for label, shape in shapes.items():
        baseline: dict[int, float] = {}
        for name, make in _contenders(place, shape, specs).items():
            what = f"{label}, {name}"
            made = section.attempt(what, make)
            if made is None:
                continue
            for row in _times_of(place, section, made, shape, tokens, what):
                if made.name == CUBLAS:
                    baseline[row["tokens"]] = row["us"]
                base = baseline.get(row["tokens"])
                row["x_cublas"] = base and base / row["us"]
                row["share_of_read"] = _share(made, row["us"], read_limit)
                section.rows.append({"label": label, **row})
            del made
            place.release()


def _times_of(
    place: Place,
    section: Section,
    made: Contender,
    shape: Shape,
    tokens: Sequence[int],
    what: str,
) -> list[dict[str, Any]]:
    """A row per number of tokens; a second layout is read only for many."""
    if made.name == PLENTIFUL:
        tokens = [number for number in tokens if number > MAX_TOKENS]
    rows = [
        section.attempt(f"{what}, {number} tokens", partial(_time, place, made, shape, number))
        for number in tokens
    ]
    return [row for row in rows if row is not None]


def _share(made: Contender, microseconds: float, limit: float | None) -> float | None:
    """Of the read bandwidth; of two layouts a call reads one, and which is not known here."""
    if limit is None or made.name == PLENTIFUL:
        return None
    return 1e6 * made.size / microseconds / limit


def _contenders(
    place: Place, shape: Shape, specs: Sequence[str]
) -> dict[str, Callable[[], Contender]]:
    """What is measured for a shape, by name, to be built one after the other."""
    found: dict[str, Callable[[], Contender]] = {
        CUBLAS: partial(cublas, place, shape),
        FP8: partial(cublas_fp8, place, shape),
    }
    for spec in specs:
        for name in serving(place, spec, shape):
            found[f"{name} {spec}"] = partial(packed, place, name, spec, shape)
    return found


def _time(place: Place, made: Contender, shape: Shape, tokens: int) -> dict[str, Any]:
    x = place.normal(tokens, shape[1], dtype=torch.bfloat16)
    x = as_fp8(x) if made.name == FP8 else x
    calls = [partial(_call, call, x) for call in made.copies]
    timing = place.time(calls)
    return {
        "shape": list(shape), "tokens": tokens, "contender": made.name, "spec": made.spec,
        "us": 1e6 * timing.seconds, "us_low": 1e6 * timing.low, "us_high": 1e6 * timing.high,
        "captured": timing.captured, "bytes": made.size,
    }  # fmt: skip


def _call(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return call(x)
