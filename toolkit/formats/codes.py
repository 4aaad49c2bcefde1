"""Codes as they are written: with the zero point of their group added, where it has one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gblm.errors import CheckpointError, PatternError
from gblm.scales import FP8_DTYPE
from gblm.values import ValueType
from gblm.weights import SparseWeight

# PyTorch has few operators for these floats: their bits are looked at. NaN has either sign.
FP8_MINUS_ZERO, FP8_NAN = 0x80, 0x7F


def stored_codes(weight: SparseWeight) -> Tensor:
    """[out, in] of a weight that has codes, in their dtype; −0 of fp8 becomes +0."""
    if weight.codes is None:
        raise ValueError("this weight has no codes.")
    if weight.codes.dtype == FP8_DTYPE:
        bits = weight.codes.view(torch.uint8)
        return torch.where(bits == FP8_MINUS_ZERO, 0, bits).view(FP8_DTYPE)
    if weight.zeros is None:
        return weight.codes
    return weight.codes + spread(weight.zeros, weight.codes.shape[1])


def spread(zeros: Tensor, columns: int) -> Tensor:
    """Zero points for every column: [out, groups] uint8 → [out, in] int8."""
    return zeros.view(torch.int8).repeat_interleave(columns // zeros.shape[1], dim=1)


def holds_nan(codes: Tensor) -> bool:
    """Whether one of some fp8 codes is none."""
    return bool((codes.view(torch.uint8) & FP8_NAN == FP8_NAN).any())


def check_range(name: str, weight: SparseWeight, values: ValueType) -> None:
    """Raise PatternError when a weight's codes or zero points are none of the value type's."""
    codes = stored_codes(weight)
    if values.code_dtype != codes.dtype:
        raise PatternError(f"{name}: codes are {codes.dtype}; {values.kind} has others.")
    if values.is_fp8:
        if holds_nan(codes):
            raise PatternError(f"{name}: a code is NaN, which fp8 values may not be.")
        return
    low, high = int(codes.min()), int(codes.max())
    if weight.zeros is not None:
        high = max(high, int(weight.zeros.max()))
    if low < values.least or high > values.limit:
        raise PatternError(
            f"{name}: codes {low} to {high} do not fit {values.kind}, which has {values.least} "
            f"to {values.limit}."
        )


def check_groups(name: str, parts: Mapping[str, Tensor], values: ValueType) -> None:
    """Raise CheckpointError when scales or zero points from a file are none."""
    scales = parts["scales"]
    wrong = ~(scales.isfinite() & (scales > 0))
    _refuse(name, "scales", scales, wrong, "scales are finite and greater than 0")
    if values.has_zeros:
        zeros, limit = parts["zeros"], values.limit
        _refuse(name, "zeros", zeros, zeros > limit, f"zero points are 0 to {limit}")


def check_codes(name: str, parts: Mapping[str, Tensor], values: ValueType) -> None:
    """Raise CheckpointError when codes from a file are none; of integers every one is."""
    if values.is_fp8 and holds_nan(parts["values"]):
        raise CheckpointError(
            f"{name}.values: holds NaN (0x7F or 0xFF), which fp8 values may not. The file is "
            "damaged."
        )


def _refuse(name: str, part: str, found: Tensor, wrong: Tensor, rule: str) -> None:
    places = wrong.nonzero()
    if len(places):
        row, group = (int(i) for i in places[0])
        raise CheckpointError(
            f"{name}.{part}: row {row}, group {group} is {found[row, group].item()}; {rule}. "
            "The file is damaged."
        )
