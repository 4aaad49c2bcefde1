"""What a budget is spent on: the linears of a model, what each may become, and its size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import nn

from gblm.checkpoint.head import Head
from gblm.checkpoint.reader import Reader
from gblm.choices import FUSED, Choice
from gblm.formats import Shape
from gblm.plan.shapes import packed_bytes

Allocation = dict[str, Choice]


@dataclass(frozen=True)
class Linear:
    """One linear to prune.

    Attributes:
        name: in full.
        shape: [out, in].
        dtype: of the checkpoint's weight.
        layer: index of its decoder layer.
        unit: equal for linears that servers multiply as one.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    layer: int
    unit: str

    @property
    def weights(self) -> int:
        """How many."""
        return prod(self.shape)

    def num_bytes(self, choice: Choice) -> int:
        """The most that it takes when it is packed, masks and scales included."""
        return most_bytes(choice, self.shape, self.dtype)


@dataclass(frozen=True)
class Spending:
    """A budget in the currency of what is allocated.

    Attributes:
        cost: of one linear that becomes something.
        limit: of the costs of all linears together.
    """

    cost: Callable[[Linear, Choice], float]
    limit: float

    def total(self, linears: Iterable[Linear], allocation: Mapping[str, Choice]) -> float:
        """Of all linears."""
        return sum(self.cost(linear, allocation[linear.name]) for linear in linears)

    def holds(self, linears: Iterable[Linear], allocation: Mapping[str, Choice]) -> bool:
        """Whether an allocation stays within the limit."""
        return self.total(linears, allocation) <= self.limit


def linears_of(
    reader: Reader, prefix: str, prunable: Mapping[str, nn.Linear]
) -> tuple[Linear, ...]:
    """The linears to prune, in order.

    Args:
        reader: of the checkpoint.
        prefix: of the decoder layers' names, such as "model.layers".
        prunable: by full name.
    """
    parts = {part: group[0] for group in FUSED for part in group}
    found = []
    for name, linear in prunable.items():
        parent, _, last = name.rpartition(".")
        rows, columns = linear.weight.shape
        found.append(
            Linear(
                name=name,
                shape=(rows, columns),
                dtype=reader.headers[f"{name}.weight"][1],
                layer=int(name.removeprefix(f"{prefix}.").partition(".")[0]),
                unit=f"{parent}.{parts.get(last, last)}",
            )
        )
    return tuple(found)


def rest_bytes(reader: Reader, linears: Iterable[Linear], head: Head | None) -> int:
    """Bytes of all tensors of the packed folder besides the linears'."""
    pruned = sum(reader.num_bytes(f"{linear.name}.weight") for linear in linears)
    return sum(map(reader.num_bytes, reader)) - pruned + (head.added_bytes if head else 0)


@lru_cache(maxsize=1 << 14)
def most_bytes(choice: Choice, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of a packed weight [out, in] whose rows keep as many as they like.

    A row of 4-bit codes begins at a byte, so each row may waste half a byte.
    """
    fmt = choice.fmt
    size = packed_bytes(fmt, shape, dtype)
    if fmt.name != "bitmask" or not fmt.values.in_nibbles:
        return size
    kept = prod(shape) - int(prod(shape) * fmt.pattern.sparsity)
    even = shape[0] * -(-kept // (2 * shape[0]))
    return size - even + (kept + shape[0]) // 2
