"""Disk of a run: the output, and what lies beside it until it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gblm.plan.setting import Setting
from gblm.plan.shapes import Shapes

# Of each tensor in a header, of each linear in the report, of config, card and manifest.
HEADER, REPORT, RECORDS = 100, 700, 4400


@dataclass(frozen=True)
class Disk:
    """Bytes by purpose.

    Attributes:
        output: the packed folder.
        layers: finished decoder layers, kept until the output is complete.
        gradients: norms of the dense model's gradients, kept as long.
        activations: inputs of decoder layers that memory has no room for.
    """

    output: int
    layers: int
    gradients: int
    activations: int

    @property
    def peak(self) -> int:
        """The most that is on disk at once."""
        return self.layers + self.gradients + max(self.output, self.activations)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "output_bytes": self.output,
            "peak_bytes": self.peak,
            "finished_layers_bytes": self.layers,
            "gradient_norms_bytes": self.gradients,
            "activations_bytes": self.activations,
        }


def occupy(setting: Setting) -> Disk:
    """Bytes on disk, from shapes."""
    shapes = setting.shapes
    pruned = [own for layer in shapes.layers for own in layer.pruned]
    layers = sum(own.packed for own in pruned)
    parts = sum(len(choice.fmt.parts) * len(own) for choice, own in shapes.chosen.items())
    heads = 0 if shapes.packed_head is None else 1
    tensors = shapes.tensors + parts - len(pruned) + 2 * heads
    records = REPORT * (len(pruned) + heads) + HEADER * tensors + RECORDS
    exact = shapes.dtype.itemsize if shapes.dtype != shapes.stored_dtype else 0
    if not (setting.pipeline.keeps_values and setting.training is None):
        # Updated values are kept as they were before rounding, for a resumed run.
        layers += _kept_floats(shapes) * exact
    if setting.training is not None:
        trained = sum(layer.others for layer in shapes.layers)
        layers += trained * (shapes.stored_dtype.itemsize + exact)
    gradients = 4 * sum(own.weights for own in pruned) if "grad_norm" in setting.collects else 0
    one, every = setting.in_memory
    inputs = shapes.hidden_states(shapes.samples)
    spilled = 0 if one else setting.streams * inputs
    if gradients and not every:
        spilled = (len(shapes.layers) + 2) * inputs
    return Disk(shapes.output + shapes.side_files + records, layers, gradients, spilled)


def _kept_floats(shapes: Shapes) -> int:
    """Weights that stay and are not rounded to codes."""
    floats = [(c.pattern, own) for c, own in shapes.chosen.items() if c.values.is_float]
    return int(sum((1 - p.sparsity) * sum(x.weights for x in own) for p, own in floats))
