"""Streams: what enters a decoder layer of the pruned model, and what should leave it.

Both models run side by side: the pruned one layer by layer, the dense one a layer ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.calibrate.activations import Activations
from gblm.calibrate.frame import Call, capture
from gblm.model.layers import Layers


@dataclass(frozen=True)
class Streams:
    """The samples at one decoder layer; all have the same number of tokens.

    Attributes:
        index: of the decoder layer.
        inputs: hidden states that the pruned layers before it make, by batch.
        targets: the dense layer's outputs on the dense layers' hidden states, by batch.
        sizes: samples per batch.
        device: where the layer computes.
        call_for: how the layer is called with so many samples.
    """

    index: int
    inputs: Activations
    targets: Activations
    sizes: tuple[int, ...]
    device: torch.device
    call_for: Callable[[int], Call]

    @property
    def num_samples(self) -> int:
        """The number of samples of this rank."""
        return sum(self.sizes)

    def batch(self, picks: list[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of some samples, each [samples, tokens, hidden]."""
        inputs, targets = zip(*(self._sample(pick) for pick in picks), strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def run(self, layer: Any, inputs: Tensor) -> Tensor:
        """Return the outputs of a decoder layer, [samples, tokens, hidden]."""
        return self.call_for(inputs.shape[0]).run(layer, self.index, inputs)

    def _sample(self, pick: int) -> tuple[Tensor, Tensor]:
        """Return input and target of one sample, [1, tokens, hidden] each."""
        for batch, size in enumerate(self.sizes):
            if pick < size:
                inputs, targets = self.inputs, self.targets
                return (
                    inputs.sample(batch, pick, self.device),
                    targets.sample(batch, pick, self.device),
                )
            pick -= size
        raise IndexError(f"sample {pick} of {self.num_samples}.")


class DenseStream:
    """The stream holds hidden states of the unchanged model, beside those of the pruned one."""

    def __init__(
        self,
        layers: Layers,
        batches: Sequence[Tensor],
        hidden: Activations,
        scratch: Path | None = None,
    ) -> None:
        """Start at the inputs of the first decoder layer.

        Args:
            layers: the model, with its frame loaded.
            batches: token ids, each [samples, tokens].
            hidden: those inputs, by batch.
            scratch: folder for activations; None keeps them in memory.
        """
        self._layers, self._batches = layers, batches
        self._states = Activations(scratch and scratch / "dense")
        self._calls: dict[int, Call] = {}
        for batch in range(len(batches)):
            self._states.append(hidden.get(batch, layers.device))

    def advance(
        self, module: nn.Module, index: int, calls: Sequence[Call], hidden: Activations
    ) -> Streams:
        """Run a layer whose weights are still unchanged.

        Args:
            module: the decoder layer.
            index: its position.
            calls: how it is called, by batch.
            hidden: what enters the layer in the pruned model, by batch.
        """
        device, states = self._layers.device, self._states
        for batch, call in enumerate(calls):
            states[batch] = call.run(module, index, states.get(batch, device))
        sizes = tuple(len(batch) for batch in self._batches)
        return Streams(index, hidden, states, sizes, device, self._call_for)

    def clear(self) -> None:
        """Forget the hidden states."""
        self._states.clear()

    def _call_for(self, size: int) -> Call:
        # Masks and positions may be made for a number of samples, so ask the model again.
        if size not in self._calls:
            ids = self._batches[0][:1].expand(size, -1)
            self._calls[size] = next(capture(self._layers, [ids]))[1]
        return self._calls[size]
