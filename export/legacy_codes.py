"""Codes and scales of compressed-tensors as ours, or as floats; exactly or not at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gblm.checkpoint.reader import Header
from gblm.errors import CheckpointError, InputError
from gblm.formats import VALUE_DTYPES
from gblm.scales import SCALE_DTYPE
from gblm.values import FLOAT, GROUP_SIZES, ROW, Kind, ValueType
from gblm.weights import SparseWeight

INT8, FP8 = torch.int8, torch.float8_e4m3fn
# Weights that are expanded at once in float64.
CHUNK_WEIGHTS = 1 << 22
WAY_OUT = "so the weights would change; start from the dense model"


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
        """How we store the codes: integers as codes, fp8 as the floats that they stand for."""
        if self.codes == FP8:
            return FLOAT
        kind: Kind = "int4" if self.bits == 4 else "int8"
        if self.grouped and self.columns in GROUP_SIZES:
            return ValueType(kind, self.columns)
        if self.groups > 1:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise InputError(
                f"{self.name}: groups of {self.columns} columns cannot be stored; {sizes} can."
            )
        return ValueType(kind, ROW)

    def scales(self, stored: Tensor, rows: int) -> Tensor:
        """[rows, groups] in their dtype; finite and positive, or refused."""
        scales = stored.reshape(-1, self.groups).expand(rows, self.groups)
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise CheckpointError(f"{self.name}: a scale is not positive. The file is damaged.")
        return scales

    def weight(self, codes: Tensor, mask: Tensor, stored: Tensor) -> SparseWeight:
        """The weight in our value type, without loss.

        Args:
            codes: [out, in] of dtype `codes`.
            mask: [out, in] bool.
            stored: the scales as they are stored.

        Raises:
            InputError: our value type cannot hold it exactly.
        """
        if self.codes == FP8:
            return SparseWeight(self.floats(codes, stored), mask)
        scales = self.scales(stored, len(codes))
        if not torch.equal(scales.to(SCALE_DTYPE).double(), scales.double()):
            raise InputError(f"{self.name}: its scales do not fit bfloat16, {WAY_OUT}.")
        return SparseWeight.from_codes(codes, scales.to(SCALE_DTYPE).contiguous(), mask, self.dtype)

    def floats(self, codes: Tensor, stored: Tensor) -> Tensor:
        """Codes times scales in the dtype of the scales, [out, in].

        Raises:
            InputError: a product has no exact value in it.
        """
        floats = self.unpacked(codes, stored)
        scales, step = self.scales(stored, len(codes)), max(1, CHUNK_WEIGHTS // codes.shape[1])
        for start in range(0, len(codes), step):
            part = slice(start, start + step)
            exact = codes[part].double() * scales[part].double().repeat_interleave(self.columns, 1)
            if not torch.equal(floats[part].double(), exact):
                kind = "fp8" if self.codes == FP8 else f"int{self.bits}"
                raise InputError(
                    f"{self.name}: its {kind} codes times their scales do not fit "
                    f"{str(self.dtype).removeprefix('torch.')}, {WAY_OUT}."
                )
        return floats

    def unpacked(self, codes: Tensor, stored: Tensor) -> Tensor:
        """What the old library unpacks: the product rounded to the dtype of the scales."""
        scales = self.scales(stored, len(codes)).repeat_interleave(self.columns, 1)
        return codes.to(self.dtype) * scales
