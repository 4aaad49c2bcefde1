"""Value types: floats, or integer codes with group scales; and the rounding from one to the other.

A group is `group_size` consecutive dense columns of one row; its codes stand for code · scale.
KINDS holds every kind of value with all its facts; formats, kernels and commands read them there.
Formats store codes and scales without loss; the only lossy step is the rounding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gblm.errors import InputError, PatternError
from gblm.sparse.passes import all_finite, row_blocks
from gblm.sparse.weights import SparseWeight

# nearest: codes reach the largest weight. obs: scales of the least squared error, and the columns
# to the right make up for it, too (gblm.methods.obs).
Rounding = Literal["nearest", "obs"]
GROUP_SIZES = (32, 64, 96, 128, 192, 256)
# Of each linear's columns: the largest of AUTO_SIZES that divides them, and all of them.
AUTO, ROW = 0, -1
AUTO_SIZES = (128, 96, 64, 32)
WORDS = {AUTO: "auto", ROW: "row"}
SCALE_DTYPE = torch.bfloat16
# What the search multiplies the widest range with, best first on a tie.
SHRINK = tuple(1 - 0.02 * step for step in range(21))


@dataclass(frozen=True)
class Kind:
    """One kind of value: an entry of KINDS, which is all that a new kind needs.

    Attributes:
        bits: that a value takes on disk: 16 (floats), 8, 4 (two codes a byte) or 3 (eight codes in
            three bytes, of linears without zeros alone; in memory they take 4).
        limit: the largest code; −limit − 1 is the least. Floats have 0.
        column_unit: the CPU kernels take a multiple of so many columns.
        about: how people call it, for the help of the command line.
    """

    bits: int
    limit: int
    column_unit: int
    about: str


KINDS: dict[str, Kind] = {
    "float": Kind(16, 0, 8, "as they are"),
    "int8": Kind(8, 127, 32, "codes of 8 bits with group scales"),
    "int4": Kind(4, 7, 32, "codes of 4 bits with group scales"),
    "int3": Kind(3, 3, 32, "codes of 3 bits with group scales, for the pattern dense"),
}
# Kinds of earlier releases; folders of theirs are told how to go on.
GONE = ("uint4", "fp8")


@dataclass(frozen=True)
class ValueType:
    """How the kept values of a weight are stored. str() gives its spec: `float`, `int8:128`.

    Attributes:
        kind: a name of KINDS; "float" is the checkpoint's own dtype.
        group_size: columns that share a scale: one of GROUP_SIZES, ROW, or AUTO, which `resolve`
            settles for each linear. Always 0 for "float".

    Raises:
        PatternError: there is no such value type.
    """

    kind: str
    group_size: int = AUTO

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PatternError(f"values {self.kind!r} are unknown: give {', '.join(KINDS)}.")
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
        """Tell whether values are stored as they are, without codes and scales."""
        return self.kind == "float"

    @property
    def bits(self) -> int:
        """Count the bits of a value on disk: 16, 8, 4 or 3."""
        return KINDS[self.kind].bits

    @property
    def limit(self) -> int:
        """Give the largest code: 127, 7 or 3; for kinds with codes only."""
        return KINDS[self.kind].limit

    @property
    def least(self) -> int:
        """Give the least code: −128, −8 or −4, without an opposite; for kinds with codes only."""
        return -self.limit - 1

    @property
    def column_unit(self) -> int:
        """Tell of how many columns the CPU kernels take a multiple."""
        return KINDS[self.kind].column_unit

    @property
    def in_nibbles(self) -> bool:
        """Tell whether two codes share a byte."""
        return self.bits == 4

    @property
    def code_dtype(self) -> torch.dtype:
        """Give the dtype of codes on disk: int8, or uint8 where several share a byte."""
        return torch.int8 if self.bits == 8 else torch.uint8

    def count(self, stored: int) -> int:
        """Count the values in so many stored elements, at most."""
        return stored * 8 // self.bits if self.bits < 8 else stored

    def group(self, columns: int) -> int:
        """Count the columns that share a scale; for kinds with codes only, `resolve`d."""
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
            f"(values {self}). Choose {self.kind}:row, or leave it dense with --ignore."
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
    match = re.fullmatch(r"([a-z0-9]+)(?::([0-9]{1,4}|row|auto))?", text)
    if match is not None and match[1] in GONE:
        raise PatternError(
            f"values {text!r} are no longer read: prune again with --values int4, or unpack the "
            "folder with `gblm export dense` of the gblm-toolkit that wrote it."
        )
    if match is None or match[1] not in KINDS or match[1] == "float" != text:
        codes = ", ".join(kind for kind in KINDS if kind != "float")
        raise PatternError(
            f"values {text[:40]!r} are unknown: give float, or one of {codes} with a group size, "
            "such as int8:128, int4:row or int4:auto."
        )
    kind, words = match[1], {word: size for size, word in WORDS.items()}
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
) -> SparseWeight:
    """Round kept weights to the nearest code, with one scale a group.

    The scale is rounded to bfloat16 before the codes are taken, so that they fit the stored one.
    `gblm.methods.obs.round_obs` chooses codes better than to the nearest.

    Args:
        weight: [out, in] floating point.
        mask: [out, in] bool, True = kept.
        values: a kind with codes, `resolve`d for `in`.
        name: of the linear, for messages.
        rounding: "nearest" has scales that reach the largest weight, "mse" those of `mse_scales`.
        importance: [in] ≥ 0, what "mse" weighs squared errors with, such as the diagonal of H.

    Returns:
        Codes, scales, and as `weight` what they stand for, in the given dtype.

    Raises:
        InputError: a weight is NaN or Inf, or becomes so.
        PatternError: `in` does not divide into groups.
    """
    rows, columns = weight.shape
    values.check_columns(name, columns)
    size, limit = values.group(columns), values.limit
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, columns // size, dtype=SCALE_DTYPE, device=weight.device)
    by_group = None if importance is None else importance.reshape(-1, size)
    for block in row_blocks(weight.shape):
        kept = SparseWeight.cut(weight[block], mask[block]).weight.float()
        groups = kept.reshape(-1, columns // size, size)
        if rounding == "nearest":
            scales[block] = widest_scales(groups, limit)
        else:
            scales[block] = mse_scales(groups, limit, by_group)
        to_codes_(groups, scales[block].float().unsqueeze(-1), limit)
        codes[block] = groups.reshape(-1, columns)
    return checked_codes(codes, scales, mask, weight.dtype, values, name)


def checked_codes(
    codes: Tensor, scales: Tensor, mask: Tensor, dtype: torch.dtype, values: ValueType, name: str
) -> SparseWeight:
    """Make a SparseWeight of codes that were just rounded.

    Raises:
        InputError: a scale is NaN or Inf, or a weight leaves the range of its dtype.
    """
    if not all_finite(scales):
        raise InputError(f"{name}.weight holds NaN or Inf, which has no {values.kind} code.")
    rounded = SparseWeight.from_codes(codes, scales, mask, dtype)
    if not all_finite(rounded.weight):
        raise InputError(
            f"{name}.weight: its largest values leave the range of {dtype} when they are "
            f"rounded to {values.kind}. Leave it dense with --ignore."
        )
    return rounded


def widest_scales(groups: Tensor, limit: int) -> Tensor:
    """Find the scales with which the largest weight of each group has the code ±limit.

    Args:
        groups: [..., size] float32.
        limit: the largest code.

    Returns:
        [...] bfloat16, > 0; not finite where a group is not.
    """
    return _stored(groups.abs().amax(dim=-1) / limit)


def mse_scales(groups: Tensor, limit: int, importance: Tensor | None = None) -> Tensor:
    """Find the scales of least squared error in each group, of SHRINK times the widest ones.

    Finer steps for the many cost the largest their distance: Banner et al. 2018,
    https://arxiv.org/abs/1810.05723, who solve for the clipping that is searched for here.

    Args:
        groups: [out, ..., size] float32; zeros have no error, so dropped weights must be zero.
        limit: the largest code.
        importance: [..., size] ≥ 0, broadcast over `groups`, what squared errors are weighed with.

    Returns:
        [out, ...] bfloat16, > 0; not finite where a group is not.
    """
    blocks = row_blocks((len(groups), groups[0].numel()))
    return torch.cat([_search(groups[block], limit, importance) for block in blocks])


def to_codes_(weights: Tensor, scales: Tensor, limit: int) -> Tensor:
    """Replace float32 weights by their nearest codes, ties to even.

    Args:
        weights: any shape.
        scales: float32, broadcast over `weights`.
        limit: the largest code.
    """
    return weights.div_(scales).clamp_(-limit - 1, limit).round_()


def _stored(scales: Tensor) -> Tensor:
    """Round scales as they are stored; 1 also where a group is too small for a bfloat16 scale."""
    scales = scales.to(SCALE_DTYPE)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _search(groups: Tensor, limit: int, importance: Tensor | None) -> Tensor:
    """Find the scales of `mse_scales` for a few rows."""
    high = groups.abs().amax(dim=-1) / limit
    best, least = _stored(high), torch.full_like(high, torch.inf)
    for factor in SHRINK:
        scales = _stored(high * factor)
        steps = scales.float().unsqueeze(-1)
        error = torch.addcmul(groups, to_codes_(groups.clone(), steps, limit), steps, value=-1)
        error.square_()
        total = (error if importance is None else error.mul_(importance)).sum(dim=-1)
        best = torch.where(total < least, scales, best)
        least = torch.minimum(total, least)
    return best
