"""Streaming statistics of a linear's input; accumulated in float32, never stored as activations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Stat(Protocol):
    """One statistic, fed batch by batch."""

    def update(self, inputs: Tensor) -> None:
        """Add a batch of inputs [samples, tokens, in]."""

    def value(self) -> Tensor:
        """The statistic so far, float32."""


class ActNorm:
    """‖X_j‖₂ per input feature: the root of the mean over samples of Σ over tokens x².

    It grows with √tokens, as in Wanda's code; only the order within a row matters there.
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self.mean_square = torch.zeros(())

    def update(self, inputs: Tensor) -> None:
        """Add a batch of inputs [samples, tokens, in]."""
        samples = inputs.shape[0]
        total = self.num_samples + samples
        # float16 norms overflow beyond about 2k tokens, so square in float32.
        columns = inputs.reshape(-1, inputs.shape[-1]).float().t()
        square = torch.linalg.vector_norm(columns, dim=1) ** 2
        self.mean_square = self.mean_square.to(square.device) * (self.num_samples / total)
        self.mean_square = self.mean_square + square / total
        self.num_samples = total

    def value(self) -> Tensor:
        """[in] float32."""
        return self.mean_square.sqrt()


STATS: dict[str, type[Stat]] = {"act_norm": ActNorm}
