"""Value types: floats, or integer codes with group scales; and the rounding from one to the other.

A group is `group_size` consecutive dense columns of one row; its codes stand for code · scale.
Formats store codes and scales without loss; the only lossy step is `quantize`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gblm.errors import InputError, PatternError
from gblm.weights import SparseWeight, dequantize

Kind = Literal["float", "int8", "int4"]
GROUP_SIZES = (32, 64, 128, 256)
# Of each linear's columns: the largest of AUTO_SIZES that divides them, and all of them.
AUTO, ROW = 0, -1
AUTO_SIZES = (128, 64, 32)
# Largest code. Symmetric: −128 and −8 have no opposite and are never used.
LIMITS = {"int8": 127, "int4": 7}
SCALE_DTYPE = torch.bfloat16
WORDS = {AUTO: "auto", ROW: "row"}


@dataclass(frozen=True)
class ValueType:
    """How the kept values of a weight are stored. str() gives its spec: `float`, `int8:128`.

    Attributes:
        kind: "float" is the checkpoint's own dtype; "int8" and "int4" are codes with scales.
        group_size: columns that share a scale: one of GROUP_SIZES, ROW, or AUTO, which `resolve`
            settles for each linear. Always 0 for "float".

    Raises:
        PatternError: there is no such value type.
    """

    kind: Kind
    group_size: int = AUTO

    def __post_init__(self) -> None:
        if self.kind not in ("float", *LIMITS):
            raise PatternError(f"values {self.kind!r} are unknown: give float, int8 or int4.")
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
        """The largest code: 127 or 7. Integer kinds only."""
        return LIMITS[self.kind]

    def group(self, columns: int) -> int:
        """How many of a weight's columns share a scale. Integer kinds only, `resolve`d."""
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
    match = re.fullmatch(r"(float|int8|int4)(?::(\d{1,4}|row|auto))?", text)
    if match is None or match[1] == "float" != text:
        raise PatternError(
            f"values {text[:40]!r} are unknown: give float, or int8 or int4 with a group size, "
            "such as int8:128, int4:row or int8:auto."
        )
    kind: Kind = "float" if match[1] == "float" else "int8" if match[1] == "int8" else "int4"
    words = {word: size for size, word in WORDS.items()}
    size = match[2] or WORDS[AUTO]
    if size.isdigit() and int(size) == AUTO:
        raise PatternError(f"values {text!r}: a group has columns; write {kind}:auto.")
    return ValueType(kind, words[size] if size in words else int(size))


def quantize(weight: Tensor, mask: Tensor, values: ValueType, name: str = "") -> SparseWeight:
    """Round kept weights to the nearest code, symmetric, one scale a group.

    The scale is rounded to bfloat16 before the codes are taken, so that they fit the stored one.
    Methods that choose codes better than to the nearest take this function's place.

    Args:
        weight: [out, in] floating point.
        mask: [out, in] bool, True = kept.
        values: an integer kind, `resolve`d for `in`.
        name: of the linear, for messages.

    Returns:
        Codes, scales, and as `weight` what they stand for, in the given dtype.

    Raises:
        InputError: a weight is NaN or Inf, or becomes so.
        PatternError: `in` does not divide into groups.
    """
    rows, columns = weight.shape
    values.check_columns(name, columns)
    size = values.group(columns)
    groups = torch.where(mask, weight, torch.zeros_like(weight)).float()
    groups = groups.reshape(rows, columns // size, size)
    scales = (groups.abs().amax(dim=-1) / values.limit).to(SCALE_DTYPE)
    # Also where all of a group is too small for any bfloat16 scale.
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    if not bool(scales.isfinite().all()):
        raise InputError(f"{name}.weight holds NaN or Inf, which has no {values.kind} code.")
    groups.div_(scales.float().unsqueeze(-1)).round_().clamp_(-values.limit, values.limit)
    codes = groups.reshape(rows, columns).to(torch.int8)
    del groups
    rounded = SparseWeight(dequantize(codes, scales, weight.dtype), mask, codes, scales)
    if not bool(rounded.weight.isfinite().all()):
        raise InputError(
            f"{name}.weight: its largest values leave the range of {weight.dtype} when they are "
            f"rounded to {values.kind}. Leave it dense with --ignore."
        )
    return rounded
