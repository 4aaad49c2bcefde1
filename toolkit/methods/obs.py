"""Optimal brain surgeon, column by column: the columns to the right make up for the error.

A column's error is what pruning takes (SparseGPT: Frantar and Alistarh 2023,
https://arxiv.org/abs/2301.00774), what rounding takes (GPTQ: Frantar et al. 2022,
https://arxiv.org/abs/2210.17323), or both. With H⁻¹ = Uᵀ U, where H is the Hessian of the squared
output error, an error e in column j costs e² / [U_jj]² and moves column k > j by −e U_jk / U_jj.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from gblm.errors import InputError
from gblm.methods.base import Stats
from gblm.methods.refit import damped
from gblm.methods.sweep import BLOCK, LEAF, Grid, Sweep, nest
from gblm.sparse.values import ValueType
from gblm.sparse.weights import SparseWeight

logger = logging.getLogger(__name__)


def prepare_obs(stats: Stats, damping: float, name: str = "") -> Stats:
    """Factor H⁻¹ = Uᵀ U = (I + V)ᵀ diag(d) (I + V), V strictly upper triangular.

    Args:
        stats: "hessian" [in, in] float32, which is not changed.
        damping: fraction of H's mean diagonal that is added to the diagonal. Where that leaves H
            not positive definite it is raised tenfold, up to 1.
        name: of the first linear with this input, for messages.

    Returns:
        The statistics without "hessian", with "inverse_factor" V [in, in] and "pivots" d [in]
        (d_j = U_jj²), float32, and "dead" [in] bool, the inputs that are always zero.

    Raises:
        InputError: H is not positive definite even with damping 1.
    """
    hessian = stats["hessian"]
    dead = hessian.diagonal() == 0
    factor = _upper_factor(hessian, damping, name)
    diagonal = factor.diagonal().clone()
    factor /= diagonal.unsqueeze(1)
    factor.fill_diagonal_(0)
    rest = {name: value for name, value in stats.items() if name != "hessian"}
    own = {"inverse_factor": factor, "pivots": diagonal.square_(), "dead": dead}
    return rest | own


@torch.no_grad()
def round_obs(
    weight: Tensor,
    mask: Tensor,
    values: ValueType,
    stats: Stats,
    name: str = "",
) -> SparseWeight:
    """Round the kept weights of a fixed mask; with a mask that keeps all, this is GPTQ.

    GPTQ (https://arxiv.org/abs/2210.17323) with columns in their order, whose error includes what
    the mask drops, and scales of the least squared error, weighed by what an error costs. A group's
    scale is fitted when the sweep reaches it; that of a whole row, before it.

    Args:
        weight: [out, in] floating point; before pruning, so that its error can be made up for.
        mask: [out, in] bool, True = kept.
        values: a kind with codes, `resolve`d for `in`.
        stats: as `prepare_obs` returns them.
        name: of the linear, for messages.

    Returns:
        The mask, codes, scales, and as `weight` what they stand for, in the given
        dtype.

    Raises:
        InputError: a weight is NaN or Inf, or becomes so.
        PatternError: `in` does not divide into groups.
    """
    columns = weight.shape[1]
    values.check_columns(name, columns)
    grid = Grid(values.group(columns), values.limit)
    sweep = Sweep(weight, stats, grid=grid, mask=mask)
    # A block may be part of a group or hold several, but not cut one in two.
    block = BLOCK // grid.size * grid.size or BLOCK
    sweep.run(0, columns, nest({grid.size, block, LEAF}, {}, grid.size))
    return sweep.rounded(grid, weight.dtype, values, name)


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
