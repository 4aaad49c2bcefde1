"""Prune a model: the loop over decoder layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from gblm.calibrate.reconstruct import Training, reconstruct
from gblm.calibrate.saved import LayerStats
from gblm.calibrate.walk import DecoderLayer, Walk, walk
from gblm.choices import Choice
from gblm.errors import InputError
from gblm.layers import Layers
from gblm.methods.pipeline import Pipeline
from gblm.values import SCALE_DTYPE
from gblm.weights import SparseWeight

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """One decoder layer after pruning.

    Attributes:
        index: position in the model.
        weights: by full name, in the dtype of the computation; empty on ranks other than 0.
        others: further parameters that have changed, by full name, in the same dtype.
    """

    index: int
    weights: dict[str, SparseWeight]
    others: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Loop:
    """What the loop does with each decoder layer.

    Attributes:
        pipeline: what happens to each linear.
        choices: what each linear is pruned to and rounded to, by full name; others stay dense.
        how: how to walk; `how.needs` are the statistics that the walk itself collects.
        more: further statistics of a layer by index, such as gradient norms.
        restore: fills in the weights of a layer that an earlier run finished.
        save: takes the statistics of each layer, to be used again; None keeps none.
        training: trains each layer once its linears are pruned; `how.keep_dense` goes with it.
    """

    pipeline: Pipeline
    choices: Mapping[str, Choice]
    how: Walk
    more: Callable[[int], LayerStats] = lambda index: {}
    restore: Callable[[DecoderLayer], None] = lambda layer: None
    save: Callable[[int, LayerStats], None] | None = None
    training: Training | None = None


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
        InputError: a weight was never used on the calibration text.
    """
    under_way: dict[int, _Pruning] = {}

    def at_linear(layer: DecoderLayer, local: str) -> None:
        under_way.setdefault(layer.index, _Pruning(layer, loop)).prune(local)

    for layer in walk(layers, batches, replace(loop.how, at_linear=at_linear)):
        pruning = under_way.pop(layer.index, None) or _Pruning(layer, loop)
        if layer.index < loop.how.first:
            pruning.restore()
        else:
            yield pruning.finish()


class _Pruning:
    """One decoder layer that is being pruned, linear by linear."""

    def __init__(self, layer: DecoderLayer, loop: Loop) -> None:
        self._layer, self._loop, self._ranks = layer, loop, loop.how.ranks
        self._chosen = [n for n in layer.linears if f"{layer.name}.{n}" in loop.choices]
        self._weights: dict[str, SparseWeight] = {}
        self._done: set[str] = set()
        self._seen: LayerStats = {}
        self._more: LayerStats | None = None
        self._input: Mapping[str, Tensor] | None = None
        self._prepared: Mapping[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}

    def restore(self) -> None:
        """Take the weights of an earlier run."""
        if self._ranks.leads:
            self._loop.restore(self._layer)
        # Norms and biases, too: they may have been trained.
        for parameter in self._layer.module.parameters():
            self._ranks.broadcast_(parameter.data)

    def finish(self) -> Pruned:
        """Prune what is left of the layer."""
        for local in self._chosen:
            self.prune(local)
        if self._loop.save is not None and self._ranks.leads:
            self._loop.save(self._layer.index, self._seen)
        # This object lives until the next layer has been observed.
        self._prepared, self._more, self._input = {}, None, None
        self._seen, self._whole = {}, {}
        self._layer.stats.clear()
        training, others = self._loop.training, dict[str, Tensor]()
        # A layer that is left dense altogether is left alone.
        if training is not None and self._chosen:
            others = self._train(training)
        if not self._ranks.leads:
            return Pruned(self._layer.index, {})
        # Not in the order of the calls: what is written should not depend on it.
        weights = {f"{self._layer.name}.{n}": self._weights[n] for n in self._chosen}
        return Pruned(self._layer.index, weights, others)

    def prune(self, local: str) -> None:
        """Prune one linear in place, unless it is done or not wanted."""
        if local in self._done or local not in self._chosen:
            return
        self._done.add(local)
        linear = self._layer.linears[local]
        if self._ranks.leads:
            self._weights[local] = self._choose(local, linear)
            linear.weight.copy_(self._weights[local].weight)
        self._ranks.broadcast_(linear.weight.data)

    def _train(self, training: Training) -> dict[str, Tensor]:
        """Train the pruned layer in place; returns what has changed besides its linears."""
        layer = self._layer
        if layer.streams is None:
            raise RuntimeError("training needs a walk that keeps the dense stream.")
        weights = self._weights
        if self._ranks.size > 1:
            weights = {local: self._from_rank_0(local) for local in self._chosen}
        done = reconstruct(layer.module, weights, layer.streams, training, self._ranks, layer.name)
        logger.debug("%s: reconstruction loss %.4g → %.4g", layer.name, *done.loss)
        parameters = dict(layer.module.named_parameters())
        for local, weight in done.weights.items():
            layer.linears[local].weight.copy_(weight.weight)
        for local, tensor in done.others.items():
            parameters[local].copy_(tensor)
        self._weights = done.weights
        return {f"{layer.name}.{local}": tensor for local, tensor in done.others.items()}

    def _from_rank_0(self, local: str) -> SparseWeight:
        """A pruned weight on every rank; `linear.weight` is there already."""
        linear, own = self._layer.linears[local], self._weights.get(local)
        mask = linear.weight != 0 if own is None else own.mask
        self._ranks.broadcast_(mask := mask.to(torch.uint8))
        values = self._loop.choices[f"{self._layer.name}.{local}"].values
        if values.is_float:
            return SparseWeight(linear.weight.detach(), mask.bool())
        groups = linear.in_features // values.group(linear.in_features)
        codes = torch.empty_like(mask, dtype=torch.int8)
        scales = torch.empty(len(mask), groups, device=mask.device)
        if own is not None and own.codes is not None and own.scales is not None:
            codes, scales = own.codes, own.scales.float()
        self._ranks.broadcast_(codes)
        self._ranks.broadcast_(scales)
        scales = scales.to(SCALE_DTYPE)
        return SparseWeight.from_codes(codes, scales, mask.bool(), linear.weight.dtype)

    def _choose(self, local: str, linear: nn.Linear) -> SparseWeight:
        if self._more is None:
            self._more = self._loop.more(self._layer.index)
        more = self._more.get(local, {})
        # Statistics from a file stand alone; linears with the same input share a dict there, too.
        stats = self._layer.stats.pop(local, more)
        name, device = f"{self._layer.name}.{local}", linear.weight.device
        if self._input is not stats:
            self._check(name, stats.keys() | more.keys())
            self._whole = dict(stats) if self._loop.save is not None else {}
            prepared = self._loop.pipeline.prepare(_on(device, stats), name)
            self._input, self._prepared = stats, prepared
            # Half a gigabyte at 11,008 inputs, and used up by `prepare`.
            stats.pop("hessian", None)
        if self._loop.save is not None:
            self._seen[local] = {**self._whole, **more}
        own = {**self._prepared, **_on(device, stats), **_on(device, more)}
        choice = self._loop.choices[name]
        return self._loop.pipeline.prune(linear.weight, own, choice.pattern, choice.values, name)

    def _check(self, name: str, found: Set[str]) -> None:
        if self._loop.pipeline.needs - found:
            raise InputError(
                f"{name} was never used on the calibration text; leave it dense: --ignore."
            )


def _on(device: torch.device, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in stats.items()}
