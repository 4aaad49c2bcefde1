"""What zeros and rounding cost: the predicted rise of the loss, linear by linear, in a cheap pass.

With y = W x, g = ∂L/∂y and H the Hessian of the squared output error, an error E of the weight
costs ½ tr(E A Eᵀ F): A = E[x xᵀ], F = E[g gᵀ], the curvature of K-FAC (Martens and Grosse 2015,
https://arxiv.org/abs/1503.05671), of F the diagonal alone. Methods that let later columns make up
for a column's error e pay e² [U_jj]⁻² instead of e² H_jj (H⁻¹ = Uᵀ U; see gblm.methods.obs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gblm.budget.curves import Curve, Judgement, curve
from gblm.calibrate.activations import place
from gblm.calibrate.folding import OUTPUT
from gblm.calibrate.gradients import Gradients, num_steps, output_gradients, resident_fits
from gblm.calibrate.walk import DecoderLayer, Walk, walk
from gblm.errors import InputError
from gblm.layers import Layers
from gblm.methods.refit import damped
from gblm.model import hidden_size
from gblm.progress import Progress, no_progress

DAMPING = 0.01


@dataclass(frozen=True)
class Sensitivity:
    """What the pass found.

    Attributes:
        curves: by full name of the linear.
        outliers: per decoder layer, the share of weights with an outlying |w| ‖x‖; see gblm.budget.
            owl.
    """

    curves: Mapping[str, Curve]
    outliers: tuple[float, ...]


def measure(
    layers: Layers,
    windows: Tensor,
    judgement: Judgement,
    outlier_factor: float,
    scratch: Path,
    progress: Progress = no_progress,
) -> Sensitivity:
    """Take gradients of the outputs, then Hessians of the inputs, of the unchanged model.

    Args:
        layers: of a causal language model; not changed.
        windows: token ids [samples, tokens].
        judgement: what is judged, of which linears.
        outlier_factor: how many times the layer's mean an outlier is.
        scratch: folder for activations, if memory is short; removed by the caller.
        progress: for a progress bar.

    Raises:
        InputError: a loss, gradient or activation is not finite.
    """
    names = frozenset(judgement.values)
    size = windows.numel() * hidden_size(layers.model) * layers.dtype.itemsize
    resident = _resident(layers, names)
    step = progress("sensitivity", num_steps(layers, len(windows), resident) + len(layers))
    how = Gradients(
        OUTPUT, names, place(scratch, size * (len(layers) + 2)), resident=resident, on_step=step
    )
    outputs: dict[str, Tensor] = {}
    for _, found in output_gradients(layers, list(windows), how):
        outputs |= {name: total / len(windows) for name, total in found.items()}
    curves: dict[str, Curve] = {}
    outliers = []
    way = Walk(needs=frozenset({"hessian"}), prefix="dense", scratch=place(scratch, size))
    for layer in walk(layers, windows.split(1), way):
        outliers.append(_outliers(layer, names, outlier_factor))
        curves |= dict(_curves(layer, outputs, judgement))
        layer.stats.clear()
        step()
    return Sensitivity(curves, tuple(outliers))


def column_costs(hessian: Tensor, makes_up: bool, name: str = "") -> Tensor:
    """What a unit error of a column costs: H_jj, or [U_jj]⁻² if later columns make up for it.

    Args:
        hessian: [in, in] float32.
        makes_up: which of them.
        name: of the linear, for messages.

    Returns:
        [in] float32; 0 for inputs that are always zero.

    Raises:
        InputError: H is not positive definite even with damping 1.
    """
    dead = hessian.diagonal() == 0
    if not makes_up:
        return hessian.diagonal().clone()
    for damping in (DAMPING, 10 * DAMPING, 1.0):
        # H = R Rᵀ with R = U⁻¹ upper triangular: a Cholesky factor, read backwards.
        factor, failed = torch.linalg.cholesky_ex(damped(hessian, damping)[0].flip(0, 1))
        if not int(failed) and bool(factor.diagonal().isfinite().all()):
            costs: Tensor = factor.diagonal().square().flip(0)
            return costs.masked_fill_(dead, 0)
    raise InputError(
        f"{name}: the Hessian is not positive definite even with damping 1: calibrate on more text."
    )


def _curves(
    layer: DecoderLayer, outputs: Mapping[str, Tensor], judgement: Judgement
) -> Iterator[tuple[str, Curve]]:
    """The linears of one decoder layer; those with the same input share its factorisation."""
    known: dict[int, dict[bool, Tensor]] = {}
    for local, linear in layer.linears.items():
        name = f"{layer.name}.{local}"
        if name not in judgement.values:
            continue
        if local not in layer.stats:
            raise InputError(
                f"{name} was never used on the calibration text; leave it dense: --ignore."
            )
        hessian = layer.stats[local]["hessian"]
        costs = known.setdefault(id(hessian), {})
        obs = judgement.rounding == "obs"
        for way in {judgement.makes_up, obs} - costs.keys():
            costs[way] = column_costs(hessian, way, name)
        yield name, curve(
            linear.weight.detach(), outputs[name], costs[judgement.makes_up], costs[obs],
            judgement.values[name], judgement,
        )  # fmt: skip


def _outliers(layer: DecoderLayer, names: frozenset[str], factor: float) -> float:
    """The share of the layer's weights whose |w| ‖x‖ is above so many times the mean."""
    own = [n for n in layer.linears if f"{layer.name}.{n}" in names and n in layer.stats]

    def scores() -> Iterator[Tensor]:
        for local in own:
            norm = layer.stats[local]["hessian"].diagonal().sqrt()
            yield layer.linears[local].weight.detach().float().abs() * norm

    count = sum(layer.linears[local].weight.numel() for local in own)
    bound = factor * sum(float(score.sum()) for score in scores()) / max(count, 1)
    return sum(int((score > bound).sum()) for score in scores()) / max(count, 1)


def _resident(layers: Layers, names: frozenset[str]) -> bool:
    """Whether there is room for all decoder layers at once."""
    model, prefix = layers.model, layers.prefix
    count = sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefix))
    outputs = sum(model.get_submodule(name).out_features for name in names)
    return resident_fits(count, outputs, layers.dtype, layers.device)
