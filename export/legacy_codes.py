"""Codes and scales of compressed-tensors as ours, or as floats; exactly, or rounded if asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gblm.errors import CheckpointError, InputError
from gblm.formats import VALUE_DTYPES
from gblm.model.reader import Header
from gblm.values import FLOAT, GROUP_SIZES, ROW, SCALE_DTYPE, ValueType
from gblm.weights import SparseWeight

INT8, FP8 = torch.int8, torch.float8_e4m3fn
# Weights that are expanded at once in float64.
CHUNK_WEIGHTS = 1 << 22
WAY_OUT = "so the weights would change; start from the dense model"
# What the products of fp8 codes and scales are rounded to, once, by whoever asks for it.
ROUNDED = torch.bfloat16
ROUNDING = (
    "fp8 codes × scales are rounded once to bfloat16 (relative error at most 2^-8, that of fp8 "
    "itself is 2^-4)"
)


@dataclass(frozen=True)
class Scaling:
    """How the scales of one weight lie.

    Attributes:
        name: of the dense weight.
        codes: dtype of the codes: INT8 or FP8.
        dtype: of the scales, and of what the old library unpacks to.
        groups: scales per row.
        columns: that share a scale.
        grouped: whether config.json says so, and not that it is the whole row.
        bits: of an integer code, 8 or 4.
        rounds: whether fp8 products may be rounded to ROUNDED.
    """

    name: str
    codes: torch.dtype
    dtype: torch.dtype
    groups: int
    columns: int
    grouped: bool = False
    bits: int = 8
    rounds: bool = False

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
        """How we store the codes: integers as codes, fp8 as the floats that they stand for."""
        if self.becomes_floats:
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
    def becomes_floats(self) -> bool:
        """Whether the codes are multiplied out."""
        return self.codes == FP8

    @property
    def floating(self) -> torch.dtype:
        """Of the floats that codes stand for: that of the scales, or what they are rounded to."""
        return ROUNDED if self.rounds and self.codes == FP8 else self.dtype

    def check(self, stored: Tensor, rows: int) -> None:
        """Refuse scales that `weight` would refuse; needs no codes.

        Raises:
            CheckpointError: a scale is not positive.
            InputError: our value type cannot hold it.
        """
        if self.becomes_floats:
            self.scales(stored, rows)
        else:
            self._own_scales(stored, rows)

    def scales(self, stored: Tensor, rows: int) -> Tensor:
        """[rows, groups] in their dtype; finite and positive, or refused."""
        scales = stored.reshape(-1, self.groups).expand(rows, self.groups)
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise CheckpointError(f"{self.name}: a scale is not positive. The file is damaged.")
        return scales

    def weight(self, codes: Tensor, mask: Tensor, stored: Tensor) -> SparseWeight:
        """The weight in our value type: integer codes without loss, fp8 as `floats` gives it.

        Args:
            codes: [out, in] of dtype `codes`.
            mask: [out, in] bool.
            stored: the scales as they are stored.

        Raises:
            InputError: our value type cannot hold it exactly.
        """
        if self.becomes_floats:
            return SparseWeight(self.floats(codes, stored), mask)
        scales = self._own_scales(stored, len(codes))
        return SparseWeight.from_codes(codes, scales, mask, self.floating)

    def floats(self, codes: Tensor, stored: Tensor) -> Tensor:
        """Codes times scales, [out, in], `floating`.

        Raises:
            InputError: a product has no exact value in it, and is not to be rounded.
        """
        floats = self.unpacked(codes, stored)
        if self.rounds and self.codes == FP8:
            return floats
        scales, step = self.scales(stored, len(codes)), max(1, CHUNK_WEIGHTS // codes.shape[1])
        for start in range(0, len(codes), step):
            part = slice(start, start + step)
            exact = codes[part].double() * scales[part].double().repeat_interleave(self.columns, 1)
            if not torch.equal(floats[part].double(), exact):
                fp8 = self.codes == FP8
                raise InputError(
                    f"{self.name}: its {'fp8' if fp8 else f'int{self.bits}'} codes times their "
                    f"scales do not fit {str(self.dtype).removeprefix('torch.')}, {WAY_OUT}"
                    f"{', or let --round change them' if fp8 else ''}."
                )
        return floats

    def unpacked(self, codes: Tensor, stored: Tensor) -> Tensor:
        """The products in float32, rounded to `floating`; if that of the scales, as theirs were."""
        scales = self.scales(stored, len(codes)).float().repeat_interleave(self.columns, 1)
        # Exact in float32, but for scales of float32 themselves.
        return scales.mul_(codes.float()).to(self.floating)

    def _own_scales(self, stored: Tensor, rows: int) -> Tensor:
        """[rows, groups] as ours are stored."""
        scales = self.scales(stored, rows)
        if not torch.equal(scales.to(SCALE_DTYPE).double(), scales.double()):
            raise InputError(f"{self.name}: its scales do not fit bfloat16, {WAY_OUT}.")
        return scales.to(SCALE_DTYPE).contiguous()
