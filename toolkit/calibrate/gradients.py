"""Gradient norms: ‖G_ij‖ over the calibration samples, of the dense model's own loss.

G_s is the gradient of the mean next-token cross-entropy of sample s. One backward pass per
sample; a weight's gradient is folded into a float32 sum and freed as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gblm.errors import InputError, UsageError


def gradient_norms(
    model: nn.Module,
    samples: Sequence[Tensor],
    linears: Mapping[str, nn.Linear],
    norm: str,
    on_sample: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Sum gradients over samples: l1 Σ|g|, l2 √Σ g².

    Args:
        model: a causal language model; its weights are not changed.
        samples: token ids, each [tokens] int64. A sample is one calibration sequence.
        linears: whose weights to differentiate, by full name.
        norm: "l1" or "l2".
        on_sample: called after each sample, for a progress bar.

    Returns:
        [out, in] float32 per name.

    Raises:
        InputError: a loss or gradient is not finite.
    """
    if norm not in ("l1", "l2"):
        raise UsageError(f"gradient norm {norm!r} is unknown: use l1 or l2.")
    sums = {name: torch.zeros_like(m.weight, dtype=torch.float32) for name, m in linears.items()}
    handles = []

    def fold(name: str) -> Callable[[Tensor], None]:
        def accumulate(weight: Tensor) -> None:
            gradient = weight.grad
            if gradient is not None:
                gradient = gradient.float()
                sums[name] += gradient.abs() if norm == "l1" else gradient.square()
                weight.grad = None

        return accumulate

    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for name, linear in linears.items():
        linear.weight.requires_grad_(True)
        handles.append(linear.weight.register_post_accumulate_grad_hook(fold(name)))
    try:
        for index, sample in enumerate(samples):
            _backward(model, sample, index)
            on_sample()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
    return {name: _finish(name, total, norm) for name, total in sums.items()}


def _backward(model: nn.Module, sample: Tensor, index: int) -> None:
    ids = sample.reshape(1, -1).to(next(model.parameters()).device)
    with torch.enable_grad():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if not bool(loss.isfinite()):
            raise InputError(f"calibration sample {index}: the loss is {loss.item()}.")
        loss.backward()


def _finish(name: str, total: Tensor, norm: str) -> Tensor:
    if not bool(total.isfinite().all()):
        raise InputError(f"{name}: its gradient is not finite. Run with --dtype float32.")
    return total if norm == "l1" else total.sqrt_()
