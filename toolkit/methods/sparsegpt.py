"""SparseGPT: prune column by column; the columns to the right make up for the error.

Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774; score = w² / [U_jj]², where
H⁻¹ = Uᵀ U and H is the Hessian of the squared output error. Kept weights change.

The published code (https://github.com/IST-DASLab/sparsegpt) prunes scores *at or below* the
int(n · sparsity)-th lowest of each block of columns: one weight a block too many, and all ties.
Here the count over the matrix is exactly floor(sparsity · n).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import lcm
from typing import ClassVar

import torch
from torch import Tensor

from gblm.errors import UsageError
from gblm.methods.base import Method, Stats
from gblm.methods.obs import prepare_obs
from gblm.methods.sweep import LEAF, Choose, Grid, Level, Sweep, nest
from gblm.sparse.patterns import NM, Pattern, Scope, keep_highest
from gblm.sparse.values import ValueType
from gblm.sparse.weights import SparseWeight


@dataclass(frozen=True)
class SparseGPT(Method):
    """score = w² / [H⁻¹]_jj of the columns still open; the rest of the row is updated.

    Attributes:
        damping: fraction of H's mean diagonal that is added to the diagonal. Where that leaves H
            not positive definite it is raised tenfold, up to 1.
        block_size: columns whose weights compete for the budget of an unstructured
            pattern. N:M does not depend on it.
    """

    scope: ClassVar[Scope] = "matrix"
    about: ClassVar[str] = (
        "w² / [H⁻¹]ⱼⱼ, over all rows, in blocks of 128 columns; later weights make up for the rest "
        "(arXiv 2301.00774)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    damping: float = field(
        default=0.01, metadata={"about": "share of H's mean diagonal that is added to it"}
    )
    block_size: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping {self.damping!r} must be above 0 and at most 1.")
        if self.block_size < 1:
            raise UsageError(f"block_size {self.block_size!r} must be at least 1.")

    def prepare(self, stats: Stats, name: str = "") -> Stats:
        """See prepare_obs, which says what is returned and raised."""
        return prepare_obs(stats, self.damping, name)

    @torch.no_grad()
    def prune(self, weight: Tensor, stats: Stats, pattern: Pattern, name: str = "") -> SparseWeight:
        """Prune one linear and update the weights that stay.

        Args:
            weight: [out, in] floating point.
            stats: as `prepare` returns them.
            name: of the linear, for messages.
            pattern: which positions may stay. N:M is chosen per group, from the weights as updated
                so far; other patterns per block of columns, over all rows.
        """
        columns, rule = weight.shape[1], _rule(pattern, weight.device)
        sweep = Sweep(weight, stats, rounds=rule.rounds)
        sweep.run(0, columns, _plan(pattern, rule, self.block_size, columns))
        # A pruned weight is its own error, so this difference is exactly zero there.
        kept = sweep.columns.sub_(sweep.errors).t()
        return SparseWeight(kept.to(weight.dtype).contiguous(), sweep.mask())

    @torch.no_grad()
    def prune_quantized(
        self, weight: Tensor, stats: Stats, pattern: Pattern, values: ValueType, name: str = ""
    ) -> SparseWeight:
        """Prune one linear and round what stays, in one sweep: later columns make up for both.

        Scores are of the weights as updated by all errors before them. A group's scale is fitted
        when the sweep reaches it, without the weights that would go by the scores of that moment;
        that of a whole row, before the sweep.

        Args:
            weight: [out, in] floating point.
            stats: as `prepare` returns them.
            pattern: which positions may stay, chosen as by `prune`. Where a range of its choice
                would cut a group of scales, it becomes a common multiple of the two.
            values: an integer kind, `resolve`d for `in`.
            name: of the linear, for messages.

        Returns:
            The mask, codes, scales, and as `weight` what they stand for, in the given
            dtype.

        Raises:
            InputError: a weight is NaN or Inf, or becomes so.
            PatternError: `in` does not divide into groups.
        """
        columns, rule = weight.shape[1], _rule(pattern, weight.device)
        values.check_columns(name, columns)
        grid = Grid(values.group(columns), values.limit)
        sweep = Sweep(weight, stats, grid=grid)
        sweep.run(0, columns, _plan(pattern, rule, self.block_size, columns, grid.size))
        return sweep.rounded(grid, weight.dtype, values, name)


@dataclass(frozen=True)
class _Rule:
    """How a pattern chooses.

    Attributes:
        unit: columns that must be chosen together.
        choose: what goes of a range; for N:M of one group.
        wide: the same of any number of units.
        rounds: see Sweep.
    """

    unit: int
    choose: Choose
    wide: Choose
    rounds: int | None = None


def _rule(pattern: Pattern, device: torch.device) -> _Rule:
    if isinstance(pattern, NM):
        size, num_pruned = pattern.group_m, pattern.group_m - pattern.keep_n
        earlier = torch.ones(size, size, dtype=torch.int32, device=device).tril(-1).unsqueeze(2)
        choose: Choose = partial(_lowest_of_group, num_pruned, earlier)
        if pattern.unit < size:
            choose = partial(
                _lowest_of_halves, num_pruned, pattern.unit - pattern.unit_most, earlier
            )
        wide: Choose = partial(_lowest_of_groups, pattern)
        return _Rule(size, choose, wide, num_pruned if size <= LEAF else None)
    choose = partial(_lowest_of_block, pattern.sparsity)
    return _Rule(1, choose, choose)


def _plan(
    pattern: Pattern, rule: _Rule, block_size: int, columns: int, group: int = 0
) -> list[Level]:
    """Nest the ranges so that none cuts a group in two.

    Args:
        pattern: what `rule` is of.
        rule: how it chooses.
        block_size: see SparseGPT.
        columns: of the weight.
        group: columns that share a scale; 0 without scales.
    """
    # A group of the whole row cuts nothing and is not cut.
    unit = lcm(rule.unit, group) if 0 < group < columns else rule.unit
    block = width = max(block_size // unit, 1) * unit
    if isinstance(pattern, NM):
        width = rule.unit if unit in (rule.unit, group) else unit
    choices = {width: rule.choose if width == rule.unit else rule.wide}
    if group > width:
        choices[group] = rule.wide
    leaf = min(LEAF // width * width or LEAF, block)
    return nest({block, width, leaf} | ({group} if group else set()), choices, group)


def _lowest_of_group(
    num_pruned: int, earlier: Tensor, score: Tensor, start: int, stop: int
) -> Tensor:
    """What NM.keep drops of one group, without the many small kernels that would dominate here."""
    return _beats(earlier, score).sum(dim=1) < num_pruned


def _lowest_of_halves(
    num_pruned: int, fewest: int, earlier: Tensor, score: Tensor, start: int, stop: int
) -> Tensor:
    """The same where each half of a group loses at least `fewest`."""
    beats, half = _beats(earlier, score), len(score) // 2
    lost = (beats[:half].sum(dim=1) < num_pruned).sum(dim=0).clamp(fewest, num_pruned - fewest)
    first = beats[:half, :half].sum(dim=1) < lost
    return torch.cat((first, beats[half:, half:].sum(dim=1) < num_pruned - lost))


def _beats(earlier: Tensor, score: Tensor) -> Tensor:
    """Whether column i beats column j, [i, j, out] bool; `earlier` is 1 where j < i."""
    # The bits of floats ≥ 0 sort as they do; 1 more, and a tie with an earlier column counts.
    bits = score.view(torch.int32)
    return bits < bits.unsqueeze(1) + earlier


def _lowest_of_groups(pattern: NM, score: Tensor, start: int, stop: int) -> Tensor:
    """What NM.keep drops of any number of groups."""
    return ~pattern.keep(score.t(), "row").t()


def _lowest_of_block(sparsity: float, score: Tensor, start: int, stop: int) -> Tensor:
    """The lowest scores of a block of columns."""
    # Differences of rounded totals add up to the rounded total of the whole matrix.
    rows = score.shape[1]
    num_pruned = int(rows * stop * sparsity) - int(rows * start * sparsity)
    return ~keep_highest(score.reshape(1, -1), num_pruned).reshape(score.shape)
