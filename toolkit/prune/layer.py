"""Prune one decoder layer: its linears one by one, then the layer as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from gblm.calibrate.reconstruct import reconstruct
from gblm.calibrate.walk import DecoderLayer
from gblm.checkpoint.head import Head
from gblm.errors import InputError
from gblm.prune.job import Job
from gblm.recipe import Reconstruction
from gblm.sparse.patterns import Dense
from gblm.sparse.values import SCALE_DTYPE
from gblm.sparse.weights import SparseWeight

logger = logging.getLogger(__name__)
# Statistics by name, by local name of the linear.
LayerStats = Mapping[str, Mapping[str, Tensor]]


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
    job: Job, layer: DecoderLayer, gradients: Callable[[int], LayerStats] = lambda index: {}
) -> Pruned:
    """Prune one decoder layer in place; every rank calls this, and rank 0 chooses.

    Args:
        job: what to do with each linear and with the layer.
        layer: as the walk gives it.
        gradients: statistics of a layer by index that the walk does not give.

    Raises:
        InputError: a weight was never used on the calibration text.
    """
    chosen = [local for local in layer.linears if f"{layer.name}.{local}" in job.formats]
    pruning = _Pruning(job, layer, gradients(layer.index) if job.ranks.leads and chosen else {})
    layer.visit(pruning.prune)
    weights = pruning.weights
    # Hessians are large, and training needs none.
    del pruning
    others = dict[str, Tensor]()
    # A layer that is left dense altogether is left alone.
    if job.recipe.reconstruct is not None and chosen:
        if job.ranks.size > 1:
            weights = {name: _from_rank_0(job, layer, name, weights.get(name)) for name in chosen}
        weights, others = _train(job, layer, job.recipe.reconstruct, weights)
    if not job.ranks.leads:
        return Pruned({})
    # Not in the order of the calls: what is written should not depend on it.
    return Pruned({f"{layer.name}.{local}": weights[local] for local in chosen}, others)


@torch.no_grad()
def round_head(job: Job, last: DecoderLayer) -> Head:
    """Choose how to round the head, by what enters it; every rank calls this, rank 0 chooses."""
    head, stats = cast(Head, job.head), last.observe_head()
    if not job.ranks.leads:
        return head
    rounding = partial(
        job.pipeline.prune,
        stats=job.pipeline.prepare(_on(job.layers.device, stats), head.name, dense=True),
        pattern=Dense(), values=head.fmt.values, name=head.name,
    )  # fmt: skip
    return replace(head, rounding=rounding)


class _Pruning:
    """The linears of one decoder layer, and what those with the same input share."""

    def __init__(self, job: Job, layer: DecoderLayer, gradients: LayerStats) -> None:
        self.weights: dict[str, SparseWeight] = {}
        self._job, self._layer, self._gradients = job, layer, gradients
        self._input: Mapping[str, Tensor] | None = None
        self._prepared: Mapping[str, Tensor] = {}

    def prune(self, local: str, stats: dict[str, Tensor] | None) -> None:
        """Prune one linear in place, with the statistics of its input, unless it stays dense."""
        job, name, linear = self._job, f"{self._layer.name}.{local}", self._layer.linears[local]
        if name not in job.formats:
            return
        if job.ranks.leads:
            own = self._prepare(local, linear.weight.device, {} if stats is None else stats)
            fmt = job.formats[name]
            weight = job.pipeline.prune(linear.weight, own, fmt.pattern, fmt.values, name)
            linear.weight.copy_(weight.weight)
            if weight.weight.dtype == linear.weight.dtype:
                # Experts of a layer can be gigabytes: not twice.
                weight = replace(weight, weight=linear.weight.data)
            self.weights[local] = weight
        job.ranks.broadcast_(linear.weight.data)

    def _prepare(
        self, local: str, device: torch.device, stats: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return all statistics of a linear; what follows from its input is derived once."""
        name, gradients = f"{self._layer.name}.{local}", self._gradients.get(local, {})
        if self._input is not stats:
            if self._job.pipeline.needs - (stats.keys() | gradients.keys()):
                raise InputError(
                    f"{name} was never used on the calibration text; leave it dense: --ignore."
                )
            # Linears with the same input are one in a server, and all of them dense or none.
            dense = isinstance(self._job.formats[name].pattern, Dense)
            prepared = self._job.pipeline.prepare(_on(device, stats), name, dense)
            self._input, self._prepared = stats, prepared
            # Half a gigabyte at 11,008 inputs, and used up by `prepare`.
            stats.pop("hessian", None)
        return {**self._prepared, **_on(device, stats), **_on(device, gradients)}


def _train(
    job: Job, layer: DecoderLayer, how: Reconstruction, weights: dict[str, SparseWeight]
) -> tuple[dict[str, SparseWeight], dict[str, Tensor]]:
    """Train the pruned layer in place.

    Returns:
        Its linears by local name, and what else has changed by full name.
    """
    if layer.streams is None:
        raise RuntimeError("training needs a walk that keeps the dense stream.")
    done = reconstruct(layer.module, weights, layer.streams, how, job.ranks, layer.name)
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
    values = job.formats[f"{layer.name}.{local}"].values
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
