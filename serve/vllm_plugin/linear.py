"""Serve a packed linear: create its parts, let vLLM load and cut them, prepare, multiply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
)

from gblm import kernels
from gblm.errors import CheckpointError, PatternError
from gblm.kernels import Backend
from gblm.serve.vllm_plugin.ragged import Pieces, RaggedParameter, give_back_memory
from gblm.sparse.formats import Format, Shape, TensorSpec
from gblm.sparse.formats.rectangle import RectangleFormat
from gblm.sparse.values import ROW

# −128; twice −8: codes, but no row of a real weight holds nothing else.
NO_CODE = {torch.int8: -0x80, torch.uint8: 0x88}
MISSING = "{}: values are missing in the checkpoint, or NaN."
NoteChoice = Callable[[Backend, Sequence[str]], None]
MAX_RANKS = 64  # looked at for the way out of a refusal


@register_weight_loader_v2_supported_method
class SparseLinearMethod(LinearMethodBase):
    """The method serves one packed linear; vLLM makes an instance for each layer."""

    def __init__(self, fmt: Format, name: str, note_choice: NoteChoice) -> None:
        self.fmt = fmt
        self.name = name
        self.note_choice = note_choice
        self.shape: Shape = (0, 0)
        self.dtype = torch.bfloat16
        self.backend: Backend | None = None
        self.dense: UnquantizedLinearMethod | None = None
        self.slots: tuple[str, ...] = ()
        self.pieces: Pieces | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register an empty parameter for every part of the format's layout."""
        self.shape = (sum(output_partition_sizes), input_size_per_partition)
        self.dtype = params_dtype
        loader = extra_weight_attrs["weight_loader"]
        check_shard(self.fmt, self.name, self.shape, input_size)
        if not isinstance(self.fmt, RectangleFormat):
            self.pieces = Pieces(self.fmt, self.name, output_partition_sizes, self.shape[1])
        for part, spec in self.fmt.layout(self.shape, self.dtype).items():
            if self.pieces is None:
                parameter = _rectangle(self.fmt, part, spec, loader)
            else:
                parameter = RaggedParameter(
                    data=torch.empty(0, dtype=spec.dtype), weight_loader=loader, part=part,
                    pieces=self.pieces,
                )  # fmt: skip
            layer.register_parameter(part, parameter)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check the loaded parts and turn them into the layout of the chosen backend."""
        parts = self._loaded_parts(layer)
        if self.fmt.values.is_float:
            refuse_unloaded(self.name, parts["values"])
        self.fmt.validate(self.name, parts, self.shape)
        if self.fmt.values.is_float:
            # vLLM may serve in another dtype than the stored one; it says so in its own log.
            parts["values"] = self.fmt.cast(self.name, parts["values"], self.dtype)
        self._prepare(layer, parts)
        parts.clear()
        give_back_memory()

    def _prepare(self, layer: torch.nn.Module, parts: dict[str, Tensor]) -> None:
        forced, device = kernels.requested_backend(), parts["values"].device
        backend, reasons = kernels.select(self.fmt, self.shape, self.dtype, device, forced)
        prepared = backend.prepare(self.fmt, parts, self.shape, self.dtype)
        self.note_choice(backend, reasons)
        for part in self.fmt.parts:
            delattr(layer, part)
        if not backend.packed:
            # vLLM's own dense path, so that tokens equal those of the dense model.
            layer.register_parameter("weight", Parameter(prepared[0], requires_grad=False))
            self.dense = UnquantizedLinearMethod()
            self.dense.process_weights_after_loading(layer)
            return
        self.backend, self.slots = backend, tuple(map(_slot, range(len(prepared))))
        for slot, tensor in zip(self.slots, prepared, strict=True):
            layer.register_parameter(slot, Parameter(tensor, requires_grad=False))

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply: x [..., in] → [..., out]."""
        if self.dense is not None:
            out: Tensor = self.dense.apply(layer, x, bias)
            return out
        if self.backend is None:
            raise RuntimeError(f"{self.name} was used before its weight was loaded.")
        prepared = [getattr(layer, slot) for slot in self.slots]
        out = kernels.linear(x, prepared, self.shape, self.fmt, self.backend)
        return out if bias is None else out + bias

    def _loaded_parts(self, layer: torch.nn.Module) -> dict[str, Tensor]:
        if self.pieces is None:
            parts = {part: getattr(layer, part).data for part in self.fmt.parts}
            if not self.fmt.values.is_float:
                self._refuse_unloaded_rows(parts["values"])
            return parts
        device = layer.get_parameter("values").device
        whole = self.pieces.hand_over()
        self.pieces = None
        return {part: tensor.to(device) for part, tensor in whole.items()}

    def _refuse_unloaded_rows(self, codes: Tensor) -> None:
        """Refuse whole rows of what codes were filled with: pieces that the loader skipped."""
        if bool((codes == NO_CODE[codes.dtype]).all(dim=1).any()):
            raise CheckpointError(
                f"{self.name}: values are missing in the checkpoint, or a row holds nothing but "
                "the least code."
            )


class Watched:
    """Makes weights full of NaN before vLLM loads them, so that what was not loaded is refused.

    vLLM itself would serve such memory: it keeps account of loaded weights only where a model has
    no quantization config.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **attributes: Any) -> None:
        """Make the weight as vLLM does, filled with NaN."""
        super().create_weights(layer, *sizes, **attributes)  # type: ignore[misc]
        layer.get_parameter("weight").data.fill_(math.nan)

    def refuse_unloaded(self, layer: torch.nn.Module) -> None:
        """Raise CheckpointError when the weight, or a part of it, was not loaded."""
        refuse_unloaded(self.name, layer.get_parameter("weight").data)


@register_weight_loader_v2_supported_method
class DenseLinearMethod(Watched, UnquantizedLinearMethod):
    """A linear that is not packed runs as vLLM's own."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Refuse what was not loaded; then do what vLLM does."""
        self.refuse_unloaded(layer)
        super().process_weights_after_loading(layer)


def check_shard(fmt: Format, name: str, shape: Shape, input_size: int) -> None:
    """Refuse a cut through a byte of a part or through a group; name sizes that work.

    Args:
        fmt: of the weight.
        name: of the linear, for messages.
        shape: [out, in] of one rank.
        input_size: `in` of all ranks.
    """
    num_ranks = input_size // shape[1]
    why = _shard_refusal(fmt, name, shape, num_ranks)
    if why is None:
        return
    fits = [
        str(ranks)
        for ranks in range(1, MAX_RANKS + 1)
        if input_size % ranks == 0
        and _shard_refusal(fmt, name, (shape[0], input_size // ranks), ranks) is None
    ]
    raise CheckpointError(
        f"{why} {input_size} columns were split over {num_ranks} tensor-parallel ranks; sizes "
        f"that work: {', '.join(fits) or 'none'}."
    )


def _shard_refusal(fmt: Format, name: str, shape: Shape, num_ranks: int) -> str | None:
    """Say why one of so many ranks cannot hold its shape; None when it can."""
    try:
        fmt.check_shape(name, shape)
    except PatternError as error:
        return str(error)
    if num_ranks == 1 or not isinstance(fmt, RectangleFormat):
        return None
    within = fmt.values.in_nibbles and fmt.kept_per_row(shape[1]) % 2
    return (
        f"{name}: {fmt.values.kind} codes of {shape[1]} columns end within a byte."
        if within
        else None
    )


def refuse_unloaded(name: str, values: Tensor) -> None:
    """Refuse values that were filled with NaN and are not loaded, or not wholly.

    Raises:
        CheckpointError: there is a NaN.
    """
    # amax gives NaN when there is one, and needs no memory for an answer per value.
    if values.numel() and bool(values.amax().isnan()):
        raise CheckpointError(MISSING.format(name))


def _rectangle(fmt: Format, part: str, spec: TensorSpec, loader: Any) -> BasevLLMParameter:
    """Make an empty part, which vLLM cuts like a dense weight: at the same relative place.

    NaN, rows of the least code and an empty bitmask are refused later, should the loader skip this
    layer.
    """
    fill = math.nan if spec.dtype.is_floating_point else 0
    if part == "values":
        fill = NO_CODE.get(spec.dtype, fill)
    data = torch.full(spec.shape, fill, dtype=spec.dtype)
    if part == "scales" and fmt.values.group_size == ROW:
        # What belongs to a whole row goes to every rank that holds some of its columns.
        return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
    return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)


def _slot(index: int) -> str:
    """Name a prepared tensor; LoRA wrappers look for `weight_packed`."""
    return "weight_packed" if index == 0 else f"weight_packed_{index}"
