"""ALPS: mask and weights together, by ADMM on the squared output error.

Meng et al. 2024, https://arxiv.org/abs/2406.07831, algorithm 1: min ‖X(W − W₀)ᵀ‖² over W = D, D on
the pattern. B is the unconstrained copy, D the one on the pattern, V the dual variable:
    B = (W₀ H − V + ρ D) (H + ρ I)⁻¹,   D = projection of B + V/ρ,   V = V + ρ (B − D).
Columns are scaled so that H has a unit diagonal (section 3.4), and one eigendecomposition of H per
input serves every ρ. An unstructured budget is that of the matrix, as in the paper.

Deviations from the published code (https://github.com/mazumder-lab/ALPS): the result starts from
D, not from a projection of B; the decomposition is float32; ρ is lowered, with a restart, while
few weights enter or leave the support at first, but not below 1e-4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gblm.errors import InputError, UsageError
from gblm.methods.base import Method, Stats
from gblm.methods.refit import Refit, damped
from gblm.sparse.patterns import Pattern, Scope
from gblm.sparse.weights import SparseWeight

# The paper's schedule: ρ at first and at most, iterations between two looks at the support.
RHO, MAX_RHO, LOOK = 0.1, 1e6, 3
# ... factors of ρ for the share of the kept weights that entered or left the support since.
LARGE, MEDIUM = (0.1, 1.3), (0.005, 1.2)
SMALL, LOWER, MIN_RHO = 1.1, 1 / 5, 1e-4
# From the 30th iteration on so small a change ends it.
SETTLED, SETTLED_AFTER = 0.0003, 30
# Conjugate gradients at the end.
REFIT = Refit(iterations=10, damping=0.0)


@dataclass(frozen=True)
class ALPS(Method):
    """ADMM until the support stands still, then a few steps of Refit on it.

    Attributes:
        damping: fraction of H's mean diagonal that is added to the diagonal.
        max_iterations: of ADMM.
    """

    scope: ClassVar[Scope] = "matrix"
    about: ClassVar[str] = (
        "ADMM on ‖X (W − W₀)‖², over the whole matrix, then least squares on what stays "
        "(arXiv 2406.07831)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    damping: float = field(
        default=0.01, metadata={"about": "share of H's mean diagonal that is added to it"}
    )
    max_iterations: int = 300

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping {self.damping!r} must be above 0 and at most 1.")
        if self.max_iterations < 1:
            raise UsageError(f"max_iterations {self.max_iterations!r} must be at least 1.")

    def prepare(self, stats: Stats, name: str = "") -> Stats:
        """Damp, scale and decompose H = Q diag(λ) Qᵀ.

        Args:
            stats: "hessian" [in, in] float32, which is not changed.
            name: of the first linear with this input, for messages.

        Returns:
            The statistics without "hessian", with "scaled" [in, in] (H with a unit diagonal),
            "eigenvectors" Q [in, in], "eigenvalues" [in], not negative, "scale" [in], the roots
            of the diagonal, and 0 for "dead" inputs, which are always zero; float32.

        Raises:
            InputError: the decomposition fails.
        """
        matrix, dead = damped(stats["hessian"], self.damping)
        roots = matrix.diagonal().sqrt()
        matrix /= roots.unsqueeze(1)
        matrix /= roots
        try:
            eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise InputError(
                f"{name}: the Hessian has no eigendecomposition ({error}): calibrate on more "
                "text, or use a method without it, such as wanda."
            ) from error
        rest = {name: value for name, value in stats.items() if name != "hessian"}
        own = {"scaled": matrix, "eigenvectors": eigenvectors, "scale": roots.masked_fill_(dead, 0)}
        return rest | own | {"eigenvalues": eigenvalues.clamp_(min=0)}

    @torch.no_grad()
    def prune(self, weight: Tensor, stats: Stats, pattern: Pattern, name: str = "") -> SparseWeight:
        """Prune one linear; the weights that stay change.

        Args:
            weight: [out, in] floating point.
            stats: as `prepare` returns them.
            pattern: which positions may stay; an unstructured budget is the matrix's.
            name: of the linear, for messages.
        """
        scale = stats["scale"]
        dense = weight.float() * scale
        admm = _ADMM(dense, stats, pattern)
        admm.run(self.max_iterations)
        found = REFIT.apply(dense, SparseWeight(admm.sparse, admm.mask), stats["scaled"], name)
        kept = torch.where(scale > 0, found.weight / scale, 0)
        return SparseWeight(kept.to(weight.dtype), admm.mask)


class _ADMM:
    """The iteration for one linear, in scaled columns.

    Attributes:
        sparse: D, [out, in] float32.
        mask: its support as the pattern chose it, [out, in] bool.
        rho: ρ.
    """

    def __init__(self, dense: Tensor, stats: Stats, pattern: Pattern) -> None:
        self._dense, self._pattern = dense, pattern
        self._vectors, self._values = stats["eigenvectors"], stats["eigenvalues"]
        self._image = dense @ stats["scaled"]
        self._set_rho(RHO)
        self._restart()

    def run(self, max_iterations: int) -> None:
        """Iterate until the support stands still."""
        raised, before = False, self.mask
        for count in range(1, max_iterations + 1):
            self._step()
            if count % LOOK:
                continue
            change, before = self._change(before), self.mask
            if (count > SETTLED_AFTER and change < SETTLED) or (raised and change == 0):
                return
            factor = next((f for share, f in (LARGE, MEDIUM) if change > share), SMALL)
            if raised or factor != SMALL:
                raised = True
                self._set_rho(min(self.rho * factor, MAX_RHO))
            elif self.rho > MIN_RHO:
                self._set_rho(self.rho * LOWER)
                self._restart()
                before = self.mask
            else:
                return

    def _restart(self) -> None:
        """Start at the projection of the dense weights."""
        self.dual = torch.zeros_like(self._dense)
        self.mask = self._pattern.keep(self._dense.square(), "matrix")
        self.sparse = torch.where(self.mask, self._dense, 0)

    def _set_rho(self, rho: float) -> None:
        self.rho = rho
        self._inverse = (self._vectors / (self._values + rho)) @ self._vectors.t()

    def _step(self) -> None:
        free = (self._image - self.dual).add_(self.sparse, alpha=self.rho) @ self._inverse
        # V/ρ + B, of which D takes what the pattern keeps and V/ρ the rest.
        total = free.add_(self.dual, alpha=1 / self.rho)
        self.mask = self._pattern.keep(total.square(), "matrix")
        self.sparse = torch.where(self.mask, total, 0)
        self.dual = total.sub_(self.sparse).mul_(self.rho)

    def _change(self, before: Tensor) -> float:
        """Weights that entered or left the support, as a share of those kept."""
        return float((self.mask ^ before).sum() / self.mask.sum().clamp(min=1))
