"""Prune one decoder layer: its linears one by one, then the layer as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gblm.calibrate.reconstruct import Training, reconstruct
from gblm.calibrate.saved import LayerStats
from gblm.calibrate.walk import DecoderLayer
from gblm.errors import InputError
from gblm.prune.job import Job
from gblm.sparse.values import SCALE_DTYPE
from gblm.sparse.weights import SparseWeight

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """A Pruned holds one decoder layer after pruning.

    Attributes:
        weights: by full name, in the dtype of the computation; empty on ranks other than 0.
        others: further parameters that have changed, by full name, in the same dtype.
    """

    weights: dict[str, SparseWeight]
    others: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def prune_layer(
    job: Job,
    layer: DecoderLayer,
    more: Callable[[int], LayerStats] = lambda index: {},
    save: Callable[[int, LayerStats], None] | None = None,
) -> Pruned:
    """Prune one decoder layer in place; every rank calls this, and rank 0 chooses.

    Args:
        job: what to do with each linear and with the layer.
        layer: as the walk gives it.
        more: further statistics of a layer by index, such as gradient norms.
        save: takes the statistics of the layer, to be used again; None keeps none.

    Raises:
        InputError: a weight was never used on the calibration text.
    """
    pruning = _Pruning(job, layer, more, keeps=save is not None)
    layer.visit(pruning.prune)
    if save is not None and job.ranks.leads:
        save(layer.index, pruning.seen)
    weights = pruning.weights
    # Hessians are large, and training needs none.
    del pruning
    chosen, others = _chosen(job, layer), dict[str, Tensor]()
    # A layer that is left dense altogether is left alone.
    if job.training is not None and chosen:
        weights, others = _train(job, layer, job.training, weights)
    if not job.ranks.leads:
        return Pruned({})
    # Not in the order of the calls: what is written should not depend on it.
    return Pruned({f"{layer.name}.{local}": weights[local] for local in chosen}, others)


def _chosen(job: Job, layer: DecoderLayer) -> list[str]:
    """Name the linears to prune, locally."""
    return [local for local in layer.linears if f"{layer.name}.{local}" in job.choices]


class _Pruning:
    """The linears of one decoder layer, and what those with the same input share."""

    def __init__(
        self, job: Job, layer: DecoderLayer, more: Callable[[int], LayerStats], keeps: bool
    ) -> None:
        self.weights: dict[str, SparseWeight] = {}
        self.seen: LayerStats = {}
        self._job, self._layer, self._keeps = job, layer, keeps
        self._read, self._more = more, LayerStats()
        self._input: Mapping[str, Tensor] | None = None
        self._prepared: Mapping[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}

    def prune(self, local: str, stats: dict[str, Tensor] | None) -> None:
        """Prune one linear in place, with the statistics of its input, unless it stays dense."""
        if f"{self._layer.name}.{local}" not in self._job.choices:
            return
        linear = self._layer.linears[local]
        if self._job.ranks.leads:
            self.weights[local] = self._choose(local, linear, stats)
            linear.weight.copy_(self.weights[local].weight)
        self._job.ranks.broadcast_(linear.weight.data)

    def _choose(
        self, local: str, linear: nn.Linear, observed: dict[str, Tensor] | None
    ) -> SparseWeight:
        if not self._more:
            self._more = self._read(self._layer.index)
        more = self._more.get(local, {})
        # Statistics from a file stand alone; linears with the same input share a dict there, too.
        stats = more if observed is None else observed
        name, device = f"{self._layer.name}.{local}", linear.weight.device
        if self._input is not stats:
            self._check(name, stats.keys() | more.keys())
            self._whole = dict(stats) if self._keeps else {}
            prepared = self._job.pipeline.prepare(_on(device, stats), name)
            self._input, self._prepared = stats, prepared
            # Half a gigabyte at 11,008 inputs, and used up by `prepare`.
            stats.pop("hessian", None)
        if self._keeps:
            self.seen[local] = {**self._whole, **more}
        own = {**self._prepared, **_on(device, stats), **_on(device, more)}
        choice = self._job.choices[name]
        return self._job.pipeline.prune(linear.weight, own, choice.pattern, choice.values, name)

    def _check(self, name: str, found: Set[str]) -> None:
        if self._job.pipeline.needs - found:
            raise InputError(
                f"{name} was never used on the calibration text; leave it dense: --ignore."
            )


def _train(
    job: Job, layer: DecoderLayer, training: Training, weights: dict[str, SparseWeight]
) -> tuple[dict[str, SparseWeight], dict[str, Tensor]]:
    """Train the pruned layer in place.

    Returns:
        Its linears by local name, and what else has changed by full name.
    """
    if layer.streams is None:
        raise RuntimeError("training needs a walk that keeps the dense stream.")
    if job.ranks.size > 1:
        weights = {n: _from_rank_0(job, layer, n, weights.get(n)) for n in _chosen(job, layer)}
    done = reconstruct(layer.module, weights, layer.streams, training, job.ranks, layer.name)
    logger.debug("%s: reconstruction loss %.4g → %.4g", layer.name, *done.loss)
    parameters = dict(layer.module.named_parameters())
    for local, weight in done.weights.items():
        layer.linears[local].weight.copy_(weight.weight)
    for local, tensor in done.others.items():
        parameters[local].copy_(tensor)
    return done.weights, {f"{layer.name}.{n}": tensor for n, tensor in done.others.items()}


def _from_rank_0(
    job: Job, layer: DecoderLayer, local: str, own: SparseWeight | None
) -> SparseWeight:
    """Send a pruned weight from rank 0 to every rank; the values in `linear.weight` are there."""
    linear, ranks = layer.linears[local], job.ranks
    mask = linear.weight != 0 if own is None else own.mask
    ranks.broadcast_(mask := mask.to(torch.uint8))
    values = job.choices[f"{layer.name}.{local}"].values
    if values.is_float:
        return SparseWeight(linear.weight.detach(), mask.bool())
    groups = linear.in_features // values.group(linear.in_features)
    codes = torch.empty_like(mask, dtype=torch.int8)
    scales = torch.empty(len(mask), groups, device=mask.device)
    if own is not None and own.codes is not None and own.scales is not None:
        codes, scales = own.codes, own.scales.float()
    ranks.broadcast_(codes)
    ranks.broadcast_(scales)
    scales = scales.to(SCALE_DTYPE)
    return SparseWeight.from_codes(codes, scales, mask.bool(), linear.weight.dtype)


def _on(device: torch.device, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in stats.items()}
