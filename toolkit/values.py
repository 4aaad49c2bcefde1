"""Value types: floats, or codes with group scales; and the rounding from one to the other.

A group is `group_size` consecutive dense columns of one row; its codes stand for code · scale, or
(code − zero) · scale where groups have zero points. Codes are integers, or floats of 8 bits (fp8).
Formats store all of it without loss; the only lossy step is the rounding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from gblm.errors import InputError, PatternError
from gblm.scales import FP8_DTYPE, CodeRange, Levels, mse_levels, to_codes_, widest_levels
from gblm.weights import SparseWeight

Kind = Literal["float", "int8", "int4", "uint4", "fp8"]
# nearest: codes reach the largest weight. mse: scale of the least squared error. obs: the columns
# to the right make up for the error, too (gblm.methods.obs).
Rounding = Literal["nearest", "mse", "obs"]
GROUP_SIZES = (32, 64, 96, 128, 192, 256)
# Of each linear's columns: the largest of AUTO_SIZES that divides them, and all of them.
AUTO, ROW = 0, -1
AUTO_SIZES = (128, 96, 64, 32)
# The largest code, which is also what rounding reaches downward; LEAST has codes that only others
# write: those of −128 and −8 have no opposite.
LIMITS = {"int8": 127, "int4": 7, "uint4": 15, "fp8": 448}
LEAST = {"int8": -128, "int4": -8, "uint4": 0, "fp8": -448}
# int8 with zero points would gain nothing: what its 255 levels lose is too little to notice.
WITH_ZEROS = ("uint4",)
NIBBLES = ("int4", "uint4")
WORDS = {AUTO: "auto", ROW: "row"}


@dataclass(frozen=True)
class ValueType:
    """How the kept values of a weight are stored. str() gives its spec: `float`, `int8:128`.

    Attributes:
        kind: "float" is the checkpoint's own dtype; "int8" and "int4" are codes with scales;
            "uint4" has a zero point beside each scale; "fp8" codes are themselves floats.
        group_size: columns that share a scale: one of GROUP_SIZES, ROW, or AUTO, which `resolve`
            settles for each linear. Always 0 for "float".

    Raises:
        PatternError: there is no such value type.
    """

    kind: Kind
    group_size: int = AUTO

    def __post_init__(self) -> None:
        if self.kind not in ("float", *LIMITS):
            raise PatternError(
                f"values {self.kind!r} are unknown: give float, {', '.join(LIMITS)}."
            )
        if self.is_float and self.group_size:
            raise PatternError("values float have no scales: leave the group size out.")
        if not self.is_float and self.group_size not in (AUTO, ROW, *GROUP_SIZES):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise PatternError(
                f"group size {self.group_size} of {self.kind} values: give {sizes}, row or auto."
            )

    def __str__(self) -> str:
        if self.is_float:
            return self.kind
        return f"{self.kind}:{WORDS.get(self.group_size, self.group_size)}"

    @property
    def is_float(self) -> bool:
        """Whether values are stored as they are, without codes and scales."""
        return self.kind == "float"

    @property
    def limit(self) -> int:
        """The largest code: 127, 7, 15 or 448. Kinds with codes only."""
        return LIMITS[self.kind]

    @property
    def least(self) -> int:
        """The least code that may be stored: −128, −8, 0 or −448. Kinds with codes only."""
        return LEAST[self.kind]

    @property
    def has_zeros(self) -> bool:
        """Whether each group has a zero point."""
        return self.kind in WITH_ZEROS

    @property
    def is_fp8(self) -> bool:
        """Whether codes are floats, of E4M3."""
        return self.kind == "fp8"

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the codes of a SparseWeight. Kinds with codes only."""
        return FP8_DTYPE if self.is_fp8 else torch.int8

    @property
    def in_nibbles(self) -> bool:
        """Whether two codes share a byte."""
        return self.kind in NIBBLES

    def codes(self, limit: int | None = None) -> CodeRange:
        """Which codes there are, up to another limit if one is given. Kinds with codes only."""
        return CodeRange(limit or self.limit, self.has_zeros, self.is_fp8)

    def group(self, columns: int) -> int:
        """How many of a weight's columns share a scale. Kinds with codes only, `resolve`d."""
        return columns if self.group_size == ROW else self.group_size

    def resolve(self, name: str, columns: int) -> ValueType:
        """Settle AUTO for a linear with so many inputs.

        Raises:
            PatternError: the columns do not divide into groups.
        """
        if self.is_float or self.group_size != AUTO:
            self.check_columns(name, columns)
            return self
        for size in AUTO_SIZES:
            if columns % size == 0:
                return replace(self, group_size=size)
        raise PatternError(
            f"{name}: {columns} columns do not divide into groups of {AUTO_SIZES[-1]} "
            f"(values {self}). Choose --group-size row, or leave it dense with --ignore."
        )

    def check_columns(self, name: str, columns: int) -> None:
        """Raise PatternError when columns of a weight would be left without a whole group."""
        if self.group_size > 0 and columns % self.group_size:
            fits = [str(size) for size in GROUP_SIZES if columns % size == 0]
            raise PatternError(
                f"{name}: {columns} columns do not divide into groups of {self.group_size} "
                f"(values {self}). Group sizes that do: {', '.join([*fits, 'row'])}; or leave it "
                "dense with --ignore."
            )


FLOAT = ValueType("float")


def parse_values(text: str) -> ValueType:
    """Read a spec: `float`, `int8:128`, `int4:row`; `int8` alone is `int8:auto`.

    Raises:
        PatternError: the text is none of these.
    """
    match = re.fullmatch(r"(float|int8|int4|uint4|fp8)(?::([0-9]{1,4}|row|auto))?", text)
    if match is None or match[1] == "float" != text:
        raise PatternError(
            f"values {text[:40]!r} are unknown: give float, or int8, int4, uint4 or fp8 with a "
            "group size, such as int8:128, int4:row or uint4:auto."
        )
    kinds: dict[str, Kind] = {name: name for name in get_args(Kind)}
    kind, words = kinds[match[1]], {word: size for size, word in WORDS.items()}
    size = match[2] or WORDS[AUTO]
    if size.isdigit() and int(size) == AUTO:
        raise PatternError(f"values {text!r}: a group has columns; write {kind}:auto.")
    return ValueType(kind, words[size] if size in words else int(size))


def quantize(
    weight: Tensor,
    mask: Tensor,
    values: ValueType,
    name: str = "",
    *,
    rounding: Literal["nearest", "mse"] = "nearest",
    importance: Tensor | None = None,
    limit: int | None = None,
) -> SparseWeight:
    """Round kept weights to the nearest code; one scale a group, and a zero point if it has one.

    The scale is rounded to bfloat16 before the codes are taken, so that they fit the stored one.
    `gblm.methods.obs.round_obs` chooses codes better than to the nearest.

    Args:
        weight: [out, in] floating point.
        mask: [out, in] bool, True = kept.
        values: a kind with codes, `resolve`d for `in`.
        name: of the linear, for messages.
        rounding: "nearest" has levels that reach the largest weight, "mse" those of `mse_levels`.
        importance: [in] ≥ 0, what "mse" weighs squared errors with, such as the diagonal of H.
        limit: the largest code, if not that of the value type: 3 measures int3.

    Returns:
        Codes, scales, zero points, and as `weight` what they stand for, in the given dtype.

    Raises:
        InputError: a weight is NaN or Inf, or becomes so.
        PatternError: `in` does not divide into groups.
    """
    rows, columns = weight.shape
    values.check_columns(name, columns)
    size, codes = values.group(columns), values.codes(limit)
    groups = torch.where(mask, weight, torch.zeros_like(weight)).float()
    groups = groups.reshape(rows, columns // size, size)
    if rounding == "nearest":
        levels = widest_levels(groups, codes)
    else:
        by_group = None if importance is None else importance.reshape(-1, size)
        levels = mse_levels(groups, codes, by_group)
    # Adding zero makes +0 of the code of a small negative weight.
    rounded = to_codes_(groups, levels, codes).add_(0.0).reshape(rows, columns)
    del groups
    rounded = rounded.to(values.code_dtype)
    return checked_codes(rounded, levels, mask, weight.dtype, values, name)


def checked_codes(
    codes: Tensor, levels: Levels, mask: Tensor, dtype: torch.dtype, values: ValueType, name: str
) -> SparseWeight:
    """SparseWeight.from_codes of codes that were just rounded.

    Raises:
        InputError: a scale is NaN or Inf, or a weight leaves the range of its dtype.
    """
    if not bool(levels.scales.isfinite().all()):
        raise InputError(f"{name}.weight holds NaN or Inf, which has no {values.kind} code.")
    rounded = SparseWeight.from_codes(codes, levels.scales, mask, dtype, levels.zeros)
    if not bool(rounded.weight.isfinite().all()):
        raise InputError(
            f"{name}.weight: its largest values leave the range of {dtype} when they are "
            f"rounded to {values.kind}. Leave it dense with --ignore."
        )
    return rounded
