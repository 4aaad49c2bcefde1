"""How compressed-tensors stores one weight: two bitmask layouts, marlin-24, and codes with scales.

Part names, shapes and bit order of the bitmasks are those of compressed-tensors 0.9.4, which wrote
them last: its `sparse-24-bitmask` differs from our `nm` of 2:4, and its `sparse-bitmask` from our
`bitmask`, in names, in a part `shape` and in the row offsets only. marlin-24 is a kernel's layout,
which the library could only write: every reordering is a permutation of the bits of row and column
numbers, so each is undone by one reshape and one permute. Knows no folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gblm.errors import CheckpointError, InputError
from gblm.model.reader import Header
from gblm.sparse.formats import VALUE_DTYPES, Headers
from gblm.sparse.values import FLOAT, GROUP_SIZES, ROW, SCALE_DTYPE, ValueType
from gblm.sparse.weights import SparseWeight

TWO_OF_FOUR, ANY_MASK = "sparse-24-bitmask", "sparse-bitmask"
PARTS: dict[str, tuple[str, ...]] = {
    TWO_OF_FOUR: ("shape", "compressed", "bitmask"),
    ANY_MASK: ("shape", "compressed", "bitmask", "row_offsets"),
}
MARLIN = "marlin-24"
# The codes of 16 inputs and 64 outputs in the order of their words: what their numbers are made of;
# and, per code size, the order of the same digits in an input-major matrix.
TILE = (4, 2, 4, 4, 2, 2, 2)
ORDER = {4: (0, 8, 4, 6, 1, 2, 3, 7, 5), 8: (0, 8, 4, 7, 1, 2, 3, 6, 5)}
INT8, FP8 = torch.int8, torch.float8_e4m3fn
# Weights that are expanded at once in float64.
CHUNK_WEIGHTS = 1 << 22
WAY_OUT = "so the weights would change; start from the dense model"
# What the products of fp8 codes and scales are rounded to, once.
ROUNDED = torch.bfloat16
ROUNDING = (
    "fp8 codes × scales are rounded once to bfloat16 (relative error at most 2^-8, that of fp8 "
    "itself is 2^-4)"
)


@dataclass(frozen=True)
class BitmaskTensor:
    """Describes a packed tensor by its headers and its part `shape`.

    Attributes:
        name: of the dense tensor, such as "model.layers.0.mlp.up_proj.weight".
        prefix: what the names of its parts begin with; versions before 0.9 kept the ".weight".
        layout: a name of PARTS.
        shape: of the dense tensor: one or two dimensions.
        dtype: of the values.
    """

    name: str
    prefix: str
    layout: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, prefix: str, layout: str, headers: Headers, shape: list[int]) -> BitmaskTensor:
        """Hold the headers of all parts against the shape.

        Args:
            prefix: what the parts' names begin with.
            layout: a name of PARTS.
            headers: shape and dtype by part.
            shape: the content of the part `shape`.

        Raises:
            CheckpointError: they do not belong to one tensor.
        """
        bits = layout == TWO_OF_FOUR
        if not 1 + bits <= len(shape) <= 2 or min(shape) < 1 or (bits and shape[1] % 4):
            raise CheckpointError(f"{prefix}.shape: {shape} is no shape of {layout}.")
        *rows, columns = shape
        want: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "bitmask": ((*rows, (columns + 7) // 8), torch.uint8),
        }
        found, dtype = headers["compressed"]
        if bits:
            want["compressed"] = ((*rows, columns // 2), dtype)
        else:
            want["row_offsets"] = (tuple(rows), torch.int64)
            fits = len(found) == 1 and found[0] <= math.prod(shape)
            want["compressed"] = (found if fits else (-1,), dtype)
        for part, header in want.items():
            if headers[part] != header:
                raise CheckpointError(
                    f"{prefix}.{part}: is {list(headers[part][0])} {headers[part][1]}, but a "
                    f"tensor of {shape} in {layout} needs {list(header[0])} {header[1]}."
                )
        weightless = prefix.rpartition(".")[2] not in ("weight", "bias")
        name = f"{prefix}.weight" if weightless else prefix
        return cls(name, prefix, layout, tuple(shape), dtype)

    @property
    def parts(self) -> tuple[str, ...]:
        """Name the parts that it is stored in."""
        return PARTS[self.layout]

    def mask(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Read the stored positions, [rows, columns] bool; one dimension is one row.

        Raises:
            CheckpointError: bits, counts and offsets do not agree.
        """
        columns = self.shape[-1]
        packed = parts["bitmask"].reshape(-1, (columns + 7) // 8).numpy()
        bits = np.unpackbits(packed, axis=1, bitorder="little").view(np.bool_)
        if bits[:, columns:].any():
            self._damaged("bitmask", f"has bits behind column {columns - 1}")
        mask = torch.from_numpy(bits[:, :columns])
        counts = mask.sum(dim=1, dtype=torch.int64)
        if self.layout == TWO_OF_FOUR:
            wrong = (mask.reshape(len(mask), -1, 4).sum(dim=-1) != 2).nonzero()
            if len(wrong):
                row, group = (int(i) for i in wrong[0])
                self._damaged("bitmask", f"does not keep two of row {row}, columns {4 * group}..")
            return mask
        offsets = parts["row_offsets"].reshape(-1)
        wrong = (offsets != counts.cumsum(0) - counts).nonzero()
        if len(wrong):
            self._damaged("row_offsets", f"do not count the bits before row {int(wrong[0])}")
        if (kept := int(counts.sum())) != len(parts["compressed"]):
            self._damaged("compressed", f"has {len(parts['compressed'])} values for {kept} bits")
        return mask

    def dense(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Put the values at their places, zeros elsewhere: [rows, columns], and the mask."""
        mask = self.mask(parts)
        dense, values = torch.zeros(mask.shape, dtype=self.dtype), parts["compressed"].reshape(-1)
        if self.dtype.itemsize == 1:  # torch does not index fp8 on CPU
            dense.view(torch.uint8)[mask] = values.view(torch.uint8)
        else:
            dense[mask] = values
        return dense, mask

    def _damaged(self, part: str, what: str) -> None:
        raise CheckpointError(f"{self.prefix}.{part}: {what}. The file is damaged.")


@dataclass(frozen=True)
class MarlinTensor:
    """Describes a packed weight by its headers.

    Attributes:
        name: of the dense weight.
        prefix: what the names of its parts begin with.
        shape: [out, in]; out a multiple of 64, in of 32.
        bits: of a code, 4 or 8.
        groups: scales per row.
    """

    name: str
    prefix: str
    shape: tuple[int, int]
    bits: int
    groups: int
    dtype: ClassVar[torch.dtype] = torch.int8
    parts: ClassVar[tuple[str, ...]] = ("weight_packed", "scale_packed", "meta")

    @classmethod
    def of(cls, prefix: str, headers: Headers) -> MarlinTensor:
        """Hold the headers of all parts against each other.

        Raises:
            CheckpointError: they do not belong to one weight.
        """
        (words, word), (scales, scale), (meta, bit) = (headers[part] for part in cls.parts)
        kinds = (word, scale, bit) == (torch.int32, torch.float16, torch.int16)
        if kinds and len(words) == len(scales) == len(meta) == 2:
            (blocks, width), (groups, rows) = words, scales
            bits = 2 * width // rows if rows else 0
            fits = width == rows * bits // 2 and meta == (blocks, 2 * rows)
            whole = rows % 64 == 0 and blocks > 0 and groups > 0 and 32 * blocks % groups == 0
            if bits in ORDER and fits and whole:
                return cls(f"{prefix}.weight", prefix, (rows, 32 * blocks), bits, groups)
        found = ", ".join(
            f"{part} {list(headers[part][0])} {headers[part][1]}" for part in cls.parts
        )
        raise CheckpointError(f"{prefix}: {found} are no parts of one weight in {MARLIN}.")

    def dense(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Put the int8 codes at their places, zero elsewhere; give them and the mask [out, in].

        Raises:
            CheckpointError: a group of four does not keep two.
        """
        rows, columns = self.shape
        places = self._places(parts["meta"]).reshape(rows, -1, 2)
        codes = self._codes(parts["weight_packed"]).reshape(rows, -1, 2)
        dense = torch.zeros(rows, columns // 4, 4, dtype=torch.int8)
        mask = torch.zeros(dense.shape, dtype=torch.bool)
        dense.scatter_(2, places, codes)
        mask.scatter_(2, places, True)
        return dense.reshape(self.shape), mask.reshape(self.shape)

    def scales(self, stored: Tensor) -> Tensor:
        """Turn the part `scale_packed` [groups, out] into [out, groups] float16."""
        rows = self.shape[0]
        # The library reorders the scales of groups that are shorter than a row of kept weights.
        if self.groups > 2:
            stored = stored.reshape(self.groups, rows // 8, 4, 2).transpose(2, 3)
        return stored.reshape(self.groups, rows).t()

    def _codes(self, words: Tensor) -> Tensor:
        """Read the kept codes of every row in column order, [out, in/2] int8."""
        rows, columns = self.shape
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        codes = (words.unsqueeze(-1) >> shifts) & (2**self.bits - 1)
        tiles = codes.reshape(columns // 32, rows // 64, *TILE)
        codes = tiles.permute(ORDER[self.bits]).reshape(columns // 2, rows).t()
        return torch.sub(codes, 2 ** (self.bits - 1)).to(torch.int8)

    def _places(self, meta: Tensor) -> Tensor:
        """Read which two of every four are kept, ascending, [out, in/4, 2] int64."""
        rows, columns = self.shape
        bits = meta.reshape(columns // 32, rows // 64, 2, 8, 2, 2, 2)
        words = bits.permute(1, 3, 6, 2, 4, 0, 5).reshape(rows, columns // 16, 1).to(torch.int64)
        pairs = (words >> torch.tensor([0, 4, 8, 12])) & 15
        places = torch.stack([pairs & 3, pairs >> 2], dim=-1).reshape(rows, columns // 4, 2)
        wrong = (places[..., 0] >= places[..., 1]).nonzero()
        if len(wrong):
            row, group = (int(i) for i in wrong[0])
            raise CheckpointError(
                f"{self.prefix}.meta: does not keep two of row {row}, columns {4 * group}... The "
                "file is damaged."
            )
        return places


@dataclass(frozen=True)
class DenseCodes:
    """Describes a weight whose codes are stored dense; the code of a pruned weight is zero.

    Attributes:
        name: of the dense weight, and of the codes.
        shape: [out, in].
        dtype: of the codes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def prefix(self) -> str:
        """What the part's name begins with."""
        return self.name.removesuffix(".weight")

    def dense(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Give the codes and which are not zero, [out, in] bool."""
        codes = parts["weight"]
        return codes, codes.float() != 0


@dataclass(frozen=True)
class Scaling:
    """Says how the scales of one weight lie.

    Attributes:
        name: of the dense weight.
        codes: dtype of the codes: INT8 or FP8.
        dtype: of the scales, and of what the old library unpacks to.
        groups: scales per row.
        columns: that share a scale.
        grouped: whether config.json says so, and not that it is the whole row.
        bits: of an integer code, 8 or 4.
    """

    name: str
    codes: torch.dtype
    dtype: torch.dtype
    groups: int
    columns: int
    grouped: bool = False
    bits: int = 8

    @classmethod
    def of(
        cls, name: str, shape: tuple[int, ...], codes: torch.dtype, header: Header,
        allowed: frozenset[str | int], bits: int = 8,
    ) -> Scaling:  # fmt: skip
        """Hold the header of the scales against the weight's.

        Args:
            name: of the dense weight.
            shape: of the dense weight.
            codes: dtype of the codes.
            header: of the scales.
            allowed: see LegacyConfig.scalings.
            bits: of an integer code.

        Raises:
            CheckpointError: they do not belong together, or not to config_groups.
        """
        found, dtype = header
        if len(shape) == 2 and codes in (INT8, FP8) and dtype in VALUE_DTYPES:
            rows, columns = shape
            if found in ((), (1,)) and "tensor" in allowed:
                return cls(name, codes, dtype, 1, columns)
            if len(found) == 2 and found[0] == rows and found[1] > 0 and columns % found[1] == 0:
                size = columns // found[1]
                if size in allowed or (size == columns and "channel" in allowed):
                    return cls(name, codes, dtype, found[1], size, size in allowed, bits)
        raise CheckpointError(
            f"{name}: scales of {list(found)} {dtype} and codes of {list(shape)} {codes} are not "
            "what config_groups says."
        )

    @property
    def values(self) -> ValueType:
        """Choose how we store codes: integers as they are, fp8 as the floats they stand for."""
        if self.codes == FP8:
            return FLOAT
        kind = "int4" if self.bits == 4 else "int8"
        if self.grouped and self.columns in GROUP_SIZES:
            return ValueType(kind, self.columns)
        if self.groups > 1:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise InputError(
                f"{self.name}: groups of {self.columns} columns cannot be stored; {sizes} can."
            )
        return ValueType(kind, ROW)

    @property
    def floating(self) -> torch.dtype:
        """Give the dtype of the floats that codes stand for; that of fp8 is ROUNDED."""
        return ROUNDED if self.codes == FP8 else self.dtype

    def scales(self, stored: Tensor, rows: int) -> Tensor:
        """Give the scales as [rows, groups]; refuse what is not finite and positive."""
        scales = stored.reshape(-1, self.groups).expand(rows, self.groups)
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise CheckpointError(f"{self.name}: a scale is not positive. The file is damaged.")
        return scales

    def weight(self, codes: Tensor, mask: Tensor, stored: Tensor) -> SparseWeight:
        """Make the weight in our value type: integer codes without loss, fp8 as `unpacked`.

        Args:
            codes: [out, in] of dtype `codes`.
            mask: [out, in] bool.
            stored: the scales as they are stored.

        Raises:
            InputError: our value type cannot hold the scales.
        """
        if self.codes == FP8:
            return SparseWeight(self.unpacked(codes, stored), mask)
        scales = self.scales(stored, len(codes))
        if not torch.equal(scales.to(SCALE_DTYPE).double(), scales.double()):
            raise InputError(f"{self.name}: its scales do not fit bfloat16, {WAY_OUT}.")
        own = scales.to(SCALE_DTYPE).contiguous()
        return SparseWeight.from_codes(codes, own, mask, self.floating)

    def floats(self, codes: Tensor, stored: Tensor) -> Tensor:
        """Multiply out codes [out, in], as `unpacked`; integer ones exactly.

        Raises:
            InputError: a product with an integer code has no exact value in `floating`.
        """
        floats = self.unpacked(codes, stored)
        if self.codes == FP8:
            return floats
        scales, step = self.scales(stored, len(codes)), max(1, CHUNK_WEIGHTS // codes.shape[1])
        for start in range(0, len(codes), step):
            part = slice(start, start + step)
            exact = codes[part].double() * scales[part].double().repeat_interleave(self.columns, 1)
            if not torch.equal(floats[part].double(), exact):
                raise InputError(
                    f"{self.name}: its int{self.bits} codes times their scales do not fit "
                    f"{str(self.dtype).removeprefix('torch.')}, {WAY_OUT}."
                )
        return floats

    def unpacked(self, codes: Tensor, stored: Tensor) -> Tensor:
        """Multiply in float32, round to `floating`; integer codes as the old library did."""
        scales = self.scales(stored, len(codes)).float().repeat_interleave(self.columns, 1)
        # Exact in float32, but for scales of float32 themselves.
        return scales.mul_(codes.float()).to(self.floating)
