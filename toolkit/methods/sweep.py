"""Sweep: a pass over the columns of a weight whose later columns make up for earlier errors.

What is computed, and from which papers, stands in gblm.methods.obs. The columns that are left are
updated lazily, in nested ranges: one matrix product a range instead of one update a column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gblm.errors import InputError
from gblm.methods.base import Stats
from gblm.sparse.values import ValueType, checked_codes, mse_scales, to_codes_
from gblm.sparse.weights import SparseWeight

# Columns that are worked through one by one before one product settles the next ones.
LEAF = 16
# Columns that wait for one product with all columns before them.
BLOCK = 128
# From a score [columns, out] and the range of its columns to [columns, out] bool, True = goes.
Choose = Callable[[Tensor, int, int], Tensor]


class Grid:
    """The scales of a weight's groups of columns, which are opened from left to right.

    Attributes:
        size: columns of a group.
        limit: the largest code.
        steps: [out] float32, the scales of the open group.
    """

    steps: Tensor

    def __init__(self, size: int, limit: int) -> None:
        self.size, self.limit = size, limit
        self._scales: list[Tensor] = []

    def open(self, kept: Tensor, pivots: Tensor) -> None:
        """Fit the scales of the next group.

        Args:
            kept: [size, out] float32, the group's weights; zero where they will be dropped.
            pivots: [size, 1] float32: an error costs its square divided by them.
        """
        scales = mse_scales(kept.t(), self.limit, pivots.squeeze(1).reciprocal())
        self._scales.append(scales)
        self.steps = scales.float()

    def round_(self, column: Tensor, keep: Tensor, error: Tensor) -> None:
        """Replace a column of the open group by its codes.

        Args:
            column: [out] float32; becomes codes, zero where `keep` is.
            keep: [out] float32, 1 where the weight stays, 0 where it goes.
            error: [out] float32, for the column less what its codes stand for.
        """
        error.copy_(column)
        to_codes_(column, self.steps, self.limit).mul_(keep)
        error.addcmul_(column, self.steps, value=-1)

    def scales(self) -> Tensor:
        """Give the scales of the groups that were opened: [out, groups] bfloat16."""
        return torch.stack(self._scales, dim=1)


@dataclass(frozen=True)
class Level:
    """A level says what happens when a sweep reaches a range of `width` columns.

    Attributes:
        choose: what goes of a range; None = that is known, or left to a finer level. A finer level
            may choose again.
        fit: whether a group of the grid begins here.
    """

    width: int
    choose: Choose | None = None
    fit: bool = False


def nest(widths: set[int], choices: Mapping[int, Choose], group: int) -> list[Level]:
    """Order levels from the widest to the narrowest; the caller sees that none cuts another.

    Args:
        widths: of all levels.
        choices: what chooses, by width.
        group: columns of the grid's groups; 0 without a grid.
    """
    return [Level(w, choices.get(w), fit=w == group) for w in sorted(widths, reverse=True)]


class Sweep:
    """One pass over the columns of a weight; stored transposed, so that a column is contiguous.

    Attributes:
        columns: [in, out] float32, the weights with the updates of all columns before them; with
            a grid, codes up to the current column.
        errors: [in, out] float32, the weights less what becomes of them; zero where one stays as
            it is, and from the current column on, so that whole leaves can be multiplied.
        drop: [in, out] float32, 1 where the weight goes.
    """

    def __init__(
        self,
        weight: Tensor,
        stats: Stats,
        *,
        rounds: int | None = None,
        grid: Grid | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Start before the first column.

        Args:
            weight: [out, in] floating point.
            stats: as `prepare_obs` returns them.
            rounds: the most weights that a row loses in a range of the last level; None = all.
                Without a grid only.
            grid: rounds the weights that stay; None = they stay as they are.
            mask: [out, in] bool, True = kept, where no level chooses.
        """
        self.columns = torch.where(stats["dead"], 0, weight.float()).t().contiguous()
        self.errors = torch.zeros_like(self.columns)
        self.drop = torch.zeros_like(self.columns)
        if mask is not None:
            self.drop.masked_fill_(~mask.t(), 1)
        self._factor, self._pivots = stats["inverse_factor"], stats["pivots"].unsqueeze(1)
        self._rounds, self._grid = rounds, grid

    def run(self, start: int, stop: int, levels: list[Level]) -> None:
        """Settle columns start..stop, whose updates from columns before `start` are made."""
        level, *finer = levels
        for low in range(start, stop, level.width):
            high = min(low + level.width, stop)
            columns = self.columns[low:high]
            if low > start:
                factor = self._factor[start:low, low:high]
                columns.addmm_(factor.t(), self.errors[start:low], alpha=-1)
            if level.choose is not None:
                score = columns.square().div_(self._pivots[low:high])
                self.drop[low:high] = level.choose(score, low, high)
            if level.fit and self._grid is not None:
                self._grid.open(columns * (1 - self.drop[low:high]), self._pivots[low:high])
            if finer:
                self.run(low, high, finer)
            elif self._rounds is not None:
                self._eliminate_group(low, high, self._rounds)
            else:
                self._eliminate(low, high)

    def mask(self) -> Tensor:
        """Give the mask: [out, in] bool, True = kept."""
        return (self.drop == 0).t().contiguous()

    def rounded(self, grid: Grid, dtype: torch.dtype, values: ValueType, name: str) -> SparseWeight:
        """Give what a finished sweep with this grid has made of the weight.

        Raises:
            InputError: a weight is NaN or Inf, or becomes so.
        """
        # What is not finite leaves an error that is not, even where it was dropped.
        if not bool(self.errors.isfinite().all()):
            raise InputError(f"{name}.weight holds NaN or Inf, which has no {values.kind} code.")
        # Adding zero makes +0 of the code of a small negative weight.
        codes = (self.columns + 0.0).to(torch.int8).t().contiguous()
        return checked_codes(codes, grid.scales(), self.mask(), dtype, values, name)

    def _eliminate(self, start: int, stop: int) -> None:
        """Update and settle the columns of a leaf one after another."""
        grid, errors, drop = self._grid, self.errors[start:stop], self.drop[start:stop]
        settled = errors.t()
        leaf = zip(
            self._factor[start:stop, start:stop].unbind(1),
            self.columns[start:stop].unbind(),
            (drop if grid is None else 1 - drop).unbind(),
            errors.unbind(),
            strict=True,
        )
        for index, (factor, column, which, error) in enumerate(leaf):
            if index:
                column.addmv_(settled, factor, alpha=-1)
            if grid is None:
                torch.mul(column, which, out=error)
            else:
                grid.round_(column, which, error)

    def _eliminate_group(self, start: int, stop: int, rounds: int) -> None:
        """The same for all columns at once: each round settles one more pruned weight of a row."""
        factor = self._factor[start:stop, start:stop].t()
        columns, drop = self.columns[start:stop], self.drop[start:stop]
        errors = self.errors[start:stop]
        torch.mul(columns, drop, out=errors)
        for _ in range(rounds - 1):
            updated = torch.addmm(columns, factor, errors, alpha=-1)
            torch.mul(updated, drop, out=errors)
        columns.addmm_(factor, errors, alpha=-1)
