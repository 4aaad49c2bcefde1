"""The weights of a packed checkpoint as the panels that `ai.gblm::Linear` multiplies with.

ONNX Runtime's operators cannot prepare weights at load, so the layout in memory is what is stored.
Panels name their version; see docs/onnx.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gblm.checkpoint.packed_folder import PackedReader
from gblm.errors import CheckpointError, InputError
from gblm.formats import Format, Shape, format_for, join_formats
from gblm.kernels import BACKENDS
from gblm.patterns import Dense
from gblm.weights import SparseWeight

CPU_BACKEND = "cpu"


@dataclass(frozen=True)
class Panels:
    """One weight in the kernels' layout.

    Attributes:
        shape: [out, in].
        data: [bytes] uint8.
        spec: of the format it was made from.
    """

    shape: Shape
    data: Tensor
    spec: str


def packed_panels(reader: PackedReader, linears: Sequence[str]) -> tuple[Panels, Tensor]:
    """The joined weights of packed linears.

    Args:
        reader: of the checkpoint.
        linears: names, in the order of their rows.

    Returns:
        Panels, and the dense weight [out, in] float32 that they stand for.

    Raises:
        InputError: floating values are not exact in bfloat16, or the kernels cannot take the
            shape.
        CheckpointError: the linears cannot be one.
    """
    found = [reader.linears.get(name) for name in linears]
    packed = [linear for linear in found if linear is not None]
    fmt = join_formats(linear.fmt for linear in packed)
    if fmt is None or len(packed) < len(linears):
        raise CheckpointError(
            f"{reader.folder}: {', '.join(linears)} are one linear in the graph; pack them in one "
            "format."
        )
    pieces = []
    for linear in packed:
        parts = reader.parts(linear.name)
        linear.fmt.validate(linear.name, parts, linear.shape)
        if fmt.values.is_float:
            parts["values"] = exact_bfloat16(linear.name, parts["values"])
        pieces.append(parts)
    shape = (sum(linear.shape[0] for linear in packed), packed[0].shape[1])
    joined = fmt.join(pieces)
    return _prepare(linears[0], fmt, joined, shape), fmt.expand(joined, torch.float32).float()


def dense_panels(name: str, weight: Tensor) -> Panels:
    """A weight that is not packed, every position kept.

    Args:
        name: for messages.
        weight: [out, in], exact in bfloat16.
    """
    exact = exact_bfloat16(name, weight)
    fmt = format_for(Dense())
    parts = fmt.pack(name, SparseWeight.cut(exact, torch.ones_like(exact, dtype=torch.bool)))
    return _prepare(name, fmt, parts, (weight.shape[0], weight.shape[1]))


def is_bfloat16(weight: Tensor) -> bool:
    """Whether every value is exact in bfloat16."""
    return bool((weight == weight.to(torch.bfloat16)).all())


def exact_bfloat16(name: str, values: Tensor) -> Tensor:
    """Floating values as bfloat16, if that loses nothing.

    Raises:
        InputError: it would.
    """
    if not is_bfloat16(values):
        raise InputError(
            f"{name}: the values are {values.dtype} and not exact in bfloat16, which the operator "
            "stores. Prune the bfloat16 model, or export without --sparse."
        )
    return values.to(torch.bfloat16)


def _prepare(name: str, fmt: Format, parts: dict[str, Tensor], shape: Shape) -> Panels:
    backend = BACKENDS[CPU_BACKEND]
    if reason := backend.refuses(fmt, shape, torch.bfloat16, torch.device("cpu")):
        raise InputError(f"{name}: the operator cannot take this weight: {reason}.")
    return Panels(shape, backend.prepare(fmt, parts, shape)[0], fmt.spec)
