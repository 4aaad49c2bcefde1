"""Needs: the memory and disk that a recovery takes, told and refused before it starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import psutil
import torch

from gblm.errors import MachineError
from gblm.recipe import Recovering

logger = logging.getLogger(__name__)
HELD_OUT_WINDOWS = 16
# What a training step of one token holds, in activations of the width of the model: those that
# autograd keeps of a decoder layer.
KEPT_PER_LAYER = 16
# A group of codes has at least so many columns, and one scale.
GROUP = 32


@dataclass(frozen=True)
class Extent:
    """How large a pruned model is.

    Attributes:
        config: of the text model, as transformers reads it.
        shapes: [out, in] of the linears that are trained.
        kept: weights that stay, of all of them.
        num_weights: of the dense model, all of them.
        dtype: of the computation.
    """

    config: Any
    shapes: Sequence[tuple[int, ...]]
    kept: int
    num_weights: int
    dtype: torch.dtype

    def memory(self, how: Recovering) -> int:
        """Bound the bytes of memory: the model, parts with two moments, activations."""
        width, layers = int(self.config.hidden_size), int(self.config.num_hidden_layers)
        sizes = [prod(shape) for shape in self.shapes]
        # Beside a part lie the places of its values and its codes, or the weight that it scales.
        # One weight at a time is scattered and has a gradient.
        beside = 5 * sum(sizes) if how.train == "scales" else 4 * self.kept + sum(sizes)
        each = KEPT_PER_LAYER * self.dtype.itemsize
        activations = how.batch_size * how.seq_len * width * layers * each + (1 << 28)
        return self.num_bytes + self.state(how) + beside + 16 * max(sizes) + activations

    def disk(self, how: Recovering) -> int:
        """Bound the bytes on disk: the teacher's hidden states, two saved states, the folder."""
        held_out = HELD_OUT_WINDOWS * len(how.held_out) * how.seq_len
        teacher = 4 * (how.tokens + held_out) * int(self.config.hidden_size)
        return teacher + 2 * self.state(how) + self.num_bytes

    @property
    def num_bytes(self) -> int:
        """Count the bytes of the dense model in memory."""
        return self.num_weights * self.dtype.itemsize

    def state(self, how: Recovering) -> int:
        """Bound the bytes of what is trained: a float32 value and two moments each."""
        scales = sum(map(prod, self.shapes)) // GROUP
        return 12 * (scales if how.train == "scales" else scales + self.kept)


def settle(how: Recovering, extent: Extent, device: str) -> Recovering:
    """Decide what is trained, where that was left open, and refuse what memory cannot hold.

    All weights are trained where the machine could hold that, else scales alone.

    Raises:
        MachineError: not enough memory is free.
    """
    memory = psutil.virtual_memory()
    if how.train == "auto":
        fits = device != "cpu" or extent.memory(how) < memory.total
        how = how.model_copy(update={"train": "weights" if fits else "scales"})
    need, disk = extent.memory(how), extent.disk(how)
    logger.info(
        "recovery of %s on %d tokens needs up to %.1f GB of memory and %.1f GB of disk",
        how.train, how.tokens, need / 1e9, disk / 1e9,
    )  # fmt: skip
    if device == "cpu" and need > memory.available:
        raise MachineError(
            f"recovery needs about {need / 1e9:.1f} GB of memory, and "
            f"{memory.available / 1e9:.1f} GB are free: train scales alone, or take a smaller "
            "batch or shorter windows."
        )
    return how
