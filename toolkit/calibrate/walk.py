"""walk(): visit the decoder layers in order, each with the statistics of its linears.

The loop body may change the layer's weights; the walk then runs the layer again, so that the next
one sees the activations of the pruned prefix (Wanda, SparseGPT and GBLM all calibrate this way).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.calibrate.activations import Activations
from gblm.calibrate.frame import Call, capture
from gblm.calibrate.stats import STATS, Stat
from gblm.errors import InputError
from gblm.layers import Layers
from gblm.model import linears
from gblm.ranks import ALONE, Ranks


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer on the compute device.

    Attributes:
        index: position in the model.
        name: full name, such as "model.layers.7".
        linears: by local name, such as "self_attn.q_proj".
        stats: the statistics asked for, by local name of the linear; linears with the same input
            share one dict. Empty for layers that were not observed.
    """

    index: int
    name: str
    linears: dict[str, nn.Linear]
    stats: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Walk:
    """How to walk.

    Attributes:
        needs: names in STATS; with none, no forward pass is run at all.
        first: the layers before it are changed and run, but not observed (they are finished).
        prefix: "pruned": a layer sees the activations of the changed layers before it, as the
            papers do; "dense": those of the unchanged model, which saves one pass of two.
        scratch: folder for activations; None keeps them in memory.
        ranks: the processes that share the batches.
        order: "layer": all linears of a decoder layer are observed before any is changed, as the
            papers do, in two passes; "sequential": in one pass, each linear is observed and may be
            changed just before it runs. All samples must be in one batch then.
        at_linear: called in the sequential order with the layer and the local name of the linear
            that is about to run; its statistics are in the layer's.
    """

    needs: frozenset[str]
    first: int = 0
    prefix: str = "pruned"
    scratch: Path | None = None
    ranks: Ranks = ALONE
    order: str = "layer"
    at_linear: Callable[[DecoderLayer, str], None] = lambda layer, local: None


@torch.no_grad()
def walk(layers: Layers, batches: Sequence[Tensor], how: Walk) -> Iterator[DecoderLayer]:
    """Yield every decoder layer with statistics taken while its weights are still unchanged.

    Args:
        layers: of a causal language model.
        batches: this rank's token ids, each [samples, tokens] int64, on any device.
        how: see Walk.

    Raises:
        InputError: an activation is not finite.
    """
    hidden, calls = Activations(how.scratch), []
    if how.needs:
        layers.load_frame(head=False)
        for states, call in capture(layers, batches):
            hidden.append(states)
            calls.append(call)
    for index in range(len(layers)):
        with layers.open(index) as module:
            running = _Running(module, index, hidden, calls, layers.device)
            layer = DecoderLayer(index, layers.name(index), linears(module))
            passed = bool(how.needs) and _before_changes(running, layer, how)
            yield layer
            if how.needs and index + 1 < len(layers) and not passed:
                running.propagate()
    hidden.clear()


def _before_changes(running: _Running, layer: DecoderLayer, how: Walk) -> bool:
    """Observe a layer; True if the activations have passed through it already."""
    dense = how.prefix == "dense"
    if layer.index < how.first:
        if dense:
            running.propagate()
        return dense
    if how.order == "sequential":
        _on_the_way(running, layer, how)
        return True
    # Not kept in a variable here: the loop body drops large statistics early.
    layer.stats.update(_values(layer.name, running.observe(how.needs, dense), how.ranks))
    return dense


@dataclass(frozen=True)
class _Running:
    """A decoder layer and the activations that are about to pass through it."""

    module: nn.Module
    index: int
    hidden: Activations
    calls: list[Call]
    device: torch.device

    def propagate(self) -> None:
        """Replace the activations by the layer's outputs."""
        for batch, call in enumerate(self.calls):
            states = self.hidden.get(batch, self.device)
            self.hidden[batch] = call.run(self.module, self.index, states)

    def observe(self, needs: frozenset[str], keep_outputs: bool) -> dict[str, dict[str, Stat]]:
        """Statistics of every linear's input; with `keep_outputs` also propagate."""
        observer = _Observer(set(linears(self.module)), needs)
        with _before_each_linear(self.module, observer.see):
            for batch, call in enumerate(self.calls):
                states = self.hidden.get(batch, self.device)
                observer.begin(stop_early=not keep_outputs)
                try:
                    out = call.run(self.module, self.index, states)
                except _Enough:
                    continue
                if keep_outputs:
                    self.hidden[batch] = out
        return observer.stats


class _Enough(Exception):
    """Stops a forward pass once every linear has shown its input."""


class _Observer:
    """Feeds the inputs of linears to statistics.

    Linears that are handed the very same tensor (q, k, v; gate, up) share one accumulator.
    """

    def __init__(self, names: set[str], needs: frozenset[str]) -> None:
        self.stats: dict[str, dict[str, Stat]] = {}
        self._names, self._needs = names, needs
        self._leader_of: dict[str, str] = {}
        self._seen: dict[str, Tensor] = {}
        self._order: list[str] = []
        self._last: str | None = None

    def begin(self, stop_early: bool) -> None:
        """Start a batch; from the second one on the last linear need not be computed."""
        # Only when each linear ran exactly once: conditional layers may differ between batches.
        once = len(self._order) == len(self._names) and set(self._order) == self._names
        self._last = self._order[-1] if stop_early and once else None
        self._order, self._seen = [], {}

    def see(self, name: str, inputs: Tensor) -> None:
        """Take the input of a linear."""
        self._order.append(name)
        if name not in self._leader_of:
            same = (other for other, tensor in self._seen.items() if tensor is inputs)
            self._leader_of[name] = leader = next(same, name)
            self.stats[name] = self.stats.get(leader) or {n: STATS[n]() for n in self._needs}
        if self._leader_of[name] == name:
            self._seen[name] = inputs
            for stat in self.stats[name].values():
                stat.update(inputs)
        if name == self._last:
            raise _Enough


def _on_the_way(running: _Running, layer: DecoderLayer, how: Walk) -> None:
    """Run a layer once; each linear is shown, with statistics of its input, before it runs."""
    last: list[Tensor] = []
    shared: dict[str, Tensor] = {}

    def see(local: str, inputs: Tensor) -> None:
        nonlocal shared
        if not last or last[0] is not inputs:
            stats = {need: STATS[need]() for need in how.needs}
            for stat in stats.values():
                stat.update(inputs)
            shared = _values(layer.name, {local: stats}, how.ranks)[local]
            last[:] = [inputs]
        layer.stats[local] = shared
        how.at_linear(layer, local)

    with _before_each_linear(running.module, see):
        running.propagate()


@contextmanager
def _before_each_linear(layer: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see` with the local name and the input of every linear that is about to run."""

    def hook(name: str) -> Any:
        return lambda module, args: see(name, args[0])

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears(layer).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _values(
    layer: str, stats: dict[str, dict[str, Stat]], ranks: Ranks
) -> dict[str, dict[str, Tensor]]:
    """Join the ranks' statistics and read them, once per shared accumulator."""
    values: dict[int, dict[str, Tensor]] = {}
    for name, own in stats.items():
        if id(own) in values:
            continue
        for stat in own.values():
            stat.mean, stat.num_samples = ranks.mean(stat.mean, stat.num_samples)
        values[id(own)] = {n: stat.value() for n, stat in own.items()}
        _check_finite(f"{layer}.{name}", values[id(own)])
    return {name: values[id(own)] for name, own in stats.items()}


def _check_finite(name: str, stats: dict[str, Tensor]) -> None:
    for stat, value in stats.items():
        if not bool(value.isfinite().all()):
            raise InputError(
                f"{name}: the {stat} of its input is not finite. "
                "Run with --dtype float32, or check the model's weights."
            )
