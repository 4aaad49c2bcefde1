"""What zeros and rounding cost: the predicted rise of the loss, linear by linear, in a cheap pass.

With y = W x, g = ∂L/∂y and H the Hessian of the squared output error, an error E of the weight
costs ½ tr(E A Eᵀ F): A = E[x xᵀ], F = E[g gᵀ], the curvature of K-FAC (Martens and Grosse 2015,
https://arxiv.org/abs/1503.05671), of F the diagonal alone. Methods that let later columns make up
for a column's error e pay e² [U_jj]⁻² instead of e² H_jj (H⁻¹ = Uᵀ U; see gblm.methods.obs).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gblm.calibrate.gradients import OUTPUT, gradient_norms
from gblm.calibrate.walk import DecoderLayer, Walk, walk
from gblm.errors import InputError
from gblm.methods.refit import damped
from gblm.model.layers import Layers
from gblm.progress import Progress, no_progress
from gblm.sparse.formats import Format
from gblm.sparse.patterns import NM, Dense, Unstructured
from gblm.sparse.values import ValueType, quantize

logger = logging.getLogger(__name__)
DAMPING = 0.01
# Sparsities at which a curve is known; between them it is a straight line.
GRID = tuple(round(0.01 * step, 2) for step in range(96))
# Weights of a linear that are looked at: rows at equal distances.
SAMPLED = 1 << 17
# Columns whose weights compete in SparseGPT.
BLOCK = 128
# Off the correlations of inputs: so little text overstates what other columns make up for.
SHRINKAGE = 0.33
# Shares of the formula that a model loses, by zeros and by codes; fitted to pruned SmolLM2-135M.
OF_ZEROS, OF_CODES = 0.51, 0.31


@dataclass(frozen=True)
class Judgement:
    """A judgement says what linears may become, and how a recipe's steps choose and round.

    Attributes:
        values: `resolve`d value types, by full name of the linear and then by kind.
        patterns: N:M patterns, besides unstructured and dense ones, which are always judged.
        makes_up: whether later columns make up for pruned weights.
        rounding: a rounding of Recipe.
    """

    values: Mapping[str, Mapping[str, ValueType]]
    patterns: Sequence[NM]
    makes_up: bool
    rounding: str


@dataclass(frozen=True)
class Curve:
    """A curve gives the predicted rise of the loss, in nats per token, of one linear.

    `sparse` has it by kind of values for each sparsity of GRID, of which the first is the dense
    one; `fixed` by N:M pattern and kind of values.
    """

    sparse: Mapping[str, tuple[float, ...]]
    fixed: Mapping[tuple[str, str], float]

    def loss(self, fmt: Format) -> float:
        """Give the loss of a format whose values and pattern are among those that were judged."""
        kind, pattern = fmt.values.kind, fmt.pattern
        if isinstance(pattern, Dense):
            return self.sparse[kind][0]
        if not isinstance(pattern, Unstructured):
            return self.fixed[str(pattern), kind]
        return self.at(kind, pattern.sparsity)

    def at(self, kind: str, sparsity: float) -> float:
        """Give the loss of zeros anywhere, between two points of GRID on the line through them."""
        known = self.sparse[kind]
        place = sparsity / GRID[1]
        low = min(int(place), len(GRID) - 2)
        return known[low] + (place - low) * (known[low + 1] - known[low])


def measure(
    layers: Layers,
    windows: Tensor,
    judgement: Judgement,
    scratch: Path,
    progress: Progress = no_progress,
) -> dict[str, Curve]:
    """Take gradients of the outputs, then Hessians of the inputs, of the unchanged model.

    Args:
        layers: of a causal language model; they are not changed.
        windows: token ids [samples, tokens].
        judgement: the linears to judge, and what they may become.
        scratch: folder for activations, if memory is short; the caller removes it.
        progress: for a progress bar.

    Returns:
        The curve of each linear by full name.

    Raises:
        InputError: a loss, gradient or activation is not finite.
    """
    outputs: dict[str, Tensor] = {}
    for _, found in gradient_norms(
        layers, list(windows), judgement.values, OUTPUT, scratch=scratch, progress=progress
    ):
        outputs |= {name: total / len(windows) for name, total in found.items()}
    curves: dict[str, Curve] = {}
    unused: list[str] = []
    step = progress("sensitivity", len(layers))
    way = Walk(
        needs=frozenset({"hessian"}), order="sequential", scratch=scratch, shrinkage=SHRINKAGE
    )
    for layer in walk(layers, [windows], way):
        curves |= dict(_curves(layer, outputs, judgement, windows.numel()))
        unused += [f"{layer.name}.{name}" for name, use in layer.uses.items() if not use.tokens]
        step()
    if unused:
        logger.info(
            "no token of the text reaches %d experts, which therefore take what is cheapest: %s",
            len(unused), ", ".join(unused),
        )  # fmt: skip
    return curves


def column_costs(hessian: Tensor, makes_up: bool, name: str = "") -> Tensor:
    """Give what a unit error of a column costs: H_jj, or [U_jj]⁻² if later columns make up for it.

    Args:
        hessian: [in, in] float32.
        makes_up: whether they do.
        name: the linear's, for messages.

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
    layer: DecoderLayer, outputs: Mapping[str, Tensor], judgement: Judgement, num_tokens: int
) -> Iterator[tuple[str, Curve]]:
    """Judge the linears of one decoder layer; those with the same input share a factorisation.

    Args:
        layer: as the walk gives it.
        outputs: by full name, see `curve`.
        judgement: see Judgement.
        num_tokens: of the text.
    """
    known: dict[int, dict[bool, Tensor]] = {}
    stats: dict[str, dict[str, Tensor] | None] = {}
    layer.visit(stats.__setitem__)
    factors = _factors(layer, num_tokens)
    for local, linear in layer.linears.items():
        name = f"{layer.name}.{local}"
        if name not in judgement.values:
            continue
        if (own := stats[local]) is None:
            raise InputError(
                f"{name} was never used on the calibration text; leave it dense: --ignore."
            )
        hessian = own["hessian"]
        gamma = outputs[name] * factors.get(local, 1.0)
        costs = known.setdefault(id(hessian), {})
        obs = judgement.rounding == "obs"
        for way in {judgement.makes_up, obs} - costs.keys():
            costs[way] = column_costs(hessian, way, name)
        yield name, curve(
            linear.weight.detach(), gamma, costs[judgement.makes_up], costs[obs],
            judgement.values[name], judgement,
        )  # fmt: skip


def _factors(layer: DecoderLayer, num_tokens: int) -> dict[str, float]:
    """Give by what the product γ H of an expert is multiplied, by local name of its linears.

    γ and H are sums over tokens, and a sum over T tokens of a product is 1/T times that of the
    sums. An expert's sums run over its share of the tokens alone, the mean over all of them of its
    squared routing weights, so that its product is divided by that. Where few tokens reach it, both
    sums are lent, those of an expert of average share: they are divided by that once more and
    multiplied with its own.
    """
    shares = {name: use.square / num_tokens for name, use in layer.uses.items()}
    of_block: dict[str, list[float]] = {}
    for name, share in shares.items():
        of_block.setdefault(name.rpartition(".")[0], []).append(share)
    factors = {}
    for local, one in layer.experts.items():
        own, every = shares[one.expert], of_block[one.block]
        seen = sum(every) / len(every) if one.expert in layer.few else own
        factors[local] = own / seen**2 if own else 0.0
    return factors


def curve(
    weight: Tensor,
    outputs: Tensor,
    drop: Tensor,
    rounding: Tensor,
    values: Mapping[str, ValueType],
    judgement: Judgement,
) -> Curve:
    """Judge one linear by a sample of its rows.

    Args:
        weight: [out, in] floating point.
        outputs: [out], the mean over samples of Σ over tokens of (∂L/∂y)².
        drop: [in], what a unit error of a pruned weight costs; see `column_costs`.
        rounding: [in], the same for a rounded weight.
        values: the resolved value types by kind.
        judgement: says how weights are chosen and rounded.
    """
    stride = max(1, weight.numel() // SAMPLED)
    rows, each = weight[::stride].float(), outputs[::stride].float()
    # H is twice a mean over samples of sums over tokens; a half each for it and for the curvature.
    each = 0.25 * each * (outputs.sum() / each.sum().clamp_min(torch.finfo().tiny))
    scores = rows.square() * drop
    dropped, kept = OF_ZEROS * scores * each.unsqueeze(1), {}
    for kind, own in values.items():
        error = _rounding_error(rows, own, rounding, judgement.rounding)
        kept[kind] = error.mul_(OF_CODES * rounding).mul_(each.unsqueeze(1))
    fixed = {}
    for pattern in judgement.patterns:
        mask, more = pattern.keep(scores, "row"), crowding(pattern.sparsity, judgement.makes_up)
        for kind, error in kept.items():
            fixed[str(pattern), kind] = float(torch.where(mask, error, more * dropped).sum())
    sparse = _sparse(scores, dropped, kept, judgement.makes_up)
    return Curve(sparse, fixed)


def crowding(sparsity: float, makes_up: bool) -> float:
    """Give how much more dropped weights cost when others go, too, which then make up for little.

    The sum over pruned weights alone falls short of the errors of SparseGPT's sweeps by this much;
    a fit to three decoder layers of SmolLM2-135M at sparsities from 0.3 to 0.85.
    """
    return 1 / (1 - sparsity**2 / 2) if makes_up else 1.0


def _sparse(
    scores: Tensor, dropped: Tensor, kept: Mapping[str, Tensor], makes_up: bool
) -> dict[str, tuple[float, ...]]:
    """Sum up at each sparsity of GRID; weights compete in blocks of columns, or in their row."""
    block = BLOCK if makes_up else 0
    more = torch.tensor([crowding(share, makes_up) for share in GRID], dtype=torch.float64)
    totals = {kind: torch.zeros(len(GRID), dtype=torch.float64) for kind in kept}
    columns = scores.shape[1]
    for start in range(0, columns, block or columns):
        stop = start + (block or columns)

        def competing(matrix: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return matrix[:, start:stop].reshape(1, -1) if block else matrix

        order = competing(scores).argsort(dim=1)
        size = order.shape[1]
        places = torch.tensor([int(share * size) for share in GRID])
        gone = more * _before(competing(dropped).gather(1, order), places)
        for kind, error in kept.items():
            ordered = competing(error).gather(1, order)
            totals[kind] += gone + float(ordered.double().sum()) - _before(ordered, places)
    return {kind: tuple(total.tolist()) for kind, total in totals.items()}


def _before(ordered: Tensor, places: Tensor) -> Tensor:
    """Sum over all rows what stands before each place, float64 on the CPU."""
    by_place = ordered.double().sum(dim=0).cumsum(0).cpu()
    return torch.cat([by_place.new_zeros(1), by_place])[places]


def _rounding_error(rows: Tensor, values: ValueType, costs: Tensor, rounding: str) -> Tensor:
    """Give the squared distances [rows, in] to what is stored."""
    if values.is_float:
        return torch.zeros_like(rows)
    every = torch.ones_like(rows, dtype=torch.bool)
    if rounding == "nearest":
        return (rows - quantize(rows, every, values).weight).square_()
    rounded = quantize(rows, every, values, rounding="mse", importance=costs)
    return (rows - rounded.weight).square_()
