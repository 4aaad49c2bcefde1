"""Patterns: which positions of a weight may stay, given a score.

A pattern knows nothing of models, methods or files. N:M counts the weights *kept* of every M
consecutive columns (in_features), as NVIDIA does; research code often counts the pruned ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from gblm.errors import PatternError
from gblm.sparse.passes import places, row_blocks

Scope = Literal["row", "matrix"]
# By N:M, the most weights that each half of a group may keep.
HALVES = {(8, 16): 5}


class Pattern(Protocol):
    """A pattern says which positions of a weight may stay."""

    @property
    def sparsity(self) -> float:
        """Give the fraction of weights that become zero."""

    def keep(self, score: Tensor, scope: Scope) -> Tensor:
        """Choose the highest scores.

        Args:
            score: [out, in] float, larger = more important.
            scope: who competes, each output row or the whole matrix.

        Returns:
            [out, in] bool, True = the weight stays. Ties prune the lowest index first.
        """

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Raise PatternError when a weight of this shape [out, in] cannot follow the pattern."""

    def check_mask(self, name: str, mask: Tensor) -> None:
        """Raise PatternError naming the first place where a keep mask [out, in] breaks it."""


def keep_highest(score: Tensor, num_pruned: int) -> Tensor:
    """Drop exactly `num_pruned` of each row, the lowest scores; of equal ones the lowest index.

    Args:
        score: [rows, n] floating point without NaN; −0.0 equals +0.0.
        num_pruned: 0 ≤ num_pruned ≤ n.

    Returns:
        [rows, n] bool, True = kept.
    """
    keep = torch.ones(score.shape, dtype=torch.bool, device=score.device)
    for block in row_blocks(score.shape) if num_pruned else ():
        keep[block] = _above(score[block], num_pruned)
    return keep


def _above(score: Tensor, num_pruned: int) -> Tensor:
    """Drop `num_pruned` of each of a few rows, one or more: see `keep_highest`."""
    if score.device.type == "cpu":
        # torch's kthvalue takes n² steps on a sorted row here.
        in_order = np.partition(_as_numpy(score), num_pruned - 1, axis=1)
        threshold = torch.from_numpy(in_order[:, num_pruned - 1, None]).to(score.dtype)
    else:
        threshold = score.kthvalue(num_pruned, dim=1, keepdim=True).values
    keep = (score > threshold).contiguous()
    missing = score.shape[1] - num_pruned - keep.sum(dim=1, dtype=torch.int32)
    # Of those at the threshold, the last of each row stay.
    ties = places(score == threshold)
    rows = ties // score.shape[1]
    ends = rows.bincount(minlength=len(score)).cumsum(0)
    from_end = ends[rows] - torch.arange(len(ties), device=ties.device)
    keep.view(-1)[ties[from_end <= missing[rows]]] = True
    return keep


@dataclass(frozen=True)
class Unstructured:
    """Any position may stay; floor(sparsity · n) weights go, counted per row or per matrix."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise PatternError(f"sparsity {self.sparsity:g} is outside 0 ≤ sparsity < 1.")

    def __str__(self) -> str:
        # The shortest decimal that reads back as the same number, never with an exponent.
        text = format(Decimal(repr(self.sparsity)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text

    def keep(self, score: Tensor, scope: Scope) -> Tensor:
        """See Pattern.keep; the count that goes is exact also when scores tie."""
        flat = score if scope == "row" else score.reshape(1, -1)
        return keep_highest(flat, int(flat.shape[1] * self.sparsity)).reshape(score.shape)

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Take every shape."""

    def check_mask(self, name: str, mask: Tensor) -> None:
        """Take every mask."""


@dataclass(frozen=True)
class Dense:
    """Every position stays: nothing is pruned. The control of all other patterns."""

    sparsity: ClassVar[float] = 0.0

    def __str__(self) -> str:
        return "dense"

    def keep(self, score: Tensor, scope: Scope) -> Tensor:
        """See Pattern.keep; all of them, whatever the score."""
        return torch.ones_like(score, dtype=torch.bool)

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Take every shape."""

    def check_mask(self, name: str, mask: Tensor) -> None:
        """Raise PatternError unless the mask keeps everything."""
        if not bool(mask.all()):
            row, col = (int(i) for i in (~mask).nonzero()[0])
            raise PatternError(
                f"{name}: row {row}, column {col} is dropped; dense keeps all. "
                "Give the pattern of the zeros, such as 2:4 or 0.5."
            )


def _as_numpy(score: Tensor) -> Any:
    """View CPU scores as a numpy array; bfloat16, which numpy lacks, is widened."""
    return score.detach().to(torch.promote_types(score.dtype, torch.float32)).numpy()


def _ranks(scores: Tensor) -> Tensor:
    """Count the scores of its column that each beats, [n, columns] uint8; later ties win."""
    # A rank by comparison beats a sort of tiny rows; one row per place makes the rows long.
    # On CPU numpy compares six times as fast as torch; what follows is the same in both.
    on_cpu = scores.device.type == "cpu"
    lib: Any = np if on_cpu else torch
    rows: Any = _as_numpy(scores) if on_cpu else scores
    rank, last = lib.zeros_like(rows, dtype=lib.uint8), len(rows) - 1
    for i in range(last):
        later = rows[i + 1 :] >= rows[i]
        rank[i + 1 :] += later.view(lib.uint8)
        rank[i] += (last - i) - later.view(lib.uint8).sum(axis=0, dtype=lib.uint8)
    return torch.as_tensor(rank)


def first_wrong(mask: Tensor, width: int, most: int, least: int = 0) -> tuple[int, int, int] | None:
    """Find the first `width` consecutive columns that keep more than `most` or less than `least`.

    Args:
        mask: [out, in] bool; `in` is a multiple of `width`.
        width: of each range, which begin at its multiples.
        most: how many may be kept.
        least: how many must be kept.

    Returns:
        Row, first column and the number kept; None when there is no such range.
    """
    for block in row_blocks(mask.shape):
        counts = mask[block].reshape(-1, mask.shape[1] // width, width).sum(-1, dtype=torch.int32)
        if int(counts.max()) > most or int(counts.min()) < least:
            row, place = (int(i) for i in ((counts > most) | (counts < least)).nonzero()[0])
            return block.start + row, place * width, int(counts[row, place])
    return None


@dataclass(frozen=True)
class NM:
    """`keep_n` weights stay of every `group_m` consecutive inputs.

    Of 8:16, 3 to 5 stay in each half of a group: 11,172 of the 12,870 masks. A kernel can then
    give each half four slots, of which only the last may hold a weight of the other half.
    """

    keep_n: int
    group_m: int

    def __post_init__(self) -> None:
        if not 0 < self.keep_n < self.group_m <= 64:
            raise PatternError(f"pattern {self}: N:M needs 0 < N < M ≤ 64 (N weights kept of M).")

    def __str__(self) -> str:
        return f"{self.keep_n}:{self.group_m}"

    @property
    def sparsity(self) -> float:
        """Give the fraction of weights that become zero."""
        return 1.0 - self.keep_n / self.group_m

    @property
    def unit(self) -> int:
        """Count the columns within which kept weights may change places: a group or a half."""
        halved = (self.keep_n, self.group_m) in HALVES
        return self.group_m // 2 if halved else self.group_m

    @property
    def unit_most(self) -> int:
        """Count the weights that a unit keeps at most."""
        return HALVES.get((self.keep_n, self.group_m), self.keep_n)

    def keep(self, score: Tensor, scope: Scope) -> Tensor:
        """See Pattern.keep; groups compete alone, so the scope makes no difference."""
        keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        for block in row_blocks(score.shape):
            by_place = torch.stack(score[block].reshape(-1, self.group_m).unbind(1))
            kept = _ranks(by_place) >= self.group_m - self.keep_n
            if self.unit < self.group_m:
                self._even_out(by_place, kept)
            keep[block] = kept.t().reshape(-1, score.shape[1])
        return keep

    def _even_out(self, scores: Tensor, keep: Tensor) -> None:
        """Choose again, in place, where a half keeps too many: its best and the other's best.

        Args:
            scores: [group_m, groups].
            keep: [group_m, groups] bool, the N highest of each group.
        """
        most, first = self.unit_most, keep[: self.unit].sum(dim=0, dtype=torch.int32)
        wrong = ((first > most) | (first < self.keep_n - most)).nonzero()[:, 0]
        first = first[wrong].clamp(self.keep_n - most, most)
        halves = (slice(self.unit), first), (slice(self.unit, None), self.keep_n - first)
        for half, count in halves:
            keep[half, wrong] = _ranks(scores[half, wrong]) >= self.unit - count

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Raise PatternError unless the columns are a multiple of M."""
        if shape[1] % self.group_m:
            raise PatternError(
                f"{name}: {shape[1]} columns do not divide into groups of {self.group_m} "
                f"(pattern {self}). Choose another pattern or leave it dense with --ignore."
            )

    def check_mask(self, name: str, mask: Tensor) -> None:
        """Raise PatternError where a group keeps more than N, or a half of 8:16 more than 5."""
        self.check_shape(name, (mask.shape[0], mask.shape[1]))
        if found := first_wrong(mask, self.group_m, self.keep_n):
            row, col, count = found
            raise PatternError(
                f"{name}: row {row}, columns {col}..{col + self.group_m - 1} hold {count} "
                f"non-zeros; {self} allows {self.keep_n}. Re-run `gblm prune --pattern {self}`."
            )
        halved = self.unit < self.group_m
        if halved and (found := first_wrong(mask, self.unit, self.unit_most)):
            row, col, count = found
            raise PatternError(
                f"{name}: row {row}, columns {col}..{col + self.unit - 1} hold {count} non-zeros; "
                f"{self} allows {self.unit_most} in each half of a group. Store the mask as it is "
                f"with `--pattern 0.5`, or re-run `gblm prune --pattern {self}`."
            )


def parse(text: str) -> Pattern:
    """Read a pattern: "2:4" (N of M), "0.5" (a sparsity) or "dense".

    Raises:
        PatternError: the text is none of these.
    """
    if match := re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", text):
        return NM(int(match[1]), int(match[2]))
    if text == "dense":
        return Dense()
    if re.fullmatch(r"0?\.[0-9]+|0", text):
        return Unstructured(float(text))
    raise PatternError(
        f"pattern {text!r} is unknown: give N:M (2:4 keeps 2 of 4), a sparsity such as 0.5, or "
        "dense."
    )
