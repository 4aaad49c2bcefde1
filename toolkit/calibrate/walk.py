"""walk(): visit the decoder layers in order, each with the statistics of its linears.

The loop body may change the layer's weights; the walk then runs the layer again, so that the next
one sees the activations of the pruned prefix (Wanda, SparseGPT and GBLM all calibrate this way).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gblm.calibrate.activations import Activations
from gblm.calibrate.frame import Call, capture
from gblm.calibrate.observe import Enough, Observer, before_each_linear, join_values
from gblm.calibrate.stats import Stat, accumulators
from gblm.calibrate.streams import DenseStream, Streams
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
        module: the layer itself.
        streams: its samples, when the walk keeps the dense stream.
    """

    index: int
    name: str
    linears: dict[str, nn.Linear]
    module: nn.Module
    stats: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    streams: Streams | None = None


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
        keep_dense: also run the unchanged model, and give each layer its inputs and the outputs
            that the dense layer would have; costs a pass, and with "sequential" two.
    """

    needs: frozenset[str]
    first: int = 0
    prefix: str = "pruned"
    scratch: Path | None = None
    ranks: Ranks = ALONE
    order: str = "layer"
    at_linear: Callable[[DecoderLayer, str], None] = lambda layer, local: None
    keep_dense: bool = False


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
    if how.needs or how.keep_dense:
        layers.load_frame(head=False)
        for states, call in capture(layers, batches):
            hidden.append(states)
            calls.append(call)
    dense = DenseStream(layers, batches, hidden, how.scratch) if how.keep_dense else None
    for index in range(len(layers)):
        with layers.open(index) as module:
            running = _Running(module, index, hidden, calls, layers.device)
            streams = dense.advance(module, index, calls, hidden) if dense is not None else None
            layer = DecoderLayer(
                index, layers.name(index), linears(module), module, streams=streams
            )
            passed = bool(calls) and _before_changes(running, layer, how)
            yield layer
            if calls and index + 1 < len(layers) and not passed:
                running.propagate()
    hidden.clear()
    if dense is not None:
        dense.clear()


def _before_changes(running: _Running, layer: DecoderLayer, how: Walk) -> bool:
    """Observe a layer; True if the activations have passed through it already."""
    dense = how.prefix == "dense"
    if layer.index < how.first:
        if dense:
            running.propagate()
        return dense
    if not how.needs:
        return False
    if how.order == "sequential":
        _on_the_way(running, layer, how)
        return not how.keep_dense
    # Not kept in a variable here: the loop body drops large statistics early.
    layer.stats.update(join_values(layer.name, running.observe(how.needs, dense), how.ranks))
    return dense


@dataclass(frozen=True)
class _Running:
    """A decoder layer and the activations that are about to pass through it."""

    module: nn.Module
    index: int
    hidden: Activations
    calls: list[Call]
    device: torch.device

    def propagate(self, keep: bool = True) -> None:
        """Run the layer; with `keep` its outputs replace the activations."""
        for batch, call in enumerate(self.calls):
            outputs = call.run(self.module, self.index, self.hidden.get(batch, self.device))
            if keep:
                self.hidden[batch] = outputs

    def observe(self, needs: frozenset[str], keep_outputs: bool) -> dict[str, dict[str, Stat]]:
        """Statistics of every linear's input; with `keep_outputs` also propagate."""
        observer = Observer(set(linears(self.module)), needs)
        with before_each_linear(self.module, observer.see):
            for batch, call in enumerate(self.calls):
                states = self.hidden.get(batch, self.device)
                observer.begin(stop_early=not keep_outputs)
                try:
                    out = call.run(self.module, self.index, states)
                except Enough:
                    continue
                if keep_outputs:
                    self.hidden[batch] = out
        return observer.stats


def _on_the_way(running: _Running, layer: DecoderLayer, how: Walk) -> None:
    """Run a layer once; each linear is shown, with statistics of its input, before it runs."""
    last: list[Tensor] = []
    shared: dict[str, Tensor] = {}

    def see(local: str, inputs: Tensor) -> None:
        nonlocal shared
        if not last or last[0] is not inputs:
            stats = accumulators(how.needs)
            for stat in stats.values():
                stat.update(inputs)
            shared = join_values(layer.name, {local: stats}, how.ranks)[local]
            last[:] = [inputs]
        layer.stats[local] = shared
        how.at_linear(layer, local)

    with before_each_linear(running.module, see):
        # Whoever keeps the dense stream goes on changing the layer, and needs its inputs for that.
        running.propagate(keep=not how.keep_dense)
