"""Streams: what enters a decoder layer of the pruned model, and what should leave it.

Both models run side by side: the pruned one layer by layer, the dense one a layer ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.calibrate.activations import Activations
from gblm.calibrate.frame import Call, capture
from gblm.model.layers import Layers


class Streams:
    """The samples at one decoder layer after another; all have the same number of tokens.

    Attributes:
        inputs: hidden states that the pruned layers before it make, by batch.
        targets: the dense layer's outputs on the dense layers' hidden states, by batch.
    """

    def __init__(
        self,
        layers: Layers,
        batches: Sequence[Tensor],
        inputs: Activations,
        scratch: Path | None = None,
    ) -> None:
        """Start at the inputs of the first decoder layer.

        Args:
            layers: the model, with its frame loaded.
            batches: token ids, each [samples, tokens].
            inputs: those inputs, by batch; whoever prunes keeps them up to date.
            scratch: folder for activations; None keeps them in memory.
        """
        self.inputs, self.targets = inputs, Activations(scratch and scratch / "dense")
        self._layers, self._batches, self._index = layers, batches, 0
        self._calls: dict[int, Call] = {}
        for batch in range(len(batches)):
            self.targets.append(inputs.get(batch, layers.device))

    @property
    def num_samples(self) -> int:
        """Count the samples of this rank."""
        return sum(map(len, self._batches))

    def advance(self, module: nn.Module, index: int, calls: Sequence[Call]) -> None:
        """Go on to a decoder layer, whose weights are still unchanged, and run it for the targets.

        Args:
            module: the decoder layer.
            index: its position.
            calls: how it is called, by batch.
        """
        self._index = index
        for batch, call in enumerate(calls):
            states = self.targets.get(batch, self._layers.device)
            self.targets[batch] = call.run(module, index, states)

    def batch(self, picks: list[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of some samples, each [samples, tokens, hidden]."""
        inputs, targets = zip(*(self._sample(pick) for pick in picks), strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def run(self, layer: Any, inputs: Tensor) -> Tensor:
        """Return the outputs of a decoder layer, [samples, tokens, hidden]."""
        size = len(inputs)
        # Masks and positions may be made for a number of samples, so ask the model again.
        if size not in self._calls:
            ids = self._batches[0][:1].expand(size, -1)
            self._calls[size] = next(capture(self._layers, [ids]))[1]
        return self._calls[size].run(layer, self._index, inputs)

    def clear(self) -> None:
        """Forget the dense model's hidden states."""
        self.targets.clear()

    def _sample(self, pick: int) -> tuple[Tensor, Tensor]:
        """Return input and target of one sample, [1, tokens, hidden] each."""
        for batch, ids in enumerate(self._batches):
            if pick < len(ids):
                device = self._layers.device
                return (
                    self.inputs.sample(batch, pick, device),
                    self.targets.sample(batch, pick, device),
                )
            pick -= len(ids)
        raise IndexError(f"sample {pick} of {self.num_samples}.")
