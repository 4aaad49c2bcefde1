"""Patterns: which positions of a weight may stay, given a score.

A pattern knows nothing of models, methods or files. N:M counts the weights *kept* of every M
consecutive columns (in_features), as NVIDIA does; research code often counts the pruned ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, Protocol

import torch
from torch import Tensor

from gblm.errors import PatternError

Scope = Literal["row", "matrix"]


class Pattern(Protocol):
    """A constraint on the positions of the weights that stay."""

    @property
    def sparsity(self) -> float:
        """Fraction of weights that become zero."""

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


@dataclass(frozen=True)
class Unstructured:
    """Any position; floor(sparsity · n) weights go, counted per row or per matrix."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise PatternError(f"sparsity {self.sparsity:g} is outside 0 ≤ sparsity < 1.")

    def __str__(self) -> str:
        text = format(Decimal(repr(self.sparsity)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text

    def keep(self, score: Tensor, scope: Scope) -> Tensor:
        """See Pattern.keep; the count that goes is exact also when scores tie."""
        flat = score if scope == "row" else score.reshape(1, -1)
        num_pruned = int(flat.shape[1] * self.sparsity)
        order = torch.sort(flat, dim=1, stable=True).indices[:, :num_pruned]
        keep = torch.ones_like(flat, dtype=torch.bool).scatter_(1, order, False)
        return keep.reshape(score.shape)

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Every shape will do."""

    def check_mask(self, name: str, mask: Tensor) -> None:
        """Every mask will do."""


@dataclass(frozen=True)
class NM:
    """`keep_n` weights stay of every `group_m` consecutive inputs."""

    keep_n: int
    group_m: int

    def __post_init__(self) -> None:
        if not 0 < self.keep_n < self.group_m <= 64:
            raise PatternError(f"pattern {self}: N:M needs 0 < N < M ≤ 64 (N weights kept of M).")

    def __str__(self) -> str:
        return f"{self.keep_n}:{self.group_m}"

    @property
    def sparsity(self) -> float:
        """Fraction of weights that become zero."""
        return 1.0 - self.keep_n / self.group_m

    def keep(self, score: Tensor, scope: Scope) -> Tensor:
        """See Pattern.keep; groups compete alone, so the scope makes no difference."""
        groups = score.reshape(score.shape[0], -1, self.group_m)
        index = torch.arange(self.group_m, device=score.device)
        # A rank by comparison beats a sort of tiny rows, and breaks ties by index exactly.
        rank = torch.zeros(groups.shape, dtype=torch.uint8, device=score.device)
        for i in range(self.group_m):
            other = groups[..., i : i + 1]
            rank += (other < groups) | ((other == groups) & (i < index))
        return (rank >= self.group_m - self.keep_n).reshape(score.shape)

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Columns must be a multiple of M."""
        if shape[1] % self.group_m:
            raise PatternError(
                f"{name}: {shape[1]} columns do not divide into groups of {self.group_m} "
                f"(pattern {self}). Choose another pattern or leave it dense with --ignore."
            )

    def check_mask(self, name: str, mask: Tensor) -> None:
        """No group may hold more than N kept weights."""
        self.check_shape(name, (mask.shape[0], mask.shape[1]))
        counts = mask.reshape(mask.shape[0], -1, self.group_m).sum(dim=-1, dtype=torch.int32)
        if int(counts.max()) <= self.keep_n:
            return
        row, group = (int(i) for i in (counts > self.keep_n).nonzero()[0])
        col = group * self.group_m
        raise PatternError(
            f"{name}: row {row}, columns {col}..{col + self.group_m - 1} hold "
            f"{int(counts[row, group])} non-zeros; {self} allows {self.keep_n}. "
            f"Re-run `gblm prune --pattern {self}`."
        )


def parse(text: str, sparsity: float | None = None) -> Pattern:
    """Read a pattern: "2:4", "0.5", or "unstructured" with `sparsity` beside it.

    Raises:
        PatternError: the text is none of these, or contradicts `sparsity`.
    """
    if match := re.fullmatch(r"(\d{1,2}):(\d{1,2})", text):
        pattern: Pattern = NM(int(match[1]), int(match[2]))
    elif text == "unstructured":
        pattern = Unstructured(0.5 if sparsity is None else sparsity)
    elif re.fullmatch(r"0?\.\d+|0", text):
        pattern = Unstructured(float(text))
    else:
        raise PatternError(
            f"pattern {text!r} is unknown: give N:M (2:4 keeps 2 of 4), a sparsity such as 0.5, "
            "or `unstructured` with --sparsity."
        )
    if sparsity is not None and abs(pattern.sparsity - sparsity) > 1e-9:
        raise PatternError(
            f"pattern {text} has sparsity {pattern.sparsity:g}, but {sparsity:g} was asked for: "
            "leave --sparsity out."
        )
    return pattern
