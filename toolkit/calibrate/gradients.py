"""Gradient norms: ‖G_ij‖ over the calibration samples, of the dense model's own loss.

G_s is the gradient of the mean next-token cross-entropy of sample s. The backward pass runs one
decoder layer at a time: inputs of all layers are stored on the way up; on the way down each layer
is run again from its inputs and differentiated. Only one layer is ever in memory. Where memory
has room for all layers, that second run is saved: each sample goes up and down at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.calibrate.activations import Activations, fits
from gblm.calibrate.frame import Call, capture, loss
from gblm.calibrate.ranks import ALONE, Ranks
from gblm.errors import InputError, UsageError
from gblm.model.layers import Layers
from gblm.model.linears import linears

# Of a weight's gradients: Σ|g|, Σ g²; of the gradients of a linear's outputs: Σ over tokens of g².
L1, L2, OUTPUT = "l1", "l2", "output"
# float16 gradients are kept near this size: in the middle of the exponents float16 has.
HALF_TARGET = 2.0**6


@dataclass(frozen=True)
class Gradients:
    """How to take gradient norms.

    Attributes:
        norm: over samples, of a weight's gradients: "l1": Σ|g|, "l2": √Σ g². With "output" it is
            that of the linear's outputs, Σ over samples and tokens of (∂L/∂y)², and no gradient of
            a weight is taken.
        names: full names of the linears to differentiate.
        scratch: folder for the layers' inputs; None keeps them in memory.
        resident: hold all layers and their sums at once; not for float16, whose gradients need
            a scale for each layer.
        on_step: called as often as `num_steps` says, for a progress bar.
    """

    norm: str
    names: frozenset[str]
    scratch: Path | None = None
    resident: bool = False
    on_step: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        if self.norm not in (L1, L2, OUTPUT):
            raise UsageError(f"gradient norm {self.norm!r} is unknown: use l1 or l2.")


def gradient_norms(
    layers: Layers, samples: Sequence[Tensor], how: Gradients, ranks: Ranks = ALONE
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Norms over the samples, decoder layer by decoder layer, the last layer first.

    Args:
        layers: of a causal language model; the weights are not changed.
        samples: this rank's token ids, each [tokens] int64. A sample is one calibration sequence.
        how: see Gradients.
        ranks: the processes that share the samples.

    Yields:
        Index of the decoder layer; float32 by full name, summed over all ranks: [out, in], with the
        norm "output" [out].

    Raises:
        InputError: a loss or gradient is not finite.
    """
    layers.load_frame(head=True)
    rows = [sample.reshape(1, -1) for sample in samples]
    by_layer = _resident(layers, rows, how) if how.resident else _streamed(layers, rows, how)
    for index, sums in by_layer:
        for total in sums.values():
            ranks.sum_(total)
        yield index, {name: _finish(name, total, how) for name, total in sums.items()}


def resident_fits(parameters: int, weights: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether gradients are taken with all layers, and a sum per weight, in memory at once.

    Args:
        parameters: of all decoder layers.
        weights: to be differentiated.
        dtype: of the layers.
        device: where they would lie.
    """
    return fits(parameters * dtype.itemsize + weights * 4, device) and dtype != torch.float16


def num_steps(layers: Layers, num_samples: int, resident: bool) -> int:
    """How often `on_step` will be called."""
    return num_samples if resident else 2 * len(layers)


def _resident(
    layers: Layers, rows: Sequence[Tensor], how: Gradients
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Every sample up and down through all layers at once."""
    with ExitStack() as stack:
        modules = [stack.enter_context(layers.open(index)) for index in range(len(layers))]
        wanted = [_wanted(layers, index, module, how) for index, module in enumerate(modules)]
        every = {name: linear for own in wanted for name, linear in own.items()}
        fold = stack.enter_context(folding(every, how.norm))
        for sample, (hidden, call) in enumerate(capture(layers, rows)):
            with torch.enable_grad():
                hidden.requires_grad_(how.norm == OUTPUT)
                for index, module in enumerate(modules):
                    hidden = _finite(layers, index, call.run(module, index, hidden), sample)
                _finite_loss(layers, rows[sample], hidden, sample).backward()
            how.on_step()
    for index in reversed(range(len(layers))):
        yield index, {name: fold.sums.pop(name) for name in wanted[index]}


def _streamed(
    layers: Layers, rows: Sequence[Tensor], how: Gradients
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """All samples up, then all samples down, layer by layer."""
    inputs, calls = _forward(layers, rows, how)
    errors = _Errors(how.scratch)
    for index, row in enumerate(rows):
        hidden = inputs[-1].get(index, layers.device).requires_grad_(True)
        with torch.enable_grad():
            value = _finite_loss(layers, row, hidden, index)
            (error,) = torch.autograd.grad(value * errors.scale(hidden.dtype), hidden)
        errors.append(error, errors.scale(hidden.dtype))
    inputs.pop().clear()
    for index in reversed(range(len(layers))):
        sums = _backward(layers, index, inputs[index], calls, errors, how)
        inputs.pop().clear()
        yield index, sums
        how.on_step()


def _finite(layers: Layers, index: int, hidden: Tensor, sample: int) -> Tensor:
    if not bool(hidden.isfinite().all()):
        raise InputError(
            f"{layers.name(index)}: its output on calibration sample {sample} is not finite. "
            "Run with --dtype float32, or check the model's weights."
        )
    return hidden


def _finite_loss(layers: Layers, row: Tensor, hidden: Tensor, sample: int) -> Tensor:
    value = loss(layers, row, hidden)
    if not bool(value.isfinite()):
        raise InputError(f"calibration sample {sample}: the loss is {value.item()}.")
    return value


def _wanted(layers: Layers, index: int, module: nn.Module, how: Gradients) -> dict[str, nn.Linear]:
    """The linears to differentiate, by full name."""
    named = {f"{layers.name(index)}.{local}": m for local, m in linears(module).items()}
    return {name: linear for name, linear in named.items() if name in how.names}


@torch.no_grad()
def _forward(
    layers: Layers, rows: Sequence[Tensor], how: Gradients
) -> tuple[list[Activations], list[Call]]:
    """The inputs of every decoder layer, and the output of the last one."""

    def place(index: int) -> Activations:
        return Activations(how.scratch / f"inputs-{index:05d}" if how.scratch else None)

    stores, calls = [place(0)], []
    for states, call in capture(layers, rows):
        stores[0].append(states)
        calls.append(call)
    for index in range(len(layers)):
        stores.append(place(index + 1))
        with layers.open(index) as module:
            for sample, call in enumerate(calls):
                states = stores[index].get(sample, layers.device)
                stores[-1].append(_finite(layers, index, call.run(module, index, states), sample))
        how.on_step()
    return stores, calls


def _backward(
    layers: Layers,
    index: int,
    inputs: Activations,
    calls: Sequence[Call],
    errors: _Errors,
    how: Gradients,
) -> dict[str, Tensor]:
    """Run one layer again for every sample and differentiate it; `errors` becomes its input's."""
    with layers.open(index) as module:
        wanted = _wanted(layers, index, module, how)
        with folding(wanted, how.norm) as fold:
            for sample, call in enumerate(calls):
                hidden = inputs.get(sample, layers.device)
                hidden.requires_grad_(index > 0 or how.norm == OUTPUT)
                error, fold.scale = errors.get(sample, layers.device)
                if not wanted and index == 0:
                    break
                with torch.enable_grad():
                    out = call.run(module, index, hidden)
                torch.autograd.backward(out, error)
                if hidden.grad is not None:
                    errors.replace(sample, hidden.grad, fold.scale)
    return fold.sums


class _Errors:
    """The loss's gradient at the current layer's output, per sample.

    float16 ones are kept multiplied by a power of two: as they are, most would round to zero.
    """

    def __init__(self, scratch: Path | None) -> None:
        self._stored = Activations(scratch / "errors" if scratch else None)
        self._scales: list[float] = []

    @staticmethod
    def scale(dtype: torch.dtype) -> float:
        """What the loss is multiplied by."""
        return HALF_TARGET if dtype == torch.float16 else 1.0

    def append(self, error: Tensor, scale: float) -> None:
        """Add a sample's error, which is multiplied by `scale`."""
        self._scales.append(1.0)
        self._stored.append(error)
        self.replace(len(self._scales) - 1, error, scale)

    def replace(self, sample: int, error: Tensor, scale: float) -> None:
        """Put the next error in the place of a sample's."""
        if error.dtype == torch.float16:
            largest = float(error.abs().max())
            if 0 < largest < math.inf:
                factor = 2.0 ** round(math.log2(HALF_TARGET / largest))
                error, scale = (error.float() * factor).half(), scale * factor
        self._stored[sample] = error
        self._scales[sample] = scale

    def get(self, sample: int, device: torch.device) -> tuple[Tensor, float]:
        """A sample's error and what it is multiplied by."""
        return self._stored.get(sample, device), self._scales[sample]


def _finish(name: str, total: Tensor, how: Gradients) -> Tensor:
    if not bool(total.isfinite().all()):
        raise InputError(f"{name}: its gradient is not finite. Run with --dtype float32.")
    return total.sqrt_() if how.norm == L2 else total


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
