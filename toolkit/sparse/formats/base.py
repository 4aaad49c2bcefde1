"""Format: how one sparse weight lies on disk. Portable, lossless, ignorant of kernels and models.

Local names in, local names out: a format packs one linear into a few named tensors ("parts") and
gives back exactly the same SparseWeight. docs/format.md is the normative text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gblm.errors import CheckpointError, PatternError
from gblm.sparse.formats.bits import expand_bits, unpack_bits
from gblm.sparse.passes import all_finite, places, row_blocks
from gblm.sparse.patterns import Pattern, Scope, Unstructured
from gblm.sparse.values import AUTO, FLOAT, SCALE_DTYPE, ValueType
from gblm.sparse.weights import SparseWeight, dequantize

Parts = Mapping[str, Tensor]
Headers = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Shape = tuple[int, int]
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TensorSpec(NamedTuple):
    """Shape and dtype of a part; −1 is a length that only the data knows (the number kept)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def fits(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Tell whether a tensor of this shape and dtype is what the spec asks for."""
        same_rank = len(shape) == len(self.shape)
        return (
            dtype == self.dtype
            and same_rank
            and all(want in (-1, have) for want, have in zip(self.shape, shape, strict=True))
        )


class Format(ABC):
    """A Format is the on-disk layout for weights of one pattern and value type.

    Attributes:
        pattern: which positions may be kept.
        values: how kept values are stored.
        parts: local names of the tensors, in order; codes add `scales`.
        spec: identifies all of it, such as "nm/2:4" or "nm/2:4/int8:128"; see `from_spec`.
    """

    name: ClassVar[str]
    own_parts: ClassVar[tuple[str, ...]]
    bits: ClassVar[tuple[int, ...]] = (16, 8, 4)
    """Of the values that it stores; kernels know those of 16, 8 and 4."""

    def __init__(self, pattern: Pattern, values: ValueType = FLOAT) -> None:
        if values.bits not in self.bits:
            raise PatternError(f"values {values} are for dense linears, not for pattern {pattern}.")
        if not values.is_float and values.group_size == AUTO:
            raise PatternError(f"values {values}: resolve the group size before packing.")
        self.pattern = pattern
        self.values = values
        self.parts = (*self.own_parts, *(() if values.is_float else ("scales",)))
        # A plain string, made once, so that torch.compile sees a constant.
        self.spec = f"{self.name}/{pattern}" + ("" if values.is_float else f"/{values}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    @classmethod
    @abstractmethod
    def holds(cls, pattern: Pattern) -> bool:
        """Say whether it stores weights of this pattern."""

    def layout(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        """Describe every part of a weight [out, in] by local name, without any data.

        Args:
            shape: [out, in].
            dtype: of floating values; codes and scales have their own.
        """
        stored = dtype if self.values.is_float else self.values.code_dtype
        specs = {"values": TensorSpec(self.values_shape(shape), stored)} | self.mask_layout(shape)
        if not self.values.is_float:
            groups = (shape[0], shape[1] // self.values.group(shape[1]))
            specs["scales"] = TensorSpec(groups, SCALE_DTYPE)
        return specs

    @abstractmethod
    def values_shape(self, shape: Shape) -> tuple[int, ...]:
        """Give the shape of the part `values` of a weight [out, in]; 4-bit codes count as bytes."""

    @abstractmethod
    def mask_layout(self, shape: Shape) -> dict[str, TensorSpec]:
        """Describe the parts of a weight [out, in] that say which positions are kept."""

    def most_bytes(self, shape: Shape, dtype: torch.dtype, scope: Scope) -> int:
        """Bound the bytes of all parts of a packed weight; see `is_exact`.

        Args:
            shape: [out, in].
            dtype: of floating values.
            scope: whether an unstructured sparsity counts zeros by row or over the matrix.
        """
        rows, columns = shape if scope == "row" else (1, prod(shape))
        kept = rows * (columns - int(columns * self.pattern.sparsity))
        if self.values.in_nibbles:
            # A row of 4-bit codes begins at a byte, so that each may waste half a byte.
            rows = shape[0]
            kept = rows * -(-(kept // rows) // 2) if scope == "row" else (kept + rows) // 2
        return sum(
            prod(kept if side == -1 else side for side in spec.shape) * spec.dtype.itemsize
            for spec in self.layout(shape, dtype).values()
        )

    def is_exact(self, scope: Scope) -> bool:
        """Tell whether `most_bytes` is exact: not for 4-bit rows that keep different counts."""
        loose = isinstance(self.pattern, Unstructured) and scope == "matrix"
        return not (loose and self.values.in_nibbles)

    def shape_of(self, name: str, headers: Headers) -> Shape:
        """Tell [out, in] of the weight from the headers of all its parts.

        Raises:
            CheckpointError: no weight has such a bitmask.
        """
        shape = headers["bitmask"][0]
        if len(shape) != 2 or min(shape) < 1:
            raise CheckpointError(f"{name}.bitmask: shape {list(shape)} is impossible.")
        return shape[0], 8 * shape[1]

    def pack(self, name: str, weight: SparseWeight) -> dict[str, Tensor]:
        """Store without loss; −0.0 becomes +0.0. Never prunes, never rounds.

        Raises:
            PatternError: the mask breaks the pattern, the shape cannot be stored, or the weight's
                codes and scales are not those of the value type.
        """
        self.check_shape(name, (weight.mask.shape[0], weight.mask.shape[1]))
        self._check_weight(name, weight)
        self.pattern.check_mask(name, weight.mask)
        return self.join([self._pack(weight, rows) for rows in row_blocks(weight.mask.shape)])

    def _pack(self, weight: SparseWeight, rows: slice) -> Parts:
        values = weight.weight if weight.codes is None else weight.codes
        mask = self.stored_mask(weight.mask[rows])
        # Adding zero makes +0.0 of −0.0.
        kept = self.take(values[rows], mask) + 0
        scales = {} if weight.scales is None else {"scales": weight.scales[rows]}
        return {"values": self.store(kept, mask), **self.mask_parts(mask), **scales}

    def stored_mask(self, mask: Tensor) -> Tensor:
        """Give the mask that is written for a checked one [rows, in]; it may keep more zeros."""
        return mask

    def take(self, values: Tensor, mask: Tensor) -> Tensor:
        """Give the values or codes [rows, in] that the mask keeps, in row order."""
        return values.reshape(-1).index_select(0, places(mask))

    @abstractmethod
    def store(self, kept: Tensor, mask: Tensor) -> Tensor:
        """Make the part `values` from the kept values or codes in row order and the mask."""

    @abstractmethod
    def kept(self, parts: Parts) -> Tensor:
        """Undo `store`: give values in their dtype, or codes, in row order."""

    @abstractmethod
    def mask_parts(self, mask: Tensor) -> dict[str, Tensor]:
        """Make the parts of `mask_layout`."""

    def mask(self, parts: Parts) -> Tensor:
        """Give the mask: [out, in] bool, True = kept."""
        return unpack_bits(parts["bitmask"])

    def unpack(self, parts: Parts, dtype: torch.dtype = torch.bfloat16) -> SparseWeight:
        """Undo `pack` exactly, on the device of the parts, which are trusted: see `validate`.

        Args:
            parts: by local name.
            dtype: of what codes stand for; floating values keep their own.
        """
        if self.values.is_float:
            return SparseWeight(self.expand(parts), self.mask(parts))
        return SparseWeight.from_codes(
            self.scatter(parts), parts["scales"], self.mask(parts), dtype
        )

    def expand(self, parts: Parts, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Make the dense weight [out, in] alone, as fast as PyTorch can; `dtype` as in `unpack`."""
        dense = self.scatter(parts)
        return dense if self.values.is_float else dequantize(dense, parts["scales"], dtype)

    def scatter(self, parts: Parts) -> Tensor:
        """Put values in their dtype, or codes, at their places: [out, in], zero elsewhere."""
        return expand_bits(self.kept(parts), parts["bitmask"])

    def widened(self) -> Format:
        """Give the format in which kernels read such a weight."""
        return self

    def widen(self, parts: Parts) -> Parts:
        """Turn checked parts into those of `widened()`."""
        return parts

    def rows(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """Cut out the parts of the rows start ≤ row < stop, as views where possible."""
        return {name: parts[name][start:stop] for name in self.parts}

    def join(self, pieces: Sequence[Parts]) -> dict[str, Tensor]:
        """Join the parts of weights row after row; this undoes `rows`."""
        return {name: torch.cat([parts[name] for parts in pieces]) for name in self.parts}

    def check_data(self, name: str, parts: Parts, shape: Shape) -> None:
        """Raise CheckpointError when masks and counts do not agree, or numbers are none.

        The layout has been checked.
        """
        self.check_mask_data(name, parts, shape)
        if self.values.is_float:
            if not all_finite(parts["values"]):
                raise CheckpointError(f"{name}.values: holds NaN or Inf. The file is damaged.")
            return
        _check_scales(name, parts["scales"])
        self._check_padding(name, parts)

    def _check_padding(self, name: str, parts: Parts) -> None:
        """Refuse nibbles that fill up a row and are not zero; every other one is a code."""
        if self.values.in_nibbles and bool((self.padding(parts) != 0).any()):
            raise CheckpointError(
                f"{name}.values: the last nibble of a row with an odd number of codes is not 0. "
                "The file is damaged."
            )

    @abstractmethod
    def check_mask_data(self, name: str, parts: Parts, shape: Shape) -> None:
        """Raise CheckpointError when masks, counts and offsets do not agree."""

    @abstractmethod
    def padding(self, parts: Parts) -> Tensor:
        """Give the nibbles of 4-bit `values` that belong to no code, [any number]."""

    def check_shape(self, name: str, shape: Shape) -> None:
        """Raise PatternError when a weight of this shape [out, in] cannot be stored."""
        self.pattern.check_shape(name, shape)
        self.values.check_columns(name, shape[1])
        if shape[1] % 8:
            raise PatternError(
                f"{name}: {shape[1]} columns are not a multiple of 8, which the format needs. "
                "Leave it dense with --ignore."
            )

    def check_layout(self, name: str, found: Headers, shape: Shape) -> None:
        """Compare the parts' shapes and dtypes with what a weight of this shape must have.

        Needs headers only, so that a false claim is refused before anything is allocated.

        Args:
            name: of the linear, for the message.
            found: shape and dtype by local name.
            shape: [out, in] of the weight.
        """
        dtype = found["values"][1] if "values" in found else None
        if self.values.is_float and dtype not in VALUE_DTYPES:
            raise CheckpointError(f"{name}: values have dtype {dtype}; floating point is needed.")
        for part, want in self.layout(shape, dtype or torch.bfloat16).items():
            if part not in found:
                raise CheckpointError(
                    f"{name}: the part {part!r} of format {self.spec} is missing."
                )
            if not want.fits(*found[part]):
                raise CheckpointError(
                    f"{name}.{part}: is {list(found[part][0])} {found[part][1]}, but a weight of "
                    f"{list(shape)} in format {self.spec} needs {list(want.shape)} {want.dtype}."
                )

    def validate(self, name: str, parts: Parts, shape: Shape) -> None:
        """Check parts that come from a file: the layout first, then the data itself."""
        headers = {part: (tuple(t.shape), t.dtype) for part, t in parts.items()}
        self.check_layout(name, headers, shape)
        self.check_data(name, parts, shape)

    def cast(self, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast checked floating values to the dtype of the activations.

        Raises:
            CheckpointError: one leaves the range of the dtype.
        """
        cast = values.to(dtype)
        if dtype != values.dtype and not all_finite(cast):
            raise CheckpointError(
                f"{name}.values: some of {values.dtype} leave the range of {dtype}; load the model "
                "in the checkpoint's own dtype."
            )
        return cast

    def _check_weight(self, name: str, weight: SparseWeight) -> None:
        """Refuse codes and scales that the value type does not have, lacks, or cannot hold."""
        if self.values.is_float:
            if weight.codes is not None:
                raise PatternError(f"{name}: format {self.spec} would lose the weight's codes.")
            return
        if weight.codes is None or weight.scales is None:
            raise PatternError(
                f"{name}: format {self.spec} stores codes, but the weight has none. `quantize` it."
            )
        want = self.layout((weight.mask.shape[0], weight.mask.shape[1]))["scales"]
        if not want.fits(tuple(weight.scales.shape), weight.scales.dtype):
            raise PatternError(
                f"{name}: scales are {list(weight.scales.shape)} {weight.scales.dtype}; format "
                f"{self.spec} needs {list(want.shape)} {want.dtype}."
            )
        low, high = map(int, weight.codes.aminmax())
        if low < self.values.least or high > self.values.limit:
            raise PatternError(
                f"{name}: codes {low} to {high} do not fit {self.values.kind}, which has "
                f"{self.values.least} to {self.values.limit}."
            )


def _check_scales(name: str, scales: Tensor) -> None:
    """Raise CheckpointError when scales from a file are none."""
    wrong = (~(scales.isfinite() & (scales > 0))).nonzero()
    if len(wrong):
        row, group = (int(i) for i in wrong[0])
        raise CheckpointError(
            f"{name}.scales: row {row}, group {group} is {scales[row, group].item()}; scales are "
            "finite and greater than 0. The file is damaged."
        )
