"""Streaming statistics of a linear's input; accumulated in float32, never stored as activations.

Every statistic is a mean over samples, so those of several processes join into one:
Σ_r mean_r · num_samples_r / Σ_r num_samples_r.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# The Hessian is symmetric: strips of its upper triangle take two thirds of a full product's time.
STRIPS = 4


class Stat(Protocol):
    """A Stat gathers one statistic, batch by batch.

    Attributes:
        num_samples: samples seen.
        mean: float32, over samples; of what, the statistic says.
    """

    num_samples: int
    mean: Tensor

    def update(self, inputs: Tensor, num_samples: int) -> None:
        """Add the inputs [..., in] of so many samples; an expert sees only some of their tokens."""

    def value(self) -> Tensor:
        """Give it so far, float32; this may be `mean` itself, so read it before the next batch."""


class ActNorm:
    """The norm ‖X_j‖₂ of an input is the root of the mean over samples of Σ over tokens x².

    It grows with √tokens, as in Wanda's code; only the order within a row matters there.
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self.mean = torch.zeros(())

    def update(self, inputs: Tensor, num_samples: int) -> None:
        """See Stat.update."""
        total = self.num_samples + num_samples
        # float16 norms overflow beyond about 2k tokens, so square in float32.
        columns = inputs.reshape(-1, inputs.shape[-1]).float().t()
        square = torch.linalg.vector_norm(columns, dim=1) ** 2
        self.mean = self.mean.to(square.device) * (self.num_samples / total)
        self.mean = self.mean + square / total
        self.num_samples = total

    def value(self) -> Tensor:
        """Return [in] float32."""
        return self.mean.sqrt()


class Hessian:
    """H is twice the mean over samples of Σ over tokens x xᵀ: second derivatives of the error.

    Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774, eq. 2. `mean` is H itself; what
    lies below its diagonal is filled in by `value`.
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self.mean = torch.zeros(())

    def update(self, inputs: Tensor, num_samples: int) -> None:
        """See Stat.update."""
        tokens = inputs.reshape(-1, inputs.shape[-1]).float()
        if self.num_samples == 0:
            self.mean = tokens.new_zeros(tokens.shape[1], tokens.shape[1])
        total = self.num_samples + num_samples
        for start, stop in self._strips():
            self.mean[start:stop, start:].addmm_(
                tokens[:, start:stop].t(),
                tokens[:, start:],
                beta=self.num_samples / total,
                alpha=2 / total,
            )
        self.num_samples = total

    def value(self) -> Tensor:
        """Return [in, in] float32, symmetric; `mean` itself, since a copy takes 4·in² bytes."""
        for start, stop in self._strips():
            self.mean[stop:, start:stop] = self.mean[start:stop, stop:].t()
        return self.mean

    def _strips(self) -> list[tuple[int, int]]:
        """Give the row ranges whose columns from the diagonal on are computed."""
        size = self.mean.shape[0]
        step = -(-size // STRIPS)
        return [(start, min(start + step, size)) for start in range(0, size, step)]


def shrink_(hessian: Tensor, share: float) -> None:
    """Take this share off the correlations of different inputs, [in, in] float32, in place.

    Samples show correlations that other text does not have, and outlying inputs the most of them;
    what errors of one input cost by themselves stays. Shrinkage of a sample covariance towards its
    diagonal: Schäfer and Strimmer 2005, https://doi.org/10.2202/1544-6115.1175, target D.
    """
    diagonal = hessian.diagonal().clone()
    hessian.mul_(1 - share).diagonal().copy_(diagonal)


STATS: dict[str, type[Stat]] = {"act_norm": ActNorm, "hessian": Hessian}


def accumulators(needs: frozenset[str]) -> dict[str, Stat]:
    """Make new statistics; their order is that of every process, for ranks join them one by one."""
    return {need: STATS[need]() for need in sorted(needs)}
