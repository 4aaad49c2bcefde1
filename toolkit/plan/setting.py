"""Setting: what a run does with a model's shapes; all that a prediction depends on."""

from __future__ import annotations

from dataclasses import dataclass

from gblm.methods import Method
from gblm.plan.shapes import Shapes


@dataclass(frozen=True)
class Setting:
    """What a run does with the shapes.

    Attributes:
        shapes: of the model and the text.
        method: how weights are judged.
        name: of the method.
        collects: statistics that the run takes on text.
        reads: statistics that another run saved.
        passes: of the text through each layer while pruning.
        sequential: a linear is observed and pruned just before it runs.
        in_memory: whether the inputs of one decoder layer, and those of all, stay in memory.
        resident: gradients are taken with all layers in memory.
        device: "cpu" or "cuda".
    """

    shapes: Shapes
    method: Method
    name: str
    collects: frozenset[str]
    reads: frozenset[str]
    passes: int
    sequential: bool
    in_memory: tuple[bool, bool]
    resident: bool
    device: str

    @property
    def width(self) -> int:
        """Bytes of a value in the computation."""
        return self.shapes.dtype.itemsize
