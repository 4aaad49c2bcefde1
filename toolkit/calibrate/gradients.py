"""Gradient norms: ‖G_ij‖ over the calibration samples, of the dense model's own loss.

G_s is the gradient of the mean next-token cross-entropy of sample s. The backward pass runs one
decoder layer at a time: inputs of all layers are stored on the way up; on the way down each layer
is run again from its inputs and differentiated. Only one layer is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.calibrate.activations import Activations, place, stream_bytes
from gblm.calibrate.experts import Use, counted, lend, scarce
from gblm.calibrate.frame import Call, capture, loss
from gblm.calibrate.ranks import ALONE, Ranks
from gblm.errors import InputError, UsageError
from gblm.model.experts import expert_linears
from gblm.model.layers import Layers
from gblm.model.linears import linears
from gblm.progress import Progress, no_progress

# Of a weight's gradients: Σ|g|, Σ g²; of the gradients of a linear's outputs: Σ over tokens of g².
L1, L2, OUTPUT = "l1", "l2", "output"


def gradient_norms(
    layers: Layers,
    samples: Sequence[Tensor],
    names: Collection[str],
    norm: str,
    *,
    scratch: Path | None = None,
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Take norms over the samples, decoder layer by decoder layer, the last layer first.

    A float16 model computes in float32: most of its gradients would round to zero.

    Args:
        layers: of a causal language model; the weights are not changed.
        samples: this rank's token ids, each [tokens] int64. A sample is one calibration sequence.
        names: full names of the linears to differentiate.
        norm: over samples, of a weight's gradients: "l1": Σ|g|, "l2": √Σ g². With "output" it is
            that of the linear's outputs, Σ over samples and tokens of (∂L/∂y)², and no gradient of
            a weight is taken.
        scratch: folder for the layers' inputs, if memory is short; None keeps them in memory.
        progress: for a progress bar.
        ranks: the processes that share the samples.

    Yields:
        Index of the decoder layer; float32 by full name, summed over all ranks: [out, in], with the
        norm "output" [out].

    Raises:
        InputError: a loss or gradient is not finite.
        UsageError: the norm is unknown.
    """
    if norm not in (L1, L2, OUTPUT):
        raise UsageError(f"gradient norm {norm!r} is unknown: use l1 or l2.")
    layers = layers.in_float32() if layers.dtype == torch.float16 else layers
    layers.load_frame(head=True)
    rows = [sample.reshape(1, -1) for sample in samples]
    scratch = place(scratch, (len(layers) + 2) * stream_bytes(layers, rows))
    step = progress("gradients", 2 * len(layers))
    inputs, calls = _forward(layers, rows, scratch, step)
    # The loss's gradient at the current layer's output, per sample.
    errors = _errors_behind(layers, rows, inputs.pop(), scratch)
    for index in reversed(range(len(layers))):
        sums, uses = _backward(layers, index, inputs[index], calls, errors, names, norm)
        inputs.pop().clear()
        for total in sums.values():
            ranks.sum_(total)
        layer = layers.name(index)
        few = scarce(uses, ranks, layer, "gradients") if sums else set()
        own = {name.removeprefix(f"{layer}."): total for name, total in sums.items()}
        lend(few, own, expert_linears(layers.modules[index]))
        yield index, {name: _finish(name, total, norm) for name, total in sums.items()}
        step()


def _errors_behind(
    layers: Layers, rows: Sequence[Tensor], outputs: Activations, scratch: Path | None
) -> Activations:
    """Differentiate the loss of each sample by the last decoder layer's output, and forget that."""
    errors = Activations(scratch / "errors" if scratch else None)
    for sample, row in enumerate(rows):
        hidden = outputs.get(sample, layers.device).requires_grad_(True)
        with torch.enable_grad():
            value = loss(layers, row, hidden)
            if not bool(value.isfinite()):
                raise InputError(f"calibration sample {sample}: the loss is {value.item()}.")
            (error,) = torch.autograd.grad(value, hidden)
        errors.append(error)
    outputs.clear()
    return errors


def _finite(layers: Layers, index: int, hidden: Tensor, sample: int) -> Tensor:
    if not bool(hidden.isfinite().all()):
        raise InputError(
            f"{layers.name(index)}: its output on calibration sample {sample} is not finite. "
            "Run with --dtype float32, or check the model's weights."
        )
    return hidden


def _wanted(
    layers: Layers, index: int, module: nn.Module, names: Collection[str]
) -> dict[str, nn.Linear]:
    """Give the linears to differentiate, by full name."""
    named = {f"{layers.name(index)}.{local}": m for local, m in linears(module).items()}
    return {name: linear for name, linear in named.items() if name in names}


@torch.no_grad()
def _forward(
    layers: Layers, rows: Sequence[Tensor], scratch: Path | None, step: Callable[[], None]
) -> tuple[list[Activations], list[Call]]:
    """Return the inputs of every decoder layer, and the output of the last one."""

    def store(index: int) -> Activations:
        return Activations(scratch / f"inputs-{index:05d}" if scratch else None)

    stores, calls = [store(0)], []
    for states, call in capture(layers, rows):
        stores[0].append(states)
        calls.append(call)
    for index in range(len(layers)):
        stores.append(store(index + 1))
        with layers.open(index) as module:
            for sample, call in enumerate(calls):
                states = stores[index].get(sample, layers.device)
                stores[-1].append(_finite(layers, index, call.run(module, index, states), sample))
        step()
    return stores, calls


def _backward(
    layers: Layers,
    index: int,
    inputs: Activations,
    calls: Sequence[Call],
    errors: Activations,
    names: Collection[str],
    norm: str,
) -> tuple[dict[str, Tensor], dict[str, Use]]:
    """Run one layer again for every sample and differentiate it; `errors` becomes its input's.

    Returns:
        Sums by full name of the linear, and the use of each expert by its local name.
    """
    with layers.open(index) as module:
        wanted = _wanted(layers, index, module, names)
        with folding(wanted, norm) as sums, counted(module) as uses:
            for sample, call in enumerate(calls):
                hidden = inputs.get(sample, layers.device)
                hidden.requires_grad_(index > 0 or norm == OUTPUT)
                if not wanted and index == 0:
                    break
                with torch.enable_grad():
                    out = call.run(module, index, hidden)
                torch.autograd.backward(out, errors.get(sample, layers.device))
                if hidden.grad is not None:
                    errors[sample] = hidden.grad
    return sums, uses


def _finish(name: str, total: Tensor, norm: str) -> Tensor:
    if not bool(total.isfinite().all()):
        raise InputError(f"{name}: its gradient is not finite. Run with --dtype float32.")
    return total.sqrt_() if norm == L2 else total


@contextmanager
def folding(linears: Mapping[str, nn.Linear], norm: str) -> Iterator[dict[str, Tensor]]:
    """Fold the gradients of linears while the block runs; gives float32 sums by full name.

    Args:
        linears: by full name.
        norm: L1 and L2 make sums [out, in] of the weights' gradients, OUTPUT sums [out].
    """
    with _outputs(linears) if norm == OUTPUT else _weights(linears, norm) as sums:
        yield sums


@contextmanager
def _weights(linears: Mapping[str, nn.Linear], norm: str) -> Iterator[dict[str, Tensor]]:
    weights = {name: linear.weight for name, linear in linears.items()}
    sums = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()}

    def hook(name: str) -> Callable[[Tensor], None]:
        def accumulate(weight: Tensor) -> None:
            if weight.grad is None:
                return
            gradient = weight.grad.float()
            weight.grad = None
            if norm == L1:
                sums[name] += gradient.abs_()
            else:
                sums[name].addcmul_(gradient, gradient)

        return accumulate

    handles = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(hook(name)))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.requires_grad_(False)


@contextmanager
def _outputs(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """The inputs of the linears must require a gradient: their weights do not."""
    sums = {
        name: torch.zeros(linear.out_features, device=linear.weight.device)
        for name, linear in linears.items()
    }

    def after(name: str) -> Any:
        def add(gradient: Tensor) -> None:
            by_token = gradient.float().reshape(-1, gradient.shape[-1])
            sums[name] += torch.linalg.vector_norm(by_token, dim=0).square_()

        def watch(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return watch

    handles = [linear.register_forward_hook(after(name)) for name, linear in linears.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
