"""Folding: gradients into float32 sums as soon as they are there, so that none of them is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Of a weight's gradients: Σ|g|, Σ g²; of the gradients of a linear's outputs: Σ over tokens of g².
L1, L2, OUTPUT = "l1", "l2", "output"


@dataclass
class Fold:
    """Sums by full name; `scale` is what the current gradients are multiplied by."""

    sums: dict[str, Tensor]
    scale: float = 1.0

    def true(self, gradient: Tensor) -> Tensor:
        """A gradient in float32, without the scale."""
        return gradient.float() if self.scale == 1.0 else gradient.float() / self.scale


@contextmanager
def folding(linears: Mapping[str, nn.Linear], norm: str) -> Iterator[Fold]:
    """Fold the gradients of linears while the block runs.

    Args:
        linears: by full name.
        norm: L1 and L2 make sums [out, in] of the weights' gradients, OUTPUT sums [out].
    """
    with _outputs(linears) if norm == OUTPUT else _weights(linears, norm) as fold:
        yield fold


@contextmanager
def _weights(linears: Mapping[str, nn.Linear], norm: str) -> Iterator[Fold]:
    weights = {name: linear.weight for name, linear in linears.items()}
    fold = Fold({n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()})

    def hook(name: str) -> Callable[[Tensor], None]:
        def accumulate(weight: Tensor) -> None:
            if weight.grad is None:
                return
            gradient = fold.true(weight.grad)
            weight.grad = None
            if norm == L1:
                fold.sums[name] += gradient.abs_()
            else:
                fold.sums[name].addcmul_(gradient, gradient)

        return accumulate

    handles = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(hook(name)))
    try:
        yield fold
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.requires_grad_(False)


@contextmanager
def _outputs(linears: Mapping[str, nn.Linear]) -> Iterator[Fold]:
    """The inputs of the linears must require a gradient: their weights do not."""
    fold = Fold({
        name: torch.zeros(linear.out_features, device=linear.weight.device)
        for name, linear in linears.items()
    })  # fmt: skip

    def after(name: str) -> Any:
        def add(gradient: Tensor) -> None:
            by_token = fold.true(gradient).reshape(-1, gradient.shape[-1])
            fold.sums[name] += torch.linalg.vector_norm(by_token, dim=0).square_()

        def watch(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return watch

    handles = [linear.register_forward_hook(after(name)) for name, linear in linears.items()]
    try:
        yield fold
    finally:
        for handle in handles:
            handle.remove()
