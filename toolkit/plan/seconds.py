"""Seconds of a run: operations of each phase over rates that are probed on this machine, now.

Disks cannot be probed without writing, so their rates are assumed; reading and tokenising text is
not counted.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, silu

from gblm.choices import Choice
from gblm.patterns import NM, Block, Pattern, Unstructured
from gblm.plan.disk import Disk
from gblm.plan.setting import Setting
from gblm.plan.shapes import Layer
from gblm.plan.terms import BACKWARD, FORWARD
from gblm.structure import structure
from gblm.values import FLOAT, ROW, ValueType, quantize
from gblm.weights import SparseWeight

PROBE_SECONDS = 0.25
# Matrices of the probes are no larger, so that one product stays well below the limit.
PROBE_SIDE, PROBE_TOKENS, HASHED = 2048, 512, 1 << 22
PROBE_ROWS, PROBE_COLUMNS = 1024, 128
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


@dataclass(frozen=True)
class Rates:
    """What this machine does just now, in things per second; infinite where nothing is needed.

    Attributes:
        forward: operations of a linear in the computation's dtype.
        backward: operations of its backward pass.
        float32: operations of a float32 product.
        read: weights through the search for NaN and a copy.
        values: values of the computation's dtype through an elementwise function.
        fold: weights that a sample's gradient is added to.
        prune: weights through the method, without its large products, by `probed` choice.
        pack: weights into the format, the report included, by `probed` choice.
        sha256: bytes.
    """

    forward: float
    backward: float
    float32: float
    read: float
    values: float
    fold: float
    prune: dict[Choice, float]
    pack: dict[Choice, float]
    sha256: float


def probe(setting: Setting, device: torch.device) -> Rates:
    """Measure each rate that the run depends on for a quarter of a second."""
    shapes, wanted = setting.shapes, setting.collects
    wide = max(own.rows for own in shapes.largest.linears)
    tokens, side = min(shapes.tokens or 1, PROBE_TOKENS), min(shapes.hidden, PROBE_SIDE)
    inputs = torch.randn(tokens, side, device=device)
    weight = torch.randn(min(wide, PROBE_SIDE), side, device=device)
    x = inputs.to(shapes.dtype).requires_grad_(True)
    w = weight.to(shapes.dtype).requires_grad_(True)
    out = linear(x, w)
    error, total, gradient = torch.ones_like(out), torch.zeros_like(weight), w.detach()

    def rate(count: float, needed: bool, action: Callable[[], object]) -> float:
        return count / _seconds(action, device) if needed else math.inf

    def backward() -> object:
        return torch.autograd.grad(out, (x, w), error, retain_graph=True)

    back, hessian = "grad_norm" in wanted, "hessian" in setting.method.needs
    operations, size = 2.0 * tokens * weight.numel(), weight.numel()
    choices = dict.fromkeys(map(probed, shapes.chosen))
    pruning = {choice: _probe_pruning(setting, choice, device) for choice in choices}
    return Rates(
        forward=rate(operations, bool(wanted), lambda: linear(x.detach(), gradient)),
        backward=rate(2 * operations, back, backward),
        float32=rate(operations, hessian, lambda: inputs @ weight.t()),
        read=rate(size, True, lambda: (gradient.isfinite().all(), gradient.clone())),
        values=rate(2.0 * out.numel(), bool(wanted), lambda: silu(error).mul_(error)),
        fold=rate(size, back, lambda: total.addcmul_(gradient.float(), gradient.float())),
        prune={choice: rates[0] for choice, rates in pruning.items()},
        pack={choice: rates[1] for choice, rates in pruning.items()},
        sha256=rate(HASHED, True, lambda: hashlib.sha256(bytes(HASHED))),
    )


def probed(choice: Choice) -> Choice:
    """What stands for a choice: a few of them for a model with a sparsity for each linear.

    A group's size makes no difference, and a row of any length is one.
    """
    values = FLOAT if choice.values.is_float else ValueType(choice.values.kind, ROW)
    if isinstance(choice.pattern, Unstructured):
        return Choice(Unstructured(min(round(choice.pattern.sparsity, 1), 0.9)), values)
    return Choice(choice.pattern, values)


def _probe_pruning(setting: Setting, choice: Choice, device: torch.device) -> tuple[float, float]:
    """Weights per second through the method and into the format, on a random weight."""
    # Products with the Hessian grow with the columns; on few of them they count for little.
    squares = "hessian" in setting.method.needs
    wanted = PROBE_COLUMNS if squares else min(setting.shapes.hidden, PROBE_SIDE)
    rows, columns = strip_shape(choice.pattern, wanted)
    weight = torch.randn(rows, columns, device=device).to(setting.shapes.dtype)
    one, values = torch.ones(columns, device=device), choice.values
    # Correlated, so that ALPS needs its usual number of iterations.
    hessian = weight.float().t() @ weight.float() if squares else one
    stats = {"act_norm": one, "act_mean": one, "act_var": one, "hessian": hessian,
             "grad_norm": weight.float().abs(), "num_samples": one[0]}  # fmt: skip
    needed = setting.method.needs | {"num_samples"}
    prepared = setting.method.prepare({key: stats[key] for key in stats if key in needed})

    def choose() -> SparseWeight:
        own = setting.method.prune(weight, prepared, choice.pattern)
        return own if values.is_float else quantize(own.weight, own.mask, values)

    pruned, fmt = choose().to(setting.shapes.stored_dtype), choice.fmt

    def pack() -> None:
        fmt.pack("probe", pruned)
        structure(pruned.mask)
        pruned.zeros.float().mean()

    return weight.numel() / _seconds(choose, device), weight.numel() / _seconds(pack, device)


def strip_shape(pattern: Pattern, columns: int) -> tuple[int, int]:
    """A weight's shape [out, in] near PROBE_ROWS and `columns` that the pattern divides."""
    tall, wide = 1, 8
    if isinstance(pattern, NM):
        wide = math.lcm(wide, pattern.group_m)
    elif isinstance(pattern, Block):
        tall, wide = pattern.block_rows, math.lcm(wide, pattern.block_cols)
    return max(PROBE_ROWS // tall, 1) * tall, max(columns // wide, 1) * wide


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of an action, once it is warm."""
    action()
    began, count = _now(device), 0
    while count == 0 or _now(device) - began < PROBE_SECONDS:
        action()
        count += 1
    return (_now(device) - began) / count


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
    observes = bool(setting.collects - {"grad_norm"})
    if observes:
        found["capture"] = shapes.frame * shapes.stored_dtype.itemsize / READ_BYTES
    pruning = read + stored + disk.layers * (1 / WRITE_BYTES + 1 / rates.sha256)
    pruning += disk.gradients / READ_BYTES
    pruning += sum(_pruning(setting, layer, rates) for layer in shapes.layers)
    if observes:
        pruning += setting.passes * _forward(setting, rates)
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


def _pruning(setting: Setting, layer: Layer, rates: Rates) -> float:
    """One decoder layer through the method and into the format."""
    chosen = [(own.weights, probed(own.choice)) for own in layer.linears if own.choice]
    spent = sum(count * (1 / rates.prune[c] + 1 / rates.pack[c]) for count, c in chosen)
    if "hessian" not in setting.method.needs:
        return spent
    operations = 0.0
    tokens = setting.shapes.samples * setting.shapes.seq_len
    for group in layer.groups(pruned="hessian" in setting.reads):
        operations += 2.0 * tokens * HESSIAN_SHARE * group[0].columns ** 2
    for group in layer.groups(pruned=True):
        rows = sum(own.rows for own in group)
        operations += _squares(setting.name, group[0].columns, rows, len(group))
    return spent + operations / rates.float32


def _squares(name: str, columns: int, rows: int, count: int) -> float:
    """Operations of the products with [columns, columns], for `count` linears of `rows` in all."""
    product = float(columns**2 * rows)
    if name == "alps":
        inverses = 1 + count * ITERATIONS / LOOK
        decomposition = EIGEN_OPERATIONS / LAPACK_SHARE * columns**3
        return decomposition + 2.0 * columns**3 * inverses + 2 * (ITERATIONS + REFITS) * product
    return FACTOR_OPERATIONS / LAPACK_SHARE * columns**3 + product
