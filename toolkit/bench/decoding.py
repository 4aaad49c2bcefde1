"""A decode loop on a GPU whose linears are given: what a faster linear is worth in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from gblm.bench.devices import Device
from gblm.bench.linears import Linear
from gblm.sparse.formats import Shape

BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Model:
    """The shape of the model; its context is full of tokens."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    context: int = 512

    @property
    def linears(self) -> list[Shape]:
        """Give the shapes [out, in] of q, k, v in one, o, gate and up in one, down."""
        hidden, inner = self.hidden, self.inner
        return [(3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]


LLAMA_7B = Model()


class Decoder:
    """A LLaMA's layers for a batch of sequences, one token each a step; the head is dense.

    Weights are random. Keys and values of a full context are read, those of the new token are
    written; nothing else depends on a text.
    """

    def __init__(self, device: Device, model: Model, batch: int, linears: Sequence[Linear]) -> None:
        """Fill the context; the linears are the four of `model`, with a copy for each layer."""
        self._model, self._batch = model, batch
        self._layers = [*zip(*(linear.copies for linear in linears), strict=True)]
        keys = device.normal(batch, model.heads, model.context, model.hidden // model.heads)
        self._caches = [(keys.clone(), keys.clone()) for _ in self._layers]
        self._embedded = device.normal(batch, model.hidden)
        self._head = device.normal(model.vocabulary, model.hidden)

    def step(self) -> Tensor:
        """Give the most likely token of each sequence: [batch] int64."""
        hidden, width = self._embedded, (self._model.hidden,)
        for (qkv, o, gate_up, down), (keys, values) in zip(self._layers, self._caches, strict=True):
            normed = functional.rms_norm(hidden, width)
            parts = qkv(normed).reshape(self._batch, 3, self._model.heads, -1)
            query, keys[:, :, -1], values[:, :, -1] = parts.unbind(1)
            seen = functional.scaled_dot_product_attention(query.unsqueeze(2), keys, values)
            hidden = hidden + o(seen.reshape(self._batch, -1))
            gate, up = gate_up(functional.rms_norm(hidden, width)).chunk(2, dim=-1)
            hidden = hidden + down(functional.silu(gate) * up)
        return functional.linear(functional.rms_norm(hidden, width), self._head).argmax(dim=-1)
