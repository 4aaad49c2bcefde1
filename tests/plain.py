"""The papers' pruning algorithms written plainly: whole model in memory, one step after another.

Its structure is that of the published code of Wanda, SparseGPT and GBLM-Pruner, less its checks,
files and printing. The yardstick of test_published_algorithms.py and of
methods/test_sparsegpt.py; not for use.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gblm.sparse.patterns import NM, Pattern

SCALE, BLOCK, DAMP = 100, 128, 0.01  # of GBLM's gradients; of SparseGPT


def observe(value: Tensor) -> Callable[..., None]:
    """A hook: the mean over samples of Σ over tokens x² [in] (Wanda), or of 2·x·xᵀ [in, in]."""
    seen = 0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal seen
        columns = inputs[0].reshape(-1, inputs[0].shape[-1]).t()
        value.mul_(seen / (seen + 1))
        seen += 1
        if value.dim() == 1:
            value.add_(torch.norm(columns.float(), p=2, dim=1) ** 2 / seen)
        else:
            columns = math.sqrt(2 / seen) * columns.float()
            value.add_(columns @ columns.t())

    return hook


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """By their names in the module."""
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def plain_gradients(model: Any, windows: Tensor, norm: str) -> dict[str, Tensor]:
    """Backward through the whole model per sample; the l1 or l2 norm over samples, in float16."""
    dtype = torch.float16 if norm == "l1" else torch.float32
    found = linears(model.model.layers)
    sums = {name: torch.zeros_like(m.weight, dtype=dtype) for name, m in found.items()}
    for ids in windows.split(1):
        model(input_ids=ids, labels=ids).loss.backward()
        for name, linear in found.items():
            gradient = torch.abs(linear.weight.grad.detach().float() * SCALE)
            sums[name] += gradient.half() if norm == "l1" else gradient**2
        model.zero_grad()
    return sums if norm == "l1" else {name: torch.sqrt(t).half() for name, t in sums.items()}


@torch.no_grad()
def plain_prune(
    model: Any, windows: Tensor, method: str, pattern: Pattern, gradients: dict[str, Tensor]
) -> None:
    """Per layer: all samples forward with hooks, prune the linears, all samples forward again."""
    hidden, kwargs = first_inputs(model, windows)
    outputs, dims = torch.zeros_like(hidden), 2 if method == "sparsegpt" else 1
    for index, layer in enumerate(model.model.layers):
        found = linears(layer)
        stats = {name: torch.zeros([m.in_features] * dims) for name, m in found.items()}
        handles = [m.register_forward_hook(observe(stats[name])) for name, m in found.items()]
        for sample, inputs in enumerate(hidden):
            outputs[sample] = layer(inputs.unsqueeze(0), **kwargs)
        for handle in handles:
            handle.remove()
        for name, linear in found.items():
            weight = linear.weight.data
            if method == "sparsegpt":
                linear.weight.data = update_columns(weight.clone(), stats[name], pattern)
                continue
            metric = torch.abs(weight) * torch.sqrt(stats[name].reshape(1, -1))
            if method == "gblm":
                metric = metric + torch.abs(weight) * torch.abs(gradients[f"{index}.{name}"])
            weight[lowest(metric, pattern)] = 0
        for sample, inputs in enumerate(hidden):
            outputs[sample] = layer(inputs.unsqueeze(0), **kwargs)
        hidden, outputs = outputs, hidden


def first_inputs(model: Any, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the first layer is called with; the other layers get the same keyword arguments."""
    hidden: list[Tensor] = []
    caught: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        caught.update(kwargs)
        raise InterruptedError

    handle = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for ids in windows.split(1):
        with contextlib.suppress(InterruptedError):
            model(input_ids=ids, use_cache=False)
    handle.remove()
    return torch.cat(hidden), caught


def lowest(metric: Tensor, pattern: Pattern) -> Tensor:
    """Mask of what goes: a topk per group of columns, or a stable sort of every row."""
    mask = torch.zeros_like(metric) == 1
    if isinstance(pattern, NM):
        for column in range(0, metric.shape[1], pattern.group_m):
            group = metric[:, column : column + pattern.group_m].float()
            num_pruned = pattern.group_m - pattern.keep_n
            mask.scatter_(1, column + torch.topk(group, num_pruned, largest=False)[1], True)
    else:
        order = torch.sort(metric, dim=-1, stable=True)[1]
        mask.scatter_(1, order[:, : int(metric.shape[1] * pattern.sparsity)], True)
    return mask


# What goes of a block of columns or of a group: from scores [out, columns], and the first column.
Choose = Callable[[Tensor, Pattern, int], Tensor]


def choose_as_published(score: Tensor, pattern: Pattern, first: int) -> Tensor:
    """The lowest of a group; of a block one weight more than the sparsity says, and all ties."""
    if isinstance(pattern, NM):
        return lowest(score, pattern)
    return score <= torch.sort(score.flatten())[0][int(score.numel() * pattern.sparsity)]


def update_columns(
    weight: Tensor, hessian: Tensor, pattern: Pattern, choose: Choose = choose_as_published,
    size: int = BLOCK,
) -> Tensor:  # fmt: skip
    """SparseGPT: column by column, what a cut breaks is mended in the columns to its right."""
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(DAMP * torch.mean(torch.diag(hessian)))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for begin in range(0, weight.shape[1], size):
        block, rest = slice(begin, begin + size), slice(begin + size, None)
        work = weight[:, block].clone()
        weight[:, block], error = prune_block(
            work, upper[block, block], pattern, lambda s, b=begin: choose(s, pattern, b)
        )
        weight[:, rest] -= error @ upper[block, rest]
    return weight


def prune_block(
    work: Tensor, upper: Tensor, pattern: Pattern, choose: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """One block of columns: the pruned weights, and the error to carry to the right of it."""
    pruned, error = torch.zeros_like(work), torch.zeros_like(work)
    mask = torch.zeros_like(work) == 1
    diagonal = torch.diag(upper).reshape(1, -1)
    if not isinstance(pattern, NM):
        mask = choose(work**2 / diagonal**2)
    for column in range(work.shape[1]):
        if isinstance(pattern, NM) and column % pattern.group_m == 0:
            group = slice(column, column + pattern.group_m)
            mask[:, group] = choose(work[:, group] ** 2 / diagonal[:, group] ** 2)
        old, pivot = work[:, column], upper[column, column]
        new = old.clone()
        new[mask[:, column]] = 0
        pruned[:, column] = new
        wrong = (old - new) / pivot
        work[:, column:] -= wrong.unsqueeze(1) @ upper[column, column:].unsqueeze(0)
        error[:, column] = wrong
    return pruned, error
