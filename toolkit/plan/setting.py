"""Setting: what a run does with a model's shapes; all that a prediction depends on."""

from __future__ import annotations

from dataclasses import dataclass

from gblm.calibrate.reconstruct import Training
from gblm.methods import Method
from gblm.methods.pipeline import Pipeline
from gblm.plan.shapes import Shapes


@dataclass(frozen=True)
class Setting:
    """What a run does with the shapes.

    Attributes:
        shapes: of the model and the text.
        pipeline: what happens to each linear.
        training: how decoder layers are trained, if they are.
        name: of the method that is asked, by which its costs are known.
        collects: statistics that the run takes on text.
        reads: statistics that another run saved.
        passes: of the text through each layer while pruning.
        sequential: a linear is observed and pruned just before it runs.
        in_memory: whether the streams at one decoder layer, and the inputs of all, stay in memory.
        resident: gradients are taken with all layers in memory.
        device: "cpu" or "cuda".
    """

    shapes: Shapes
    pipeline: Pipeline
    training: Training | None
    name: str
    collects: frozenset[str]
    reads: frozenset[str]
    passes: int
    sequential: bool
    in_memory: tuple[bool, bool]
    resident: bool
    device: str

    @property
    def method(self) -> Method:
        """How weights are judged."""
        return self.pipeline.method

    @property
    def observes(self) -> bool:
        """Whether linears show their inputs on the way."""
        return bool(self.collects - {"grad_norm"})

    @property
    def walks(self) -> bool:
        """Whether text runs through the layers while they are pruned."""
        return self.observes or self.training is not None

    @property
    def streams(self) -> int:
        """Models whose hidden states are kept: the pruned one, beside the dense one."""
        return 1 if self.training is None else 2

    @property
    def factors(self) -> bool:
        """Whether rounding needs a factor that the method has not made for itself."""
        return self.pipeline.rounding == "obs" and self.name != "sparsegpt"

    @property
    def width(self) -> int:
        """Bytes of a value in the computation."""
        return self.shapes.dtype.itemsize
