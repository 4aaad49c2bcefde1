"""Rates: what this machine does per second just now, on small matrices, in about two seconds."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, silu

from gblm.calibrate.trainable import trainable
from gblm.plan.setting import Setting
from gblm.recipe import Choice
from gblm.sparse.patterns import NM, Pattern, Unstructured
from gblm.sparse.values import FLOAT, ROW, ValueType
from gblm.sparse.weights import SparseWeight
from gblm.structure import structure

PROBE_SECONDS = 0.25
# Matrices of the probes are no larger, so that one product stays well below the limit.
PROBE_SIDE, PROBE_TOKENS, HASHED = 2048, 512, 1 << 22
PROBE_ROWS, PROBE_COLUMNS = 1024, 128


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
        prune: weights through the pipeline, without large products, by `probed` choice.
        pack: weights into the format, the report included, by `probed` choice.
        train: weights through a step of training, without the layer, by `probed` choice.
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
    train: dict[Choice, float]
    sha256: float


def probe(setting: Setting, device: torch.device) -> Rates:
    """Measure each rate that the run depends on for a quarter of a second."""
    shapes, text = setting.shapes, bool(setting.shapes.samples)
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

    gradients, hessian = "grad_norm" in setting.collects, "hessian" in setting.pipeline.needs
    back = gradients or setting.training is not None
    operations, size = 2.0 * tokens * weight.numel(), weight.numel()
    choices = dict.fromkeys(map(probed, shapes.chosen))
    pruning = {choice: _probe_pruning(setting, choice, device) for choice in choices}
    return Rates(
        forward=rate(operations, text, lambda: linear(x.detach(), gradient)),
        backward=rate(2 * operations, back, backward),
        float32=rate(operations, hessian, lambda: inputs @ weight.t()),
        read=rate(size, True, lambda: (gradient.isfinite().all(), gradient.clone())),
        values=rate(2.0 * out.numel(), text, lambda: silu(error).mul_(error)),
        fold=rate(size, gradients, lambda: total.addcmul_(gradient.float(), gradient.float())),
        prune={choice: rates[0] for choice, rates in pruning.items()},
        pack={choice: rates[1] for choice, rates in pruning.items()},
        train={choice: rates[2] for choice, rates in pruning.items()},
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


def _probe_pruning(
    setting: Setting, choice: Choice, device: torch.device
) -> tuple[float, float, float]:
    """Weights per second through the pipeline, into the format and through a step of training."""
    # Products with the Hessian grow with the columns; on few of them they count for little.
    pipeline, squares = setting.pipeline, "hessian" in setting.pipeline.needs
    wanted = PROBE_COLUMNS if squares else min(setting.shapes.hidden, PROBE_SIDE)
    rows, columns = strip_shape(choice.pattern, wanted)
    weight = torch.randn(rows, columns, device=device).to(setting.shapes.dtype)
    one, values = torch.ones(columns, device=device), choice.values
    # Correlated, so that ALPS needs its usual number of iterations.
    hessian = weight.float().t() @ weight.float() if squares else one
    stats = {"act_norm": one, "hessian": hessian,
             "grad_norm": weight.float().abs(), "num_samples": one[0]}  # fmt: skip
    needed = pipeline.needs | {"num_samples"}
    prepared = pipeline.prepare({key: stats[key] for key in stats if key in needed})

    def choose() -> SparseWeight:
        return pipeline.prune(weight, prepared, choice.pattern, values)

    found, fmt = choose(), choice.fmt
    pruned = found.to(setting.shapes.stored_dtype, device)

    def pack() -> None:
        fmt.pack("probe", pruned)
        structure(pruned.mask)
        pruned.is_zero.float().mean()

    actions = [choose, pack, *([_a_step(setting, found)] if setting.training else [])]
    rates = [weight.numel() / _seconds(action, device) for action in actions]
    return rates[0], rates[1], rates[2] if setting.training else math.inf


def _a_step(setting: Setting, pruned: SparseWeight) -> Callable[[], object]:
    """A step of training as far as the weight is concerned: its value, its gradient, Adam."""
    part = trainable(pruned)
    optimizer = torch.optim.Adam(part.groups(1e-4))
    gradient = torch.full_like(pruned.weight, 1e-3)

    def step() -> None:
        value = part.value().to(setting.shapes.dtype)
        optimizer.zero_grad()
        torch.autograd.backward(value, gradient)
        optimizer.step()

    return step


def strip_shape(pattern: Pattern, columns: int) -> tuple[int, int]:
    """A weight's shape [out, in] near PROBE_ROWS and `columns` that the pattern divides."""
    wide = math.lcm(8, pattern.group_m) if isinstance(pattern, NM) else 8
    return PROBE_ROWS, max(columns // wide, 1) * wide


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
