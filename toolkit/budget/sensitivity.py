"""What zeros and rounding cost: the predicted rise of the loss, linear by linear, in a cheap pass.

With y = W x, g = ∂L/∂y and H the Hessian of the squared output error, an error E of the weight
costs ½ tr(E A Eᵀ F): A = E[x xᵀ], F = E[g gᵀ], the curvature of K-FAC (Martens and Grosse 2015,
https://arxiv.org/abs/1503.05671), of F the diagonal alone. Methods that let later columns make up
for a column's error e pay e² [U_jj]⁻² instead of e² H_jj (H⁻¹ = Uᵀ U; see gblm.methods.obs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gblm.calibrate.activations import place
from gblm.calibrate.folding import OUTPUT
from gblm.calibrate.gradients import Gradients, num_steps, output_gradients, resident_fits
from gblm.calibrate.walk import DecoderLayer, Walk, walk
from gblm.choices import Choice
from gblm.errors import InputError
from gblm.layers import Layers
from gblm.methods.refit import damped
from gblm.model import hidden_size
from gblm.patterns import NM, Dense, Unstructured
from gblm.progress import Progress, no_progress
from gblm.values import ValueType, quantize

# Sparsities at which a curve is known; between them it is a straight line.
GRID = tuple(round(0.01 * step, 2) for step in range(96))
# Weights of a linear that are looked at: rows at equal distances.
SAMPLED = 1 << 17
# Columns whose weights compete in SparseGPT.
BLOCK = 128
DAMPING = 0.01


@dataclass(frozen=True)
class Judgement:
    """How the pipeline of a recipe chooses and rounds.

    Attributes:
        values: the value types in question, `resolve`d per linear by full name, by kind.
        patterns: further patterns in question, besides unstructured and dense ones.
        makes_up: whether later columns make up for pruned weights.
        rounding: as in Recipe.
    """

    values: Mapping[str, Mapping[str, ValueType]]
    patterns: Sequence[NM]
    makes_up: bool
    rounding: str


@dataclass(frozen=True)
class Curve:
    """The predicted rise of the loss, in nats per token, of one linear.

    Attributes:
        sparse: by kind of values, for each sparsity of GRID; the first is the dense one.
        fixed: by pattern and kind of values.
    """

    sparse: Mapping[str, tuple[float, ...]]
    fixed: Mapping[tuple[str, str], float]

    def loss(self, choice: Choice) -> float:
        """Of a choice whose values and pattern are among those that were judged."""
        kind, pattern = choice.values.kind, choice.pattern
        if isinstance(pattern, Dense):
            return self.sparse[kind][0]
        if not isinstance(pattern, Unstructured):
            return self.fixed[str(pattern), kind]
        known = self.sparse[kind]
        place = pattern.sparsity / GRID[1]
        low = min(int(place), len(GRID) - 2)
        return known[low] + (place - low) * (known[low + 1] - known[low])


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


def curve(
    weight: Tensor,
    outputs: Tensor,
    drop: Tensor,
    rounding: Tensor,
    values: Mapping[str, ValueType],
    judgement: Judgement,
) -> Curve:
    """Judge one linear.

    Args:
        weight: [out, in] floating point.
        outputs: [out], mean over samples of Σ over tokens of (∂L/∂y)².
        drop: [in], what a unit error of a pruned weight costs; see `column_costs`.
        rounding: [in], the same of a rounded one.
        values: the value types by kind, resolved.
        judgement: the rest.
    """
    stride = max(1, weight.numel() // SAMPLED)
    rows, each = weight[::stride].float(), outputs[::stride].float()
    # H is twice a mean over samples of sums over tokens; a half each for it and for the curvature.
    each = 0.25 * each * (outputs.sum() / each.sum().clamp_min(torch.finfo().tiny))
    scores = rows.square() * drop
    dropped, kept = scores * each.unsqueeze(1), {}
    for kind, own in values.items():
        error = _rounding_error(rows, own, rounding, judgement.rounding)
        kept[kind] = error.mul_(rounding).mul_(each.unsqueeze(1))
    fixed = {}
    for pattern in judgement.patterns:
        mask = pattern.keep(scores, "row")
        for kind, error in kept.items():
            fixed[str(pattern), kind] = float(torch.where(mask, error, dropped).sum())
    sparse = _sparse(scores, dropped, kept, BLOCK if judgement.makes_up else 0)
    return Curve(sparse, fixed)


def _sparse(
    scores: Tensor, dropped: Tensor, kept: Mapping[str, Tensor], block: int
) -> dict[str, tuple[float, ...]]:
    """Totals at each sparsity of GRID; weights compete in blocks of columns; 0: in their row."""
    totals = {kind: torch.zeros(len(GRID), dtype=torch.float64) for kind in kept}
    columns = scores.shape[1]
    for start in range(0, columns, block or columns):
        stop = start + (block or columns)

        def competing(matrix: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return matrix[:, start:stop].reshape(1, -1) if block else matrix

        order = competing(scores).argsort(dim=1)
        size = order.shape[1]
        places = torch.tensor([int(share * size) for share in GRID])
        gone = _before(competing(dropped).gather(1, order), places)
        for kind, error in kept.items():
            ordered = competing(error).gather(1, order)
            totals[kind] += gone + float(ordered.double().sum()) - _before(ordered, places)
    return {kind: tuple(total.tolist()) for kind, total in totals.items()}


def _before(ordered: Tensor, places: Tensor) -> Tensor:
    """Sums over all rows of what stands before each place, float64 on the CPU."""
    by_place = ordered.double().sum(dim=0).cumsum(0).cpu()
    return torch.cat([by_place.new_zeros(1), by_place])[places]


def _rounding_error(rows: Tensor, values: ValueType, costs: Tensor, rounding: str) -> Tensor:
    """Squared distances to what is stored, [rows, in]."""
    if values.is_float:
        return torch.zeros_like(rows)
    every = torch.ones_like(rows, dtype=torch.bool)
    if rounding == "nearest":
        return (rows - quantize(rows, every, values).weight).square_()
    rounded = quantize(rows, every, values, rounding="mse", importance=costs)
    return (rows - rounded.weight).square_()


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
