"""walk(): visit the decoder layers in order, each with the statistics of its linears.

The loop body may change the layer's weights; the walk then runs the layer again, so that the next
one sees the activations of the pruned prefix (Wanda, SparseGPT and GBLM all calibrate this way).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gblm.calibrate.stats import STATS, Stat
from gblm.errors import InputError
from gblm.model import decoder_layers, linears


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer on the compute device.

    Attributes:
        index: position in the model.
        name: full name, such as "model.layers.7".
        linears: by local name, such as "self_attn.q_proj".
        stats: the statistics asked for, by local name of the linear.
    """

    index: int
    name: str
    linears: dict[str, nn.Linear]
    stats: dict[str, dict[str, Tensor]]


@torch.no_grad()
def walk(
    model: nn.Module, batches: Sequence[Tensor], needs: frozenset[str]
) -> Iterator[DecoderLayer]:
    """Yield every decoder layer with statistics taken while its weights are still unchanged.

    Args:
        model: a causal language model in eval mode.
        batches: token ids, each [samples, tokens] int64, on any device.
        needs: names in STATS; with none, no forward pass is run at all.

    Raises:
        InputError: an activation is not finite.
    """
    prefix, layers = decoder_layers(model)
    if not needs:
        for index, layer in enumerate(layers):
            found = linears(layer)
            yield DecoderLayer(index, f"{prefix}.{index}", found, {name: {} for name in found})
        return
    hidden, calls = _capture(model, layers, batches)
    for index, layer in enumerate(layers):
        with _observe(layer, needs) as stats:
            for batch, states in enumerate(hidden):
                calls[batch].run(layer, index, states)
        collected = {name: {n: s.value() for n, s in own.items()} for name, own in stats.items()}
        _check_finite(f"{prefix}.{index}", collected)
        yield DecoderLayer(index, f"{prefix}.{index}", linears(layer), collected)
        for batch, states in enumerate(hidden):
            hidden[batch] = calls[batch].run(layer, index, states)


class _Captured(Exception):
    """Stops a forward pass once the first decoder layer has been reached."""


@dataclass(frozen=True)
class _Call:
    """The arguments, other than the hidden states, that each layer gets for one batch shape."""

    args: list[tuple[Any, ...]]
    kwargs: list[dict[str, Any]]

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        out = layer(hidden, *self.args[index], **self.kwargs[index])
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def _capture(
    model: nn.Module, layers: nn.ModuleList, batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[_Call]]:
    """Inputs of the first layer per batch, and what every layer is called with.

    Masks and rotary embeddings are recorded as the model makes them, so no architecture or
    transformers version is written down here. They depend on the batch's shape alone.
    """
    device = next(model.parameters()).device
    calls: dict[torch.Size, _Call] = {}
    hidden: list[Tensor] = []
    for batch in batches:
        if batch.shape not in calls:
            calls[batch.shape] = _record_call(model, layers, batch.to(device))

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.append(args[0] if args else kwargs["hidden_states"])
            raise _Captured

        handle = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model(input_ids=batch.to(device), use_cache=False)
        except _Captured:
            pass
        finally:
            handle.remove()
    return hidden, [calls[batch.shape] for batch in batches]


def _record_call(model: nn.Module, layers: nn.ModuleList, batch: Tensor) -> _Call:
    """Run one batch through the whole model and note each layer's arguments."""
    call = _Call([], [])

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.args.append(args[1:])
        call.kwargs.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return call


@contextmanager
def _observe(layer: nn.Module, needs: frozenset[str]) -> Iterator[dict[str, dict[str, Stat]]]:
    """Collect statistics of every linear's input while the block runs.

    Linears that are handed the very same tensor (q, k, v; gate, up) share one accumulator.
    """
    stats: dict[str, dict[str, Stat]] = {}
    leader_of: dict[str, str] = {}
    seen: dict[str, Tensor] = {}
    handles = []

    def hook(name: str) -> Any:
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            if name not in leader_of:
                same = (other for other, tensor in seen.items() if tensor is inputs)
                leader_of[name] = leader = next(same, name)
                stats[name] = stats.get(leader) or {need: STATS[need]() for need in needs}
            if leader_of[name] == name:
                seen[name] = inputs
                for stat in stats[name].values():
                    stat.update(inputs)

        return observe

    for name, linear in linears(layer).items():
        handles.append(linear.register_forward_pre_hook(hook(name)))
    try:
        yield stats
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(layer: str, stats: dict[str, dict[str, Tensor]]) -> None:
    for name, own in stats.items():
        for stat, value in own.items():
            if not bool(value.isfinite().all()):
                raise InputError(
                    f"{layer}.{name}: the {stat} of its input is not finite. "
                    "Run with --dtype float32, or check the model's weights."
                )
