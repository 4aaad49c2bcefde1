"""Every backend against float64, with outputs that are NaN before; eagerly and in a CUDA graph.

The error is that of the result to the float64 product rounded to the result's dtype, so that
rounding once is no error. Products of codes may be of the codes, or of the weight rounded
to the activations' dtype: backends do either, and the nearer one counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gblm.formats import Format, Shape, from_spec
from gblm.gpu_check.place import Place
from gblm.gpu_check.section import Section
from gblm.gpu_check.weights import CUBLAS, serving
from gblm.kernels import Backend
from gblm.values import quantize
from gblm.weights import SparseWeight

SPECS = (
    "nm/2:4", "bitmask/0.5", "nm/2:4/int8:128", "nm/2:4/int4:128", "nm/2:4/uint4:128",
    "bitmask/0.7", "nm/2:4/int8:row", "nm/2:4/int4:32", "nm/4:8", "bitmask/0.5/int8:128",
    "nm/2:4/fp8:128", "nm/2:4/fp8:row", "bitmask/0.5/fp8:128",
    "dense/dense", "dense/dense/int8:128", "dense/dense/int4:128",
)  # fmt: skip
# The first fills no tile in rows nor columns.
SHAPES: tuple[Shape, ...] = ((200, 1152), (512, 4096))
DTYPES = (torch.bfloat16, torch.float16)
TOKENS = (1, 7, 16, 17, 64, 65, 200)
IN_GRAPHS = (1, 17, 65)


@dataclass(frozen=True)
class Cases:
    """What is compared, most important first."""

    specs: Sequence[str] = SPECS
    shapes: Sequence[Shape] = SHAPES
    dtypes: Sequence[torch.dtype] = DTYPES
    tokens: Sequence[int] = TOKENS
    in_graphs: Sequence[int] = IN_GRAPHS


def check_products(place: Place, section: Section, cases: Cases | None = None) -> None:
    """A row per dtype, shape, format and backend: {"error", "at", "replays"}.

    Args:
        place: where.
        section: takes the rows; "at" is the number of tokens of the largest error, "replays"
            whether graphs gave the same. The backend "cublas bf16" is PyTorch's own product.
        cases: what to compare.
    """
    wanted = cases or Cases()
    for dtype in wanted.dtypes:
        for shape in wanted.shapes:
            for spec in wanted.specs:
                fmt = from_spec(spec)
                what = f"{spec} {shape[0]}x{shape[1]} {_name(dtype)}"
                weight = section.attempt(what, partial(_draw, place, fmt, shape, dtype))
                if weight is None:
                    continue
                names = [*serving(place, spec, shape, dtype), CUBLAS]
                for name in names if spec == "nm/2:4" else names[:-1]:
                    work = partial(_check, place, name, fmt, weight, dtype, wanted)
                    row = section.attempt(f"{name} {what}", work)
                    if row is not None:
                        section.rows.append(row)


def _draw(place: Place, fmt: Format, shape: Shape, dtype: torch.dtype) -> SparseWeight:
    drawn = place.normal(*shape)
    drawn[3] = 0
    mask = fmt.pattern.keep(drawn.abs(), "row")
    if fmt.values.is_float:
        return SparseWeight.cut(drawn.to(dtype), mask)
    return quantize(drawn.to(dtype), mask, fmt.values)


def _check(
    place: Place, name: str, fmt: Format, weight: SparseWeight, dtype: torch.dtype, cases: Cases
) -> dict[str, Any]:
    shape = (weight.mask.shape[0], weight.mask.shape[1])
    backend = place.backends.get(name)
    if backend is None:
        prepared = [weight.weight]
    else:
        prepared = backend.prepare(fmt, fmt.pack("w", weight), shape, dtype)
    errors, replays = {}, True
    for tokens in cases.tokens:
        x = place.normal(tokens, shape[1], dtype=dtype, seed=tokens)
        call = partial(_product, backend, x, prepared, fmt, shape)
        with poisoned():
            got = call()
        errors[tokens] = error_of(got, x, weight)
        if tokens in cases.in_graphs:
            replays &= torch.equal(place.replayed(call), call())
    at = max(errors, key=lambda tokens: errors[tokens])
    return {
        "backend": name, "spec": fmt.spec, "shape": list(shape), "dtype": _name(dtype),
        "cases": len(errors), "error": errors[at], "at": at, "replays": replays,
    }  # fmt: skip


def _product(
    backend: Backend | None, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape
) -> Tensor:
    if backend is None:
        return functional.linear(x, prepared[0])
    return backend.linear(x, prepared, fmt, shape)


def error_of(got: Tensor, x: Tensor, weight: SparseWeight) -> float:
    """Relative error in the Frobenius norm; a very large number when it is not finite.

    Args:
        got: [tokens, out].
        x: [tokens, in].
        weight: what was multiplied with.
    """
    errors = []
    for exact in _exact(weight):
        want = (x.double() @ exact.t()).to(got.dtype).double()
        errors.append(float((got.double() - want).norm() / want.norm()))
    # NaN is smaller than nothing and larger than nothing.
    finite = [error for error in errors if error == error]
    return min(finite) if finite and bool(got.isfinite().all()) else 1e30


def _exact(weight: SparseWeight) -> Iterator[Tensor]:
    """What a backend may multiply with, in float64."""
    yield weight.weight.double()
    if weight.codes is not None and weight.scales is not None:
        groups = weight.codes.double().reshape(len(weight.codes), weight.scales.shape[1], -1)
        yield (groups * weight.scales.double().unsqueeze(-1)).reshape(weight.codes.shape)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is NaN, so that what a kernel leaves out is seen."""
    before = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        # That some algorithms are not deterministic, which is not what this is for.
        warnings.simplefilter("ignore", UserWarning)
        torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
