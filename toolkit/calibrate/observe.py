"""Observing linears: hooks that feed their inputs to statistics, joined over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gblm.calibrate.ranks import Ranks
from gblm.calibrate.stats import Stat, accumulators
from gblm.errors import InputError
from gblm.model.linears import linears


class Enough(Exception):
    """Stops a forward pass once every linear has shown its input."""


class Observer:
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
            self.stats[name] = self.stats.get(leader) or accumulators(self._needs)
        if self._leader_of[name] == name:
            self._seen[name] = inputs
            for stat in self.stats[name].values():
                stat.update(inputs)
        if name == self._last:
            raise Enough


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


def join_values(
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
