"""walk(): visit the decoder layers in order, each with the statistics of its linears.

The loop body may change the layer's weights; the walk then runs the layer again, so that the next
one sees the activations of the pruned prefix (Wanda, SparseGPT and GBLM all calibrate this way).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.calibrate.activations import Activations, place, stream_bytes
from gblm.calibrate.experts import Use, counted, lend, scarce
from gblm.calibrate.frame import Call, capture, last_hidden
from gblm.calibrate.ranks import ALONE, Ranks
from gblm.calibrate.stats import Stat, accumulators, shrink_
from gblm.calibrate.streams import Streams
from gblm.errors import InputError
from gblm.model.experts import expert_linears
from gblm.model.layers import Layers
from gblm.model.linears import linears

See = Callable[[str, dict[str, Tensor] | None], None]


@dataclass(frozen=True)
class Walk:
    """The fields say how to walk.

    Attributes:
        needs: names in STATS; with none, no forward pass is run at all.
        scratch: folder for activations, if memory is short; None keeps them in memory.
        order: "layer": all linears of a decoder layer are observed before any is changed, as the
            papers do, in two passes; "sequential": in one pass, each linear is observed and may be
            changed just before it runs, but for experts: gates and ups take a pass, and downs. All
            samples must be in one batch then.
        keep_dense: also run the unchanged model, and give each layer its inputs and the outputs
            that the dense layer would have; costs a pass, and with "sequential" two.
        runs: run the samples through the layers even if nothing is needed.
        shrinkage: what is taken off the Hessian's correlations, see `stats.shrink_`.
    """

    needs: frozenset[str]
    scratch: Path | None = None
    order: str = "layer"
    keep_dense: bool = False
    runs: bool = False
    shrinkage: float = 0.0


@torch.no_grad()
def walk(
    layers: Layers, batches: Sequence[Tensor], how: Walk, ranks: Ranks = ALONE
) -> Iterator[DecoderLayer]:
    """Yield every decoder layer, to be observed and changed before the next one is asked for.

    Args:
        layers: of a causal language model.
        batches: this rank's token ids, each [samples, tokens] int64, on any device.
        how: see Walk.
        ranks: the processes that share the batches.

    Raises:
        InputError: an activation is not finite.
    """
    scratch = place(how.scratch, stream_bytes(layers, batches) * (2 if how.keep_dense else 1))
    hidden, calls = Activations(scratch), list[Call]()
    if how.needs or how.keep_dense or how.runs:
        layers.load_frame(head=False)
        for states, call in capture(layers, batches):
            hidden.append(states)
            calls.append(call)
    streams = Streams(layers, batches, hidden, scratch) if how.keep_dense else None
    for index in range(len(layers)):
        with layers.open(index) as module:
            samples = _Samples(hidden, calls, [len(batch) for batch in batches])
            layer = DecoderLayer(layers, index, module, samples, how, ranks)
            if streams is not None:
                streams.advance(module, index, calls)
                layer.streams = streams
            yield layer
            if index + 1 < len(layers) and not layer.passed:
                layer.run()
    hidden.clear()
    if streams is not None:
        streams.clear()


@dataclass(frozen=True)
class _Samples:
    """What enters a decoder layer, how it is called, and the number of samples, by batch."""

    hidden: Activations
    calls: list[Call]
    counts: list[int]


class DecoderLayer:
    """One decoder layer on the compute device, whose weights may be changed.

    Attributes:
        index: position in the model.
        name: full name, such as "model.layers.7".
        module: the layer itself.
        linears: by local name, such as "self_attn.q_proj".
        experts: which of them belong to which expert.
        uses: of each expert by this rank's samples, by local name, since the last observation.
        few: experts that few tokens reached, as the first observation found.
        streams: its samples, when the walk keeps the dense stream.
        passed: whether the samples have passed through it already, for good.
    """

    def __init__(
        self,
        layers: Layers,
        index: int,
        module: nn.Module,
        samples: _Samples,
        how: Walk,
        ranks: Ranks,
    ) -> None:
        self.index, self.name, self.module = index, layers.name(index), module
        self.linears = linears(module)
        self.experts = expert_linears(module)
        self.uses: dict[str, Use] = {}
        self.streams: Streams | None = None
        self.passed = not samples.calls
        self._layers, self._samples, self._how, self._ranks = layers, samples, how, ranks
        self.few: set[str] = set()

    @torch.no_grad()
    def visit(self, see: See) -> None:
        """Show every linear once with the statistics of its input, before its weight changes.

        In the order "layer" all of them are observed first. In the order "sequential" each is shown
        just before it runs, so it has seen what `see` made of those before it.

        Args:
            see: called with a local name and statistics by name; linears that are handed the same
                tensor share one dict. None where nothing was asked for, and for a linear that never
                ran.
        """
        if self._how.order == "sequential" and self._how.needs:
            shown = self._show_on_the_way(see)
            stages = [
                {name for name, one in self.experts.items() if one.stage == stage}
                for stage in sorted({one.stage for one in self.experts.values()})
            ]
            rest = [name for name in self.linears if name not in self.experts.keys() | shown]
        else:
            stages, rest = [set(self.linears)], []
        for stage in stages:
            stats = self.observe(stage)
            for local in (name for name in self.linears if name in stage):
                # pop(): whoever sees large statistics may drop them early.
                see(local, stats.pop(local, None))
        for local in rest:
            see(local, None)

    @torch.no_grad()
    def observe(self, only: Collection[str] | None = None) -> dict[str, dict[str, Tensor]]:
        """Run the samples through the layer for the statistics of its linears' inputs.

        Args:
            only: local names of the linears to observe; all if None.

        Returns:
            Statistics by name, by local name of the linear; those that are handed the same tensor
            share one dict. Linears that never ran are left out, but for those of experts.
        """
        if not self._how.needs:
            return {}
        found, first = _Observation(self.module, self._how.needs, only), not self.uses
        with before_each_linear(self.module, found.see), counted(self.module) as self.uses:
            for batch, call in enumerate(self._samples.calls):
                with found.batch(self._samples.counts[batch]):
                    call.run(self.module, self.index, self._states(batch))
        join(found.stats, self._ranks)
        if first:
            self.few = scarce(self.uses, self._ranks, self.name, "statistics")
        found.lend(self.few)
        return values(self.name, found.stats, self._how.shrinkage)

    @torch.no_grad()
    def run(self, keep: bool = True) -> None:
        """Run the layer on its samples; with `keep` its outputs enter the next layer."""
        for batch, call in enumerate(self._samples.calls):
            outputs = call.run(self.module, self.index, self._states(batch))
            if keep:
                self._samples.hidden[batch] = outputs
        self.passed = self.passed or keep

    @torch.no_grad()
    def observe_head(self) -> dict[str, Tensor]:
        """Run this layer, the last, unless it has been, for the statistics of the head's input."""
        if not self.passed:
            self.run()
        stats = accumulators(self._how.needs)
        for batch in range(len(self._samples.calls)):
            for one in self._states(batch).split(1):
                inputs = last_hidden(self._layers, one)
                for stat in stats.values():
                    stat.update(inputs, 1)
        join({"head": stats}, self._ranks)
        return values("the model", {"head": stats}, self._how.shrinkage)["head"]

    def _show_on_the_way(self, see: See) -> set[str]:
        """Run the layer once and show each linear before it runs, but for those of experts.

        Returns:
            Those that ran.
        """
        last: list[Tensor] = []
        shared: dict[str, Tensor] = {}
        shown: set[str] = set()

        def before(local: str, inputs: Tensor) -> None:
            nonlocal shared
            if local in shown or local in self.experts:
                return
            if not last or last[0] is not inputs:
                stats = accumulators(self._how.needs)
                for stat in stats.values():
                    stat.update(inputs, sum(self._samples.counts))
                join({local: stats}, self._ranks)
                shared = values(self.name, {local: stats}, self._how.shrinkage)[local]
                last[:] = [inputs]
            shown.add(local)
            see(local, shared)

        with before_each_linear(self.module, before):
            # Whoever keeps the dense stream goes on changing the layer, and needs its inputs; so
            # do experts, which come later.
            self.run(keep=not (self._how.keep_dense or self.experts))
        return shown

    def _states(self, batch: int) -> Tensor:
        """Give the hidden states [samples, tokens, hidden] that enter the layer."""
        return self._samples.hidden.get(batch, self._layers.device)


class _Observation:
    """The statistics of a layer's linears, while samples run through it.

    A token counts at an expert's linears as much as the router weighs it there, because that is the
    share of the expert's errors that becomes an error of the layer.
    """

    def __init__(
        self, module: nn.Module, needs: frozenset[str], only: Collection[str] | None
    ) -> None:
        self.stats: dict[str, dict[str, Stat]] = {}
        self._module, self._needs, self._only = module, needs, only
        self._leader_of: dict[str, str] = {}
        # What each leader was handed in this batch.
        self._handed: dict[str, Tensor] = {}
        self._num_samples = 0
        found = expert_linears(module).items()
        self._experts = {name: one for name, one in found if only is None or name in only}
        # On every rank in the same order, and also where no token comes.
        for name, one in self._experts.items():
            self._follow(name, one.input)

    def see(self, local: str, inputs: Tensor) -> None:
        """Take the input of a linear that is about to run."""
        if self._only is not None and local not in self._only:
            return
        if local not in self._leader_of:
            same = (other for other, tensor in self._handed.items() if tensor is inputs)
            self._follow(local, next(same, local))
        if self._leader_of[local] == local:
            self._handed[local] = inputs
            self._update(local, inputs)

    @contextmanager
    def batch(self, num_samples: int) -> Iterator[None]:
        """Run so many samples within the block."""
        self._handed.clear()
        self._num_samples = num_samples
        yield
        for name, one in self._experts.items():
            if one.input == name and name not in self._handed:
                weight: Any = self._module.get_parameter(f"{name}.weight")
                self._update(name, weight.new_zeros(0, weight.shape[1]))

    def lend(self, few: set[str]) -> None:
        """Give experts that few tokens reached what all of them have on average."""
        leaders = [name for name, one in self._experts.items() if one.input == name]
        for need in self._needs:
            lend(few, {name: self.stats[name][need].mean for name in leaders}, self._experts)

    def _follow(self, local: str, leader: str) -> None:
        self._leader_of[local] = leader
        self.stats[local] = self.stats.get(leader) or accumulators(self._needs)

    def _update(self, local: str, inputs: Tensor) -> None:
        if local in self._experts and len(inputs):
            expert: Any = self._module.get_submodule(self._experts[local].expert)
            if expert.routing is not None:
                inputs = inputs.float() * expert.routing[:, None]
        for stat in self.stats[local].values():
            stat.update(inputs, self._num_samples)


@contextmanager
def before_each_linear(layer: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see` with the local name and the input of every linear that is about to run."""

    def hook(name: str) -> Any:
        return lambda module, args: see(name, args[0])

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears(layer).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def join(stats: dict[str, dict[str, Stat]], ranks: Ranks) -> None:
    """Join the ranks' statistics, once per shared accumulator."""
    for own in {id(own): own for own in stats.values()}.values():
        for stat in own.values():
            stat.mean, stat.num_samples = ranks.mean(stat.mean, stat.num_samples)


def values(
    layer: str, stats: dict[str, dict[str, Stat]], shrinkage: float = 0.0
) -> dict[str, dict[str, Tensor]]:
    """Read statistics, once per shared accumulator; Hessians are shrunk by `stats.shrink_`."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, own in stats.items():
        if id(own) not in found:
            found[id(own)] = {n: stat.value() for n, stat in own.items()}
            _check_finite(f"{layer}.{name}", found[id(own)])
            if shrinkage and "hessian" in own:
                shrink_(found[id(own)]["hessian"], shrinkage)
    return {name: found[id(own)] for name, own in stats.items()}


def _check_finite(name: str, stats: dict[str, Tensor]) -> None:
    for stat, value in stats.items():
        if not bool(value.isfinite().all()):
            raise InputError(
                f"{name}: the {stat} of its input is not finite. "
                "Run with --dtype float32, or check the model's weights."
            )
