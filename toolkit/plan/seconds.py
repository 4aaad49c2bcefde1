"""Seconds of a run: operations of each phase over rates that are probed on this machine, now.

Disks cannot be probed without writing, so their rates are assumed; reading and tokenising text is
not counted.
"""

from __future__ import annotations

import math

from gblm.plan.disk import Disk
from gblm.plan.rates import Rates, probed
from gblm.plan.setting import Setting
from gblm.plan.shapes import Layer, Linear
from gblm.plan.terms import BACKWARD, FORWARD
from gblm.sparse.patterns import Dense

# Python, torch and transformers; the skeleton of the model.
START_SECONDS = 8.0
READ_BYTES, WRITE_BYTES = 0.8e9, 0.25e9
# What the layers hold passes through several elementwise functions, casts to float32 among them.
PASSES, LOGIT_PASSES = 4, 64
# The upper triangle of a Hessian in four strips.
HESSIAN_SHARE = 5 / 8
# Two Cholesky factors and an inverse take so many times in³; LAPACK reaches a share of the rate.
FACTOR_OPERATIONS, LAPACK_SHARE = 4 / 3, 0.5
# ALPS: an eigendecomposition; iterations that are common, with an inverse for every third one, and
# the steps of conjugate gradients.
EIGEN_OPERATIONS, ITERATIONS, LOOK, REFITS = 9.0, 40, 3, 14
# Refit: products for its start and its errors, beside one an iteration.
ERRORS = 4


def spend(setting: Setting, rates: Rates, disk: Disk) -> dict[str, float]:
    """Seconds by phase.

    Args:
        setting: of the run.
        rates: as probed.
        disk: bytes that go to disk.
    """
    shapes, found = setting.shapes, {"start": START_SECONDS}
    found["start"] += shapes.stored * (1 / READ_BYTES + 1 / rates.sha256)
    stored = sum(layer.stored for layer in shapes.layers) / READ_BYTES
    read = stored + sum(layer.parameters for layer in shapes.layers) / rates.read
    if "grad_norm" in setting.collects:
        times = 1 if setting.resident else 2
        found["gradients"] = (
            times * read + disk.gradients / WRITE_BYTES + _gradients(setting, rates)
        )
    if setting.walks:
        found["capture"] = shapes.frame * shapes.stored_dtype.itemsize / READ_BYTES
    pruning = read + stored + disk.layers * (1 / WRITE_BYTES + 1 / rates.sha256)
    pruning += disk.gradients / READ_BYTES
    pruning += sum(_pruning(setting, layer, rates) for layer in shapes.layers)
    if setting.walks:
        pruning += setting.passes * _forward(setting, rates) + _training(setting, rates)
    found["pruning"] = pruning
    moved = disk.layers + disk.output
    found["publishing"] = moved / READ_BYTES + disk.output * (1 / WRITE_BYTES + 1 / rates.sha256)
    if shapes.packed_head is not None:
        found["publishing"] += shapes.packed_head.weights / min(rates.pack.values())
    return found


def _operations(setting: Setting) -> float:
    """Of one pass of all this rank's samples through the linears and attention of all layers."""
    shapes = setting.shapes
    weights = sum(own.weights for layer in shapes.layers for own in layer.linears)
    attention = 2 * len(shapes.layers) * shapes.seq_len * shapes.hidden
    return 2.0 * shapes.samples * shapes.seq_len * (weights + attention)


def _values(setting: Setting, factors: tuple[int, int]) -> float:
    """What passes through norms, rotations and activations meanwhile."""
    shapes = setting.shapes
    wide = [max(own.rows for own in layer.linears) for layer in shapes.layers]
    hidden = len(shapes.layers) * shapes.hidden
    held = factors[0] * hidden + factors[1] * sum(wide)
    return float(PASSES * shapes.samples * shapes.seq_len * held)


def _forward(setting: Setting, rates: Rates) -> float:
    return _operations(setting) / rates.forward + _values(setting, FORWARD) / rates.values


def _gradients(setting: Setting, rates: Rates) -> float:
    """Up; down, with every layer once more and its backward; the loss, and a fold per sample."""
    shapes = setting.shapes
    logits = float(shapes.samples * shapes.seq_len * shapes.vocab)
    head = 2 * shapes.hidden * logits
    weights = sum(layer.weights for layer in shapes.layers)
    forward = _forward(setting, rates)
    up = (forward if setting.resident else 2 * forward) + head / rates.forward
    down = (2 * _operations(setting) + head) / rates.backward
    down += _values(setting, BACKWARD) / rates.values
    return up + down + LOGIT_PASSES * logits / rates.values + shapes.samples * weights / rates.fold


def _training(setting: Setting, rates: Rates) -> float:
    """Of all decoder layers: samples up and down, and steps of the optimiser."""
    how, samples = setting.training, setting.shapes.samples
    if how is None:
        return 0.0
    down = 2 * _operations(setting) / rates.backward + _values(setting, BACKWARD) / rates.values
    chosen = [own for layer in setting.shapes.layers for own in layer.pruned]
    step = sum(own.weights / rates.train[probed(own.choice)] for own in chosen if own.choice)
    steps = math.ceil(samples / how.batch_size)
    return how.epochs * (_forward(setting, rates) + down + steps * step)


def _pruning(setting: Setting, layer: Layer, rates: Rates) -> float:
    """One decoder layer through the method and into the format."""
    chosen = [(own.weights, probed(own.choice)) for own in layer.linears if own.choice]
    spent = sum(count * (1 / rates.prune[c] + 1 / rates.pack[c]) for count, c in chosen)
    if "hessian" not in setting.pipeline.needs:
        return spent
    operations = 0.0
    tokens = setting.shapes.samples * setting.shapes.seq_len
    for group in layer.groups(pruned="hessian" in setting.reads):
        operations += 2.0 * tokens * HESSIAN_SHARE * group[0].columns ** 2
    operations += sum(_squares(setting, group) for group in layer.groups(pruned=True))
    return spent + operations / rates.float32


def _squares(setting: Setting, group: list[Linear]) -> float:
    """Operations with matrices [in, in] for linears with the same input."""
    cube = float(group[0].columns ** 3)
    factor = FACTOR_OPERATIONS / LAPACK_SHARE * cube
    once = {"sparsegpt": factor, "alps": EIGEN_OPERATIONS / LAPACK_SHARE * cube + 2.0 * cube}
    spent = once.get(setting.name, 0.0) + (factor if setting.factors else 0.0)
    for own in group:
        sparse = own.choice is not None and not isinstance(own.choice.pattern, Dense)
        if setting.name == "alps" and sparse:
            spent += 2.0 * cube * ITERATIONS / LOOK
        spent += _products(setting, own) * own.rows * own.columns**2
    return spent


def _products(setting: Setting, own: Linear) -> float:
    """How often a row is multiplied with [in, in], two operations each; a sweep counts half."""
    pipeline, choice = setting.pipeline, own.choice
    if choice is None:
        return 0.0
    sparse = not isinstance(choice.pattern, Dense)
    jointly = setting.name == "sparsegpt" and sparse and pipeline.refit is None
    products = {"sparsegpt": 1.0, "alps": 2.0 * (ITERATIONS + REFITS)}
    spent = products.get(setting.name, 0.0) if sparse else 0.0
    if pipeline.refit is not None and sparse:
        spent += 2.0 * (pipeline.refit.iterations + ERRORS)
    if pipeline.rounding == "obs" and not choice.values.is_float and not jointly:
        spent += 1.0
    return spent
