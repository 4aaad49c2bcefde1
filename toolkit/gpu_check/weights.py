"""The linears of the check: LLaMA's shapes, and one weight after another in enough copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from gblm.bench.linears import num_copies, sparse_weight
from gblm.formats import Format, Shape, from_spec
from gblm.gpu_check.place import Place
from gblm.kernels import Backend

# [out, in] of the fused linears of one decoder layer, in the order in which they are measured.
SHAPES: dict[str, Shape] = {
    "7b gate_up": (22016, 4096),
    "7b down": (4096, 11008),
    "70b gate_up": (57344, 8192),
    "7b qkv": (12288, 4096),
    "7b o": (4096, 4096),
    "8b gate_up": (28672, 4096),
    "8b down": (4096, 14336),
    "8b qkv": (6144, 4096),
    "70b down": (8192, 28672),
    "70b qkv": (10240, 8192),
    "70b o": (8192, 8192),
}
SPECS = (
    "nm/2:4", "bitmask/0.5", "nm/2:4/int8:128", "nm/2:4/int4:128", "bitmask/0.7",
    "nm/2:4/fp8:128",
)  # fmt: skip
CUBLAS, FP8 = "cublas bf16", "cublas fp8"
FP8_RANGE = 448.0


@dataclass(frozen=True)
class Contender:
    """One way to multiply by one weight.

    Attributes:
        name: of the backend, or of what it is compared with.
        spec: of the format; "" for what gblm does not store.
        size: bytes of one copy in memory.
        copies: calls that take x [tokens, in], each with a copy of the weight.
    """

    name: str
    spec: str
    size: int
    copies: Sequence[Callable[[Tensor], Tensor]]


def serving(
    place: Place, spec: str, shape: Shape, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Backend]:
    """The backends of a place that take such a weight, in their order."""
    fmt = from_spec(spec)
    return {
        name: backend
        for name, backend in place.backends.items()
        if backend.refuses(fmt, shape, dtype, place.device) is None
    }


def packed(place: Place, name: str, spec: str, shape: Shape, copies: int = 0) -> Contender:
    """A weight on one of gblm's backends.

    Args:
        place: whose backend.
        name: of the backend.
        spec: of the format.
        shape: [out, in].
        copies: how many; as many as the caches do not hold if 0.
    """
    fmt, backend = from_spec(spec), place.backends[name]
    parts = fmt.pack("weight", sparse_weight(fmt, place.normal(*shape)))
    prepared = backend.prepare(fmt, parts, shape, torch.bfloat16)
    del parts
    size = sum(tensor.nbytes for tensor in prepared)
    number = copies or num_copies(size, place.cold_bytes)
    every = [prepared, *([t.clone() for t in prepared] for _ in range(number - 1))]
    calls = [partial(_linear, backend, one, fmt, shape) for one in every]
    return Contender(name, spec, size, calls)


def _linear(
    backend: Backend, prepared: Sequence[Tensor], fmt: Format, shape: Shape, x: Tensor
) -> Tensor:
    return backend.linear(x, prepared, fmt, shape)


def cublas(place: Place, shape: Shape, copies: int = 0) -> Contender:
    """The dense weight in PyTorch."""
    weight = place.normal(*shape, dtype=torch.bfloat16)
    number = copies or num_copies(weight.nbytes, place.cold_bytes)
    every = [weight, *(weight.clone() for _ in range(number - 1))]
    calls = [partial(functional.linear, weight=one) for one in every]
    return Contender(CUBLAS, "", weight.nbytes, calls)


def cublas_fp8(place: Place, shape: Shape) -> Contender:
    """The dense weight and the activations in float8_e4m3fn, one scale each, in PyTorch.

    What it takes to round the activations is not part of the call.
    """
    weight = as_fp8(place.normal(*shape))
    number = num_copies(weight.nbytes, place.cold_bytes)
    every = [weight, *(weight.clone() for _ in range(number - 1))]
    one = torch.ones((), device=place.device)
    calls = [partial(_scaled, weight=copy, scale=one) for copy in every]
    return Contender(FP8, "", weight.nbytes, calls)


def as_fp8(x: Tensor) -> Tensor:
    """Rounded, without a scale."""
    return x.clamp(-FP8_RANGE, FP8_RANGE).to(torch.float8_e4m3fn)


def _scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return torch._scaled_mm(
        x, weight.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
