"""SparseGPT: prune column by column; the columns to the right make up for the error.

Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774; score = w² / [U_jj]², where
H⁻¹ = Uᵀ U and H is the Hessian of the squared output error. Kept weights change.

The published code (https://github.com/IST-DASLab/sparsegpt) prunes scores *at or below* the
int(n · sparsity)-th lowest of each block of columns: one weight a block too many, and all ties.
Here the count over the matrix is exactly floor(sparsity · n).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from gblm.errors import InputError, UsageError
from gblm.methods.base import Method, Stats
from gblm.methods.refit import damped
from gblm.patterns import NM, Block, Pattern, Unstructured, keep_highest
from gblm.weights import SparseWeight

logger = logging.getLogger(__name__)

# Columns that are worked through one by one before one product settles the next ones.
LEAF = 16
# From a score [columns, out] and the range of its columns to [columns, out] bool, True = goes.
Choose = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class SparseGPT(Method):
    """score = w² / [H⁻¹]_jj of the columns still open; the rest of the row is updated.

    Attributes:
        damping: fraction of H's mean diagonal that is added to the diagonal. Where that leaves H
            not positive definite it is raised tenfold, up to 1.
        block_size: columns whose weights compete for the budget of an unstructured or block
            pattern; lowered to a multiple of the pattern's width. N:M does not depend on it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping {self.damping!r} must be above 0 and at most 1.")
        if self.block_size < 1:
            raise UsageError(f"block_size {self.block_size!r} must be at least 1.")

    def check_pattern(self, pattern: Pattern) -> None:
        """See Method.check_pattern; the choice within a block must be known for each pattern."""
        if not isinstance(pattern, Unstructured | NM | Block):
            raise UsageError(f"sparsegpt cannot follow the pattern {pattern}: use another method.")

    def prepare(self, stats: Stats, name: str = "") -> Stats:
        """Factor H⁻¹ = Uᵀ U = (I + V)ᵀ diag(d) (I + V), V strictly upper triangular.

        Args:
            stats: "hessian" [in, in] float32, which is not changed.
            name: of the first linear with this input, for messages.

        Returns:
            The statistics without "hessian", with "inverse_factor" V [in, in] and "pivots" d [in]
            (d_j = U_jj²), float32, and "dead" [in] bool, the inputs that are always zero.

        Raises:
            InputError: H is not positive definite even with damping 1.
        """
        hessian = stats["hessian"]
        dead = hessian.diagonal() == 0
        factor = _upper_factor(hessian, self.damping, name)
        diagonal = factor.diagonal().clone()
        factor /= diagonal.unsqueeze(1)
        factor.fill_diagonal_(0)
        rest = {name: value for name, value in stats.items() if name != "hessian"}
        own = {"inverse_factor": factor, "pivots": diagonal.square_(), "dead": dead}
        return rest | own

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
        self.check_pattern(pattern)
        plan = _plan(pattern, self.block_size, weight.device)
        sweep = _Sweep(weight, stats, plan.rounds)
        sweep.run(0, weight.shape[1], plan.levels)
        mask = (sweep.drop == 0).t().contiguous()
        # A pruned weight is its own error, so this difference is exactly zero there.
        kept = sweep.columns.sub_(sweep.errors).t()
        return SparseWeight(kept.to(weight.dtype).contiguous(), mask)


@dataclass(frozen=True)
class _Plan:
    """How a pattern is chosen along the columns.

    Attributes:
        levels: widths of nested ranges of columns, widest first, and what chooses there.
        rounds: the most weights that a row loses in a range of the last level; None = all.
    """

    levels: list[tuple[int, Choose | None]]
    rounds: int | None = None


def _plan(pattern: Pattern, block_size: int, device: torch.device) -> _Plan:
    """Nest the ranges so that none cuts a group or tile in two."""
    rounds = None
    if isinstance(pattern, NM):
        width = pattern.group_m
        block = max(block_size // width, 1) * width
        num_pruned = pattern.group_m - pattern.keep_n
        earlier = torch.ones(width, width, dtype=torch.int32, device=device).tril(-1)
        choose: Choose = partial(_lowest_of_group, num_pruned, earlier.unsqueeze(2))
        rounds = num_pruned if width <= LEAF else None
    else:
        tile = (pattern.block_rows, pattern.block_cols) if isinstance(pattern, Block) else (1, 1)
        block = width = max(block_size // tile[1], 1) * tile[1]
        choose = partial(_lowest_of_block, pattern.sparsity, tile)
    leaf = min(LEAF // width * width or LEAF, block)
    widths = sorted({block, width, leaf}, reverse=True)
    return _Plan([(size, choose if size == width else None) for size in widths], rounds)


class _Sweep:
    """One pass over the columns of a weight; stored transposed, so that a column is contiguous.

    Attributes:
        columns: [in, out] float32, the weights with the updates of all columns before them.
        errors: [in, out] float32, the weights that were pruned; zero where one stays, and from the
            current column on, so that whole leaves can be multiplied.
        drop: [in, out] float32, 1 where the weight goes.
    """

    def __init__(self, weight: Tensor, stats: Stats, rounds: int | None) -> None:
        self.columns = torch.where(stats["dead"], 0, weight.float()).t().contiguous()
        self.errors = torch.zeros_like(self.columns)
        self.drop = torch.zeros_like(self.columns)
        self._factor, self._pivots = stats["inverse_factor"], stats["pivots"].unsqueeze(1)
        self._rounds = rounds

    def run(self, start: int, stop: int, levels: list[tuple[int, Choose | None]]) -> None:
        """Prune columns start..stop, whose updates from columns before `start` are made.

        Args:
            start: first column.
            stop: the column after the last.
            levels: see _Plan.
        """
        (width, choose), *finer = levels
        for low in range(start, stop, width):
            high = min(low + width, stop)
            columns = self.columns[low:high]
            if low > start:
                factor = self._factor[start:low, low:high]
                columns.addmm_(factor.t(), self.errors[start:low], alpha=-1)
            if choose is not None:
                score = columns.square().div_(self._pivots[low:high])
                self.drop[low:high] = choose(score, low, high)
            if finer:
                self.run(low, high, finer)
            elif self._rounds is not None:
                self._eliminate_group(low, high, self._rounds)
            else:
                self._eliminate(low, high)

    def _eliminate(self, start: int, stop: int) -> None:
        """Update and prune the columns of a leaf one after another."""
        errors = self.errors[start:stop]
        settled = errors.t()
        leaf = zip(
            self._factor[start:stop, start:stop].unbind(1),
            self.columns[start:stop].unbind(),
            self.drop[start:stop].unbind(),
            errors.unbind(),
            strict=True,
        )
        for index, (factor, column, drop, error) in enumerate(leaf):
            if index:
                column.addmv_(settled, factor, alpha=-1)
            torch.mul(column, drop, out=error)

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


def _lowest_of_group(
    num_pruned: int, earlier: Tensor, score: Tensor, start: int, stop: int
) -> Tensor:
    """What NM.keep drops of one group, without the many small kernels that would dominate here."""
    # The bits of floats ≥ 0 sort as they do; 1 more, and a tie with an earlier column counts.
    bits = score.view(torch.int32)
    return (bits < bits.unsqueeze(1) + earlier).sum(dim=1) < num_pruned


def _lowest_of_block(
    sparsity: float, tile: tuple[int, int], score: Tensor, start: int, stop: int
) -> Tensor:
    """The tiles [rows, columns] with the lowest summed scores; a weight alone is a tile too."""
    across, down = (stop - start) // tile[1], score.shape[1] // tile[0]
    if tile == (1, 1):
        sums = score
    else:
        sums = score.reshape(across, tile[1], down, tile[0]).sum(dim=(1, 3))
    # Differences of rounded totals add up to the rounded total of the whole matrix.
    done = start // tile[1]
    num_pruned = int(down * (done + across) * sparsity) - int(down * done * sparsity)
    drop = ~keep_highest(sums.reshape(1, -1), num_pruned).reshape(across, 1, down, 1)
    return drop.expand(-1, tile[1], -1, tile[0]).reshape(score.shape)


def _upper_factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """U [in, in], upper triangular, of (H + damping)⁻¹ = Uᵀ U, with as little damping as works."""
    while True:
        factor = _try_upper_factor(hessian, damping)
        if factor is not None:
            return factor
        if damping >= 1:
            raise InputError(
                f"{name}: the Hessian is not positive definite even with damping 1: "
                "calibrate on more text, or use a method without it, such as wanda."
            )
        raised = min(damping * 10, 1.0)
        logger.warning(
            "%s: the Hessian is not positive definite with damping %g; trying %g",
            name,
            damping,
            raised,
        )
        damping = raised


def _try_upper_factor(hessian: Tensor, damping: float) -> Tensor | None:
    """One step of the ladder; at most two matrices of H's size are alive at once."""
    matrix, _ = damped(hessian, damping)
    matrix, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    matrix = torch.cholesky_inverse(matrix)
    matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
    # Not every solver reports a NaN.
    return None if int(failed) or not bool(matrix.diagonal().isfinite().all()) else matrix
