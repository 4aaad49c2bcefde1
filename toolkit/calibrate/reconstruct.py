"""Reconstruct: train the kept weights of one decoder layer towards the dense layer's output.

Block-wise reconstruction, as in "A Free Lunch in LLM Compression" (arXiv 2510.14444) and, for
rounded weights, BRECQ (arXiv 2102.05426), with two choices of our own: the input is what the pruned
layers before make of the text while the target is the dense layer's output on the dense stream, so
errors made earlier are corrected, too; and the loss counts every token alike,

    L = mean over tokens of ‖B(x) − y‖² / ‖y‖²,

for plain squared error is that of a few tokens with massive activations. Masks do not change.

Codes are trained through their rounding: its gradient is taken to be that of the identity inside
the range of the codes (Bengio et al. 2013, arXiv 1308.3432), and that of the scales follows from
it as in LSQ (Esser et al. 2020, arXiv 1902.08153).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gblm.calibrate.ranks import Ranks
from gblm.calibrate.streams import Streams
from gblm.errors import InputError
from gblm.sparse.weights import SparseWeight

BETAS = (0.9, 0.95)
SEED = 0


@dataclass(frozen=True)
class Training:
    """How a decoder layer is trained.

    Attributes:
        epochs: passes over the samples.
        learning_rate: of Adam at the first step, in units of the weights; it falls linearly to 0.
        batch_size: samples per step.
    """

    epochs: int = 2
    learning_rate: float = 5e-4
    batch_size: int = 4


@dataclass(frozen=True)
class Reconstructed:
    """What training made of a decoder layer.

    Attributes:
        weights: by local name of the linear; same masks, and codes where there were codes.
        others: by local name of the parameter, such as the weights of norms.
        loss: before the first step and after the last, mean over this rank's samples.
    """

    weights: dict[str, SparseWeight]
    others: dict[str, Tensor]
    loss: tuple[float, float]


def reconstruct(
    module: nn.Module,
    weights: Mapping[str, SparseWeight],
    streams: Streams,
    how: Training,
    ranks: Ranks,
    name: str,
) -> Reconstructed:
    """Train a decoder layer; its own parameters are left as they are.

    Every rank calls this with the same weights; steps are taken along the mean of their gradients,
    so all ranks end with the same result.

    Args:
        module: the decoder layer.
        weights: its pruned linears by local name.
        streams: inputs and targets of the samples of this rank.
        how: see Training.
        ranks: the processes that share the samples.
        name: of the layer, for messages.

    Raises:
        InputError: the loss is not finite.
    """
    parts: dict[str, Trainable] = {
        f"{local}.weight": trainable(weight) for local, weight in weights.items()
    }
    norms = {
        local: nn.Parameter(parameter.detach().float().clone())
        for local, parameter in module.named_parameters()
        if parameter.ndim == 1 and local not in parts
    }
    groups = [group for part in parts.values() for group in part.groups(how.learning_rate)]
    groups.append({"params": list(norms.values()), "lr": how.learning_rate})
    dtype = next(module.parameters()).dtype

    def tensors() -> dict[str, Tensor]:
        found = {local: part.value().to(dtype) for local, part in parts.items()}
        return found | {local: norm.to(dtype) for local, norm in norms.items()}

    with torch.enable_grad():
        losses = _train(module, tensors, groups, streams, how, ranks)
    trained = [parameter for group in groups for parameter in group["params"]]
    if not all(map(math.isfinite, losses)) or not all(bool(p.isfinite().all()) for p in trained):
        raise InputError(
            f"{name}: reconstruction did not converge (loss {losses[0]:g} → {losses[1]:g}): "
            "lower its learning_rate, or run with --dtype float32."
        )
    kept = {local: parts[f"{local}.weight"].result(w) for local, w in weights.items()}
    others = {local: norm.detach().to(dtype) for local, norm in norms.items()}
    return Reconstructed(kept, others, losses)


def _train(
    module: nn.Module,
    tensors: Callable[[], dict[str, Tensor]],
    groups: list[dict[str, Any]],
    streams: Streams,
    how: Training,
    ranks: Ranks,
) -> tuple[float, float]:
    """Adam over the samples of all epochs; the losses of the first and the last epoch."""
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    per_epoch = ranks.agree(-(-streams.num_samples // how.batch_size))
    total = per_epoch * how.epochs
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    sums = [0.0] * how.epochs
    for step, picks in enumerate(_batches(streams.num_samples, per_epoch, how)):
        optimizer.zero_grad()
        loss, scale = _differentiate(module, tensors(), streams, picks)
        for group in groups:
            for parameter in group["params"]:
                _join_gradient(parameter, scale, ranks)
        optimizer.step()
        decay.step()
        sums[step // per_epoch] += loss / per_epoch
    return sums[0], sums[-1]


def _batches(num_samples: int, per_epoch: int, how: Training) -> Iterator[list[int]]:
    """Every sample once an epoch, in a new order each time; a rank with fewer repeats some."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(how.epochs):
        order = torch.randperm(num_samples, generator=generator).tolist()
        for index in range(per_epoch):
            start = index * how.batch_size % num_samples
            yield order[start : start + how.batch_size]


def _join_gradient(parameter: nn.Parameter, scale: float, ranks: Ranks) -> None:
    """Take back the factor of a parameter's gradient; then the mean over the ranks."""
    if parameter.grad is None:
        # A linear that this rank's samples do not reach; the others may wait for it.
        parameter.grad = torch.zeros_like(parameter)
    if scale != 1:
        parameter.grad /= scale
    ranks.average_(parameter.grad)


def _differentiate(
    module: nn.Module, tensors: dict[str, Tensor], streams: Streams, picks: list[int]
) -> tuple[float, float]:
    """Leave the gradients of the loss, which stands at the head of this file, times a factor.

    Returns:
        The loss and the factor; it is not 1 for float16, where most would round to zero.
    """
    inputs, targets = streams.batch(picks)

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(module, tensors, args, kwargs)

    found = streams.run(run, inputs)
    outputs, targets = found.float(), targets.float()
    errors = (outputs - targets).square().sum(-1)
    loss = (errors / targets.square().sum(-1).clamp_min(1e-12)).mean()
    (gradient,) = torch.autograd.grad(loss, outputs)
    largest = float(gradient.abs().max()) if found.dtype == torch.float16 else 0.0
    scale = 2.0 ** -round(math.log2(largest)) if 0 < largest < math.inf else 1.0
    torch.autograd.backward(outputs, gradient * scale)
    return float(loss.detach()), scale


# Scales move by factors, not by differences: theirs is a unit of its own.
SCALE_RATE = 2.0


class Trainable(Protocol):
    """A weight with parameters."""

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimiser."""

    def value(self) -> Tensor:
        """[out, in] float32, differentiable, zero wherever the mask is False."""

    def result(self, start: SparseWeight) -> SparseWeight:
        """The trained weight, in the dtype and with the mask of the one that it started from."""


def trainable(weight: SparseWeight) -> Trainable:
    """Parameters for floating values, or for codes and scales."""
    return Floats(weight) if weight.codes is None else Codes(weight)


class Floats:
    """Kept values are parameters."""

    def __init__(self, start: SparseWeight) -> None:
        self._mask = start.mask
        self._weight = nn.Parameter(start.weight.detach().float().clone())

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """See Trainable."""
        return [{"params": [self._weight], "lr": learning_rate}]

    def value(self) -> Tensor:
        """See Trainable."""
        return self._weight * self._mask

    def result(self, start: SparseWeight) -> SparseWeight:
        """See Trainable."""
        return SparseWeight.cut(self._weight.detach().to(start.weight.dtype), start.mask)


class Codes:
    """Scales and, behind their rounding, values are parameters."""

    def __init__(self, start: SparseWeight) -> None:
        codes, scales = start.codes, start.scales
        if codes is None or scales is None:
            raise ValueError("this weight has no codes.")
        self._mask = start.mask
        self._scales = scales.float()
        self._group = codes.shape[1] // scales.shape[1]
        # The range of the codes that there are; a narrower one than that of their type stays.
        self._low, self._high = float(codes.min()), float(codes.max())
        self._weight = nn.Parameter(codes.float() * self._spread(self._scales))
        self._factor = nn.Parameter(torch.zeros_like(self._scales))

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """See Trainable."""
        return [
            {"params": [self._weight], "lr": learning_rate},
            {"params": [self._factor], "lr": SCALE_RATE * learning_rate},
        ]

    def value(self) -> Tensor:
        """See Trainable."""
        scales = self._spread(_through(self._current_scales()))
        codes = (self._weight / scales).clamp(self._low, self._high)
        return (codes + (codes.round() - codes).detach()) * scales * self._mask

    @torch.no_grad()
    def result(self, start: SparseWeight) -> SparseWeight:
        """See Trainable."""
        scales = self._current_scales().to(torch.bfloat16)
        codes = (self._weight / self._spread(scales.float())).clamp(self._low, self._high)
        codes = (codes.round() * self._mask).to(torch.int8)
        return SparseWeight.from_codes(codes, scales, start.mask, start.weight.dtype)

    def _current_scales(self) -> Tensor:
        """[out, groups] float32, before they are rounded to bfloat16."""
        return self._scales * self._factor.exp()

    def _spread(self, scales: Tensor) -> Tensor:
        """[out, groups] → [out, in]."""
        return scales.repeat_interleave(self._group, dim=1)


def _through(scales: Tensor) -> Tensor:
    """Rounded to bfloat16, as they are stored; with the gradient of the identity."""
    return scales + (scales.to(torch.bfloat16).float() - scales).detach()
