"""Refit: the kept weights of a row that reproduce its dense output best; the mask stays.

Least squares on the support, as ALPS ends (Meng et al. 2024, https://arxiv.org/abs/2406.07831,
section 3.3): conjugate gradients for all rows at once, so that a step is one product
[out, in] × [in, in]. Here the preconditioner is the Hessian's diagonal (Jacobi).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gblm.errors import UsageError
from gblm.sparse.weights import SparseWeight

# A row is done when its residual, squared in the preconditioner's norm, fell to this share.
CONVERGED = 1e-12


@dataclass(frozen=True)
class Refit:
    """Lower (w − w₀) H (w − w₀)ᵀ per row over the kept weights w; w₀ is the dense row.

    Attributes:
        iterations: of conjugate gradients, at most; as many as a row keeps weights solve it.
        damping: fraction of H's mean diagonal that is added to the diagonal.
    """

    iterations: int = 12
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UsageError(f"iterations {self.iterations!r} must be at least 1.")
        if not 0 <= self.damping <= 1:
            raise UsageError(f"damping {self.damping!r} must be from 0 to 1.")

    @torch.no_grad()
    def apply(
        self, weight: Tensor, pruned: SparseWeight, hessian: Tensor, name: str = ""
    ) -> SparseWeight:
        """Refit one linear.

        Args:
            weight: [out, in] floating point, dense.
            pruned: of the same shape; its mask stays, codes and scales are left out.
            hessian: [in, in] float32, symmetric; not changed.
            name: of the linear, for messages.

        Returns:
            A weight in `weight`'s dtype. No row's error is above that of `pruned`, nor that of
            its dense weights under the mask. Inputs that are always zero get zeros.

        Raises:
            UsageError: the shapes differ.
        """
        if weight.shape != pruned.weight.shape or hessian.shape[0] != weight.shape[1]:
            raise UsageError(f"{name}: weight, pruned weight and Hessian differ in shape.")
        matrix, dead = damped(hessian, self.damping)
        target = torch.where(dead, 0, weight.float())
        given = torch.where(dead, 0, pruned.weight.float())
        start, before = _start(target, given, pruned.mask, matrix)
        mask = pruned.mask.to(torch.float32)
        found = conjugate_gradients(target, start, mask, matrix, self.iterations)
        # What counts is the row as it is stored.
        found = found.to(weight.dtype).float()
        better = (_error(found, target, matrix) <= before).unsqueeze(1)
        return SparseWeight(torch.where(better, found, start).to(weight.dtype), pruned.mask)


def damped(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Copy H, put 1 on its diagonal where that is zero, and then add the damping.

    Args:
        hessian: [in, in] float32.
        damping: fraction of the mean diagonal.

    Returns:
        The copy, and [in] bool, the inputs that are always zero ("dead").
    """
    dead = hessian.diagonal() == 0
    matrix = hessian.clone()
    matrix.diagonal().masked_fill_(dead, 1)
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    return matrix, dead


def conjugate_gradients(
    target: Tensor, start: Tensor, mask: Tensor, hessian: Tensor, iterations: int
) -> Tensor:
    """Go from `start` towards the least (w − target) H (w − target)ᵀ of each row.

    Args:
        target: [out, in] float32.
        start: [out, in] float32, zero outside the mask.
        mask: [out, in] float32, 1 = free to change.
        hessian: [in, in] float32, symmetric, positive on the diagonal.
        iterations: at most; a row that has converged stands still.

    Returns:
        [out, in] float32, zero outside the mask.
    """
    diagonal, found = hessian.diagonal(), start.clone()
    residual = ((target - start) @ hessian).mul_(mask)
    direction = residual / diagonal
    size = (residual * direction).sum(dim=1)
    wanted = size * CONVERGED
    for _ in range(iterations):
        image = (direction @ hessian).mul_(mask)
        curvature = (direction * image).sum(dim=1)
        # A curvature that is not positive: H is indefinite, or rounding is all that is left.
        moves = (size > wanted) & (curvature > 0)
        if not bool(moves.any()):
            break
        step = torch.where(moves, size / curvature, 0).unsqueeze(1)
        found.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual / diagonal
        before, size = size, (residual * scaled).sum(dim=1)
        turn = torch.where(moves, size / before, 0).unsqueeze(1)
        direction = torch.addcmul(scaled, turn, direction)
        # A row that stood still would move again along its residual.
        size = torch.where(moves, size, 0)
    return found


def _start(target: Tensor, given: Tensor, mask: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] and its errors [out]: per row what was given or the dense row under the mask."""
    cut = torch.where(mask, target, 0)
    errors = [_error(one, target, hessian) for one in (given, cut)]
    start = torch.where((errors[1] < errors[0]).unsqueeze(1), cut, given)
    return start, torch.minimum(*errors)


def _error(found: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """(w − w₀) H (w − w₀)ᵀ of each row, [out] float32."""
    error = found - target
    return (error @ hessian).mul_(error).sum(dim=1)
