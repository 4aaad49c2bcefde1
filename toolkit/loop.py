"""Prune a model: the loop over decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gblm.calibrate.saved import LayerStats
from gblm.calibrate.walk import DecoderLayer, Walk, walk
from gblm.errors import InputError
from gblm.layers import Layers
from gblm.methods import Method
from gblm.patterns import Pattern
from gblm.weights import SparseWeight


@dataclass(frozen=True)
class Pruned:
    """One decoder layer after pruning.

    Attributes:
        index: position in the model.
        weights: by full name, in the dtype of the computation; empty on ranks other than 0.
    """

    index: int
    weights: dict[str, SparseWeight]


def _nothing(layer: DecoderLayer) -> None:
    """A hook that does nothing."""


@dataclass(frozen=True)
class Loop:
    """What the loop does with each decoder layer.

    Attributes:
        method: how weights are judged.
        pattern: which positions may stay.
        names: full names of the linears to prune.
        how: how to walk; `how.needs` are the statistics that the walk itself collects.
        more: further statistics of a layer by index, such as gradient norms.
        restore: fills in the weights of a layer that an earlier run finished.
        observed: called with each layer's statistics before they are used up.
    """

    method: Method
    pattern: Pattern
    names: frozenset[str]
    how: Walk
    more: Callable[[int], LayerStats] = lambda index: {}
    restore: Callable[[DecoderLayer], None] = _nothing
    observed: Callable[[DecoderLayer], None] = _nothing


@torch.no_grad()
def prune_layers(layers: Layers, batches: Sequence[Tensor], loop: Loop) -> Iterator[Pruned]:
    """Prune one decoder layer after another; each sees the activations of the pruned ones before.

    Args:
        layers: the model; open layers are changed in place.
        batches: this rank's calibration token ids, each [samples, tokens].
        loop: see Loop.

    Yields:
        The layers that no earlier run finished.

    Raises:
        InputError: a weight is not finite, or was never used on the calibration text.
    """
    ranks = loop.how.ranks
    for layer in walk(layers, batches, loop.how):
        chosen = {n: m for n, m in layer.linears.items() if f"{layer.name}.{n}" in loop.names}
        weights: dict[str, SparseWeight] = {}
        finished = layer.index < loop.how.first
        if ranks.leads and finished:
            loop.restore(layer)
        elif ranks.leads:
            _join(layer, loop.more(layer.index))
            loop.observed(layer)
            weights = _prune_layer(layer, chosen, loop)
        for linear in chosen.values():
            ranks.broadcast_(linear.weight.data)
        if not finished:
            yield Pruned(layer.index, weights)


def _join(layer: DecoderLayer, more: LayerStats) -> None:
    """Add statistics to those of the walk; linears that share a dict go on sharing it."""
    for local, own in more.items():
        layer.stats[local] = layer.stats[local] | own if local in layer.stats else own


def _prune_layer(
    layer: DecoderLayer, chosen: Mapping[str, nn.Linear], loop: Loop
) -> dict[str, SparseWeight]:
    """Prune the chosen linears in place; statistics are dropped as soon as they are used."""
    _check(layer, chosen, loop.method)
    weights: dict[str, SparseWeight] = {}
    for members in _same_input(layer.stats, chosen):
        inputs = {local: layer.stats.pop(local, {}) for local in members}
        device = chosen[members[0]].weight.device
        prepared = loop.method.prepare(_on(device, inputs[members[0]]))
        for local, own in inputs.items():
            # Half a gigabyte at 11,008 inputs, and used up by `prepare`.
            own.pop("hessian", None)
            name, linear = f"{layer.name}.{local}", chosen[local]
            stats = {**prepared, **_on(device, own)}
            weights[name] = loop.method.prune(linear.weight, stats, loop.pattern)
            linear.weight.copy_(weights[name].weight)
    return {f"{layer.name}.{local}": weights[f"{layer.name}.{local}"] for local in chosen}


def _on(device: torch.device, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in stats.items()}


def _same_input(stats: LayerStats, chosen: Mapping[str, nn.Linear]) -> list[list[str]]:
    """Group linears whose Hessian, the one statistic that is costly to prepare, is the same."""
    groups: dict[int | str, list[str]] = {}
    for local in chosen:
        hessian = stats.get(local, {}).get("hessian")
        groups.setdefault(local if hessian is None else id(hessian), []).append(local)
    return list(groups.values())


def _check(layer: DecoderLayer, chosen: Mapping[str, nn.Linear], method: Method) -> None:
    for local, linear in chosen.items():
        name = f"{layer.name}.{local}"
        if method.needs - layer.stats.get(local, {}).keys():
            raise InputError(
                f"{name} was never used on the calibration text; leave it dense: --ignore."
            )
        if not bool(linear.weight.isfinite().all()):
            raise InputError(f"{name}.weight holds NaN or Inf: the checkpoint is damaged.")
