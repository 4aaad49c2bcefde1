"""Reconstruct: train the kept weights of one decoder layer towards the dense layer's output.

Block-wise reconstruction, as in "A Free Lunch in LLM Compression" (arXiv 2510.14444) and, for
rounded weights, BRECQ (arXiv 2102.05426), with two choices of our own: the input is what the pruned
layers before make of the text while the target is the dense layer's output on the dense stream, so
errors made earlier are corrected, too; and the loss counts every token alike,

    L = mean over tokens of ‖B(x) − y‖² / ‖y‖²,

for plain squared error is that of a few tokens with massive activations. Masks do not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gblm.calibrate.parts import Part, SparsePart, Vector, sparse_part
from gblm.calibrate.ranks import Ranks
from gblm.calibrate.streams import Streams
from gblm.errors import InputError
from gblm.recipe import Reconstruction
from gblm.sparse.weights import SparseWeight

BETAS = (0.9, 0.95)
WARM_UP = 0.1
SEED = 0


@dataclass(frozen=True)
class Reconstructed:
    """A Reconstructed holds what training made of a decoder layer.

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
    how: Reconstruction,
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
        how: see Reconstruction.
        ranks: the processes that share the samples.
        name: of the layer, for messages.

    Raises:
        InputError: the loss is not finite.
    """
    parts: dict[str, Part] = {
        f"{local}.weight": sparse_part(weight, "weights") for local, weight in weights.items()
    }
    for local, parameter in module.named_parameters():
        if parameter.ndim == 1 and local not in parts:
            parts[local] = Vector(parameter)
    losses = _train(module, parts, streams, how, ranks)
    trained = [each.parameter for part in parts.values() for each in part.parameters]
    if not all(map(math.isfinite, losses)) or not all(bool(p.isfinite().all()) for p in trained):
        raise InputError(
            f"{name}: reconstruction did not converge (loss {losses[0]:g} → {losses[1]:g}): "
            "lower its learning_rate, or run with --dtype float32."
        )
    dtype = next(module.parameters()).dtype
    kept = {
        local: cast(SparsePart, parts[f"{local}.weight"]).result(weight.weight.dtype)
        for local, weight in weights.items()
    }
    others = {local: p.give().to(dtype) for local, p in parts.items() if isinstance(p, Vector)}
    return Reconstructed(kept, others, losses)


def _train(
    module: nn.Module,
    parts: Mapping[str, Part],
    streams: Streams,
    how: Reconstruction,
    ranks: Ranks,
) -> tuple[float, float]:
    """Adam over the samples of all epochs; the losses of the first and the last epoch."""
    dtype = next(module.parameters()).dtype
    optimizer = torch.optim.Adam(
        [
            {"params": [trained.parameter], "lr": how.learning_rate * trained.size}
            for part in parts.values()
            for trained in part.parameters
        ],
        betas=BETAS,
    )
    per_epoch = ranks.agree(-(-streams.num_samples // how.batch_size))
    total = per_epoch * how.epochs
    warm = 1 + int(WARM_UP * total)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 1 - step / total)
    )
    sums = [0.0] * how.epochs
    for step, picks in enumerate(_batches(streams.num_samples, per_epoch, how)):
        tensors = {local: part.give().to(dtype).requires_grad_() for local, part in parts.items()}
        with torch.enable_grad():
            loss, scale = _differentiate(module, tensors, streams, picks)
        for local, part in parts.items():
            grad = tensors[local].grad
            # A linear that this rank's samples do not reach; the others may wait for it.
            part.take(torch.zeros_like(tensors[local]) if grad is None else grad.float() / scale)
            for each in part.parameters:
                if each.parameter.grad is not None:
                    ranks.average_(each.parameter.grad)
        optimizer.step()
        decay.step()
        sums[step // per_epoch] += loss / per_epoch
    return sums[0], sums[-1]


def _batches(num_samples: int, per_epoch: int, how: Reconstruction) -> Iterator[list[int]]:
    """Every sample once an epoch, in a new order each time; a rank with fewer repeats some."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(how.epochs):
        order = torch.randperm(num_samples, generator=generator).tolist()
        for index in range(per_epoch):
            start = index * how.batch_size % num_samples
            yield order[start : start + how.batch_size]


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
