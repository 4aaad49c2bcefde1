"""Format: how one sparse weight lies on disk. Portable, lossless, ignorant of kernels and models.

Local names in, local names out: a format packs one linear into a few named tensors ("parts") and
gives back exactly the same SparseWeight. docs/format.md is the normative text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gblm.errors import CheckpointError, PatternError
from gblm.formats.bits import expand_bits, unpack_bits
from gblm.patterns import Pattern
from gblm.weights import SparseWeight

Parts = Mapping[str, Tensor]
Shape = tuple[int, int]
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TensorSpec(NamedTuple):
    """Shape and dtype of a part; −1 is a length that only the data knows (the number kept)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def fits(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a tensor of this shape and dtype is what the spec asks for."""
        same_rank = len(shape) == len(self.shape)
        return (
            dtype == self.dtype
            and same_rank
            and all(want in (-1, have) for want, have in zip(self.shape, shape, strict=True))
        )


class Format(ABC):
    """One on-disk layout for weights of one pattern."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        # Identifies format and pattern, such as "nm/2:4"; see `from_spec`. A plain string, made
        # once, so that torch.compile sees a constant.
        self.spec = f"{self.name}/{pattern}"

    @abstractmethod
    def layout(self, shape: Shape, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Every part of a weight [out, in] of this dtype by local name; needs no data."""

    def shape_of(self, bitmask: tuple[int, ...]) -> Shape:
        """[out, in] of the weight, from the shape of its bitmask."""
        return bitmask[0], 8 * bitmask[1]

    @abstractmethod
    def pack(self, name: str, weight: SparseWeight) -> dict[str, Tensor]:
        """Store without loss; −0.0 becomes +0.0. Never prunes.

        Raises:
            PatternError: the mask breaks the pattern, or the shape cannot be stored.
        """

    def unpack(self, parts: Parts) -> SparseWeight:
        """The exact inverse of `pack`, on the device of the parts. Trusts them: see `validate`."""
        return SparseWeight(self.expand(parts), unpack_bits(parts["bitmask"]))

    def expand(self, parts: Parts) -> Tensor:
        """The dense weight [out, in] alone, as fast as plain PyTorch can."""
        return expand_bits(parts["values"], parts["bitmask"])

    @abstractmethod
    def rows(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """The parts of the rows start ≤ row < stop, as views where possible."""

    @abstractmethod
    def check_data(self, name: str, parts: Parts, shape: Shape) -> None:
        """Raise CheckpointError when masks, counts and offsets do not agree."""

    def check_shape(self, name: str, shape: Shape) -> None:
        """Raise PatternError when a weight of this shape [out, in] cannot be stored."""
        self.pattern.check_shape(name, shape)
        if shape[1] % 8:
            raise PatternError(
                f"{name}: {shape[1]} columns are not a multiple of 8, which the bitmask needs. "
                "Leave it dense with --ignore."
            )

    def check_layout(
        self, name: str, found: Mapping[str, tuple[tuple[int, ...], torch.dtype]], shape: Shape
    ) -> None:
        """Compare the parts' shapes and dtypes with what a weight of this shape must have.

        Needs headers only, so that a false claim is refused before anything is allocated.

        Args:
            name: of the linear, for the message.
            found: shape and dtype by local name.
            shape: [out, in] of the weight.
        """
        dtype = found["values"][1] if "values" in found else None
        if dtype not in VALUE_DTYPES:
            raise CheckpointError(f"{name}: values have dtype {dtype}; floating point is needed.")
        for part, want in self.layout(shape, dtype).items():
            if part not in found:
                raise CheckpointError(
                    f"{name}: the part {part!r} of format {self.name} is missing."
                )
            if not want.fits(*found[part]):
                raise CheckpointError(
                    f"{name}.{part}: is {list(found[part][0])} {found[part][1]}, but a weight of "
                    f"{list(shape)} in format {self.spec} needs {list(want.shape)} {want.dtype}."
                )

    def validate(self, name: str, parts: Parts, shape: Shape) -> None:
        """Check parts that come from a file: layout first, then the data itself."""
        headers = {part: (tuple(t.shape), t.dtype) for part, t in parts.items()}
        self.check_layout(name, headers, shape)
        self.check_data(name, parts, shape)
