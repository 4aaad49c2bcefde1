"""Method: turns a dense weight, its statistics and a pattern into a SparseWeight.

A method sees one linear at a time and knows nothing of models, files or devices. Its class carries
every fact of it: what it does, in words, which statistics it reads, and its hyper-parameters, which
are dataclass fields. Recipe keys follow from the fields, and flags of the command line from those
whose metadata has an "about" for the help.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from gblm.sparse.patterns import Pattern, Scope
from gblm.sparse.values import ValueType
from gblm.sparse.weights import SparseWeight

# Statistics of one linear by name, float32: "act_norm" [in], "hessian" [in, in], "grad_norm"
# [out, in] with the "num_samples" [] that it sums over.
Stats = Mapping[str, Tensor]


class Method(ABC):
    """A method prunes one linear at a time, without training."""

    about: ClassVar[str]
    """What it does, in the words of the table in docs/methods.md."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Names of the statistics it reads."""

    scope: ClassVar[Scope] = "row"
    """Who competes for the budget of an unstructured pattern."""

    def prepare(self, stats: Stats, name: str = "") -> Stats:
        """Derive what several linears with the same input share; called once per input.

        Returns:
            What `prune` reads; by default the statistics as they are.
        """
        return stats

    @abstractmethod
    def prune(self, weight: Tensor, stats: Stats, pattern: Pattern, name: str = "") -> SparseWeight:
        """Prune one linear.

        Args:
            weight: [out, in] floating point.
            stats: what `prepare` returned.
            pattern: which positions may stay.
            name: of the linear, for messages.
        """

    def prune_quantized(
        self, weight: Tensor, stats: Stats, pattern: Pattern, values: ValueType, name: str = ""
    ) -> SparseWeight | None:
        """Prune one linear and round it to codes in one go.

        Args:
            weight: [out, in] floating point.
            stats: what `prepare` returned.
            pattern: which positions may stay.
            values: a kind with codes, `resolve`d for `in`.
            name: of the linear, for messages.

        Returns:
            None where the method only prunes; what stays is then rounded afterwards.
        """
        return None


class ScoredMethod(Method):
    """A method that scores every weight once and cuts once; kept values do not change."""

    @abstractmethod
    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """Score each weight: [out, in] floating point, larger = more important."""

    def prune(self, weight: Tensor, stats: Stats, pattern: Pattern, name: str = "") -> SparseWeight:
        """Keep the highest scores."""
        return SparseWeight.cut(weight, pattern.keep(self.score(weight, stats), self.scope))
