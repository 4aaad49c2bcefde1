"""ForeignMapper: vLLM's mapper of tensor names, which puts our parts in the place of others'."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from gblm.serve.foreign import Foreign


class ForeignMapper(WeightsMapper):
    """A WeightsMapper through which the stored tensors of a foreign model arrive as ours.

    Mappers are joined with `|`, which keeps the foreign model whichever side it stands on.
    """

    foreign: Foreign

    @classmethod
    def around(cls, mapper: WeightsMapper, foreign: Foreign) -> ForeignMapper:
        """A mapper of the same names."""
        wrapped = cls(**vars(mapper))
        wrapped.foreign = foreign
        return wrapped

    def __or__(self, other: WeightsMapper) -> ForeignMapper:
        """This one's names, then the other's."""
        return self.around(self._plain() | other, self.foreign)

    def __ror__(self, other: WeightsMapper) -> ForeignMapper:
        """The other's names, then this one's."""
        return self.around(other | self._plain(), self.foreign)

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """The names and tensors that the model loads."""
        renamed: Iterable[tuple[str, Tensor]] = self._plain().apply(self.foreign.parts(weights))
        return renamed

    def _plain(self) -> WeightsMapper:
        fields = {name: value for name, value in vars(self).items() if name != "foreign"}
        return WeightsMapper(**fields)
