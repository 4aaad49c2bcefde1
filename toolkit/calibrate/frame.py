"""Frame: a model around its decoder layers - embeddings before them, norm, head and loss behind.

The layers' forward is replaced while the frame runs, so their weights need not be in memory, and no
architecture is written down here: masks and rotary embeddings are what the model itself makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gblm.errors import InputError
from gblm.model.layers import Layers

Stub = Callable[..., Tensor]


@dataclass(frozen=True)
class Call:
    """The arguments, other than the hidden states, that each layer gets for one batch shape."""

    args: list[tuple[Any, ...]]
    kwargs: list[dict[str, Any]]

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run a decoder layer on hidden states [samples, tokens, hidden]."""
        out = layer(hidden, *self.args[index], **self.kwargs[index])
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


@torch.no_grad()
def capture(layers: Layers, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Call]]:
    """Give what reaches the first decoder layer, and what every layer is called with.

    Args:
        layers: with its frame loaded.
        batches: token ids, each [samples, tokens] int64.

    Yields:
        Per batch: hidden states [samples, tokens, hidden] and the call, shared by equal shapes.

    Raises:
        InputError: the layers are not called one after another on the hidden states alone.
    """
    calls: dict[torch.Size, Call] = {}
    for batch in batches:
        seen: list[Tensor] = []
        call = Call([], [])

        def stub(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(hidden)  # noqa: B023 (used up within this turn of the loop)
            call.args.append(args)  # noqa: B023
            call.kwargs.append(kwargs)  # noqa: B023
            return hidden

        with _stubs(layers, stub):
            layers.model.base_model(input_ids=batch.to(layers.device), use_cache=False)
        known = calls.setdefault(batch.shape, call)
        if len(seen) != len(layers) or any(hidden is not seen[0] for hidden in seen):
            raise InputError("the decoder layers are not a plain sequence: unsupported model.")
        if not _same(known.kwargs, call.kwargs) or not _same(known.args, call.args):
            raise InputError("decoder layers get more than hidden states: unsupported model.")
        yield seen[0], known


def loss(layers: Layers, sample: Tensor, hidden: Tensor) -> Tensor:
    """Take the model's own mean next-token cross-entropy, from the last decoder layer's output.

    Args:
        layers: with its frame and head loaded.
        sample: token ids [1, tokens].
        hidden: [1, tokens, hidden], may require a gradient.
    """

    def stub(index: int, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    ids = sample.to(layers.device)
    with _stubs(layers, stub):
        value: Tensor = layers.model(input_ids=ids, labels=ids, use_cache=False).loss
    return value


@torch.no_grad()
def last_hidden(layers: Layers, hidden: Tensor) -> Tensor:
    """Give what enters the output head, from the last decoder layer's output.

    Args:
        layers: with its frame loaded.
        hidden: [samples, tokens, hidden].

    Returns:
        The same shape.
    """

    def stub(index: int, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    with _stubs(layers, stub):
        found: Tensor = layers.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return found


@contextmanager
def _stubs(layers: Layers, stub: Stub) -> Iterator[None]:
    """Replace the decoder layers' forward by `stub(index, hidden_states, …)`."""

    def bind(index: int) -> Stub:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if "hidden_states" in kwargs:
                return stub(index, kwargs.pop("hidden_states"), *args, **kwargs)
            return stub(index, *args, **kwargs)

        return forward

    for index, layer in enumerate(layers.modules):
        layer.forward = bind(index)
    try:
        yield
    finally:
        for layer in layers.modules:
            del layer.forward


def _same(first: Any, second: Any) -> bool:
    """Whether two nests of arguments hold the same tensors."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or torch.equal(first, second)
    if isinstance(first, dict):
        return all(_same(value, second.get(key)) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return True
