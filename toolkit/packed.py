"""Packed models in transformers: SparseLinear, and loading a packed folder.

Importing this module registers `quant_method: gblm` with transformers, so that
`AutoModelForCausalLM.from_pretrained(DIR)` works as well as `load(DIR)`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gblm import kernels
from gblm.errors import CheckpointError, GblmError, InputError
from gblm.kernels import Backend
from gblm.kernels.experts import grouped, join
from gblm.model import experts, loading
from gblm.model.folder import ModelFolder
from gblm.model.loading import check_device, from_files, model_config, named_skeleton
from gblm.model.packed_reader import PackedLinear, PackedReader
from gblm.sparse.formats import VALUE_DTYPES, Format, Shape
from gblm.sparse.formats.manifest import QUANT_METHOD, VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Old LLaMA checkpoints hold what is computed from config.json.
LEFT_OVER = ".rotary_emb.inv_freq"


class SparseLinear(nn.Module):
    """A linear whose weight stays in the parts of its format until a backend prepares them."""

    def __init__(self, linear: PackedLinear, bias: nn.Parameter | None) -> None:
        """Empty parts on the meta device, to be filled from the checkpoint."""
        super().__init__()
        self.fmt: Format = linear.fmt
        self.shape: Shape = linear.shape
        self.backend: Backend | None = None
        self.num_prepared = 0
        for part, (shape, dtype) in linear.headers.items():
            data = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(part, nn.Parameter(data, requires_grad=False))
        self.bias = bias

    def check(self, name: str, dtype: torch.dtype | None) -> None:
        """Check the loaded parts.

        Raises:
            CheckpointError: they are no weight of this format, or leave the range of the dtype.
        """
        parts = self.parts
        self.fmt.validate(name, parts, self.shape)
        if self.fmt.values.is_float and dtype is not None:
            self.fmt.cast(name, parts["values"], dtype)

    def prepare(
        self, dtype: torch.dtype | None, forced: str | None, device: str | None = None
    ) -> tuple[Backend, Sequence[str]]:
        """Turn the checked parts into the layout of the best backend.

        Args:
            dtype: of the activations, and of floating values in memory; None keeps the
                checkpoint's, and takes bfloat16 for codes. Codes and scales are never cast.
            forced: a backend that must be taken.
            device: where the weight will be used; None: where it is. The layout is made there.

        Returns:
            The backend, and why better ones refused.
        """
        parts = {part: tensor.to(device) for part, tensor in self.parts.items()}
        if self.fmt.values.is_float:
            dtype = dtype or parts["values"].dtype
            parts["values"] = parts["values"].to(dtype)
        dtype, where = dtype or torch.bfloat16, parts["values"].device
        self.fmt, known = self.fmt.widened(), self.fmt.widen(parts)
        backend, reasons = kernels.select(self.fmt, self.shape, dtype, where, forced)
        prepared = backend.prepare(self.fmt, known, self.shape, dtype)
        for part in self.fmt.parts:
            delattr(self, part)
        for index, tensor in enumerate(prepared):
            self.register_buffer(f"prepared_{index}", tensor, persistent=False)
        self.backend, self.num_prepared = backend, len(prepared)
        return backend, reasons

    @property
    def parts(self) -> dict[str, Tensor]:
        """Give the loaded parts by name; `prepare` takes them away."""
        return {part: getattr(self, part).data for part in self.fmt.parts}

    @property
    def prepared(self) -> list[Tensor]:
        """Give the tensors that the backend multiplies with."""
        return [getattr(self, f"prepared_{index}") for index in range(self.num_prepared)]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in] with the weight: [..., out]."""
        if self.backend is None:
            raise RuntimeError("SparseLinear was used before its weight was loaded.")
        if not self.backend.packed:
            # Rounded once, bias included, as in the dense model.
            return nn.functional.linear(x, self.prepared[0], self.bias)
        out = kernels.linear(x, self.prepared, self.shape, self.fmt, self.backend)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """Describe shape, format and backend."""
        name = self.backend.name if self.backend else "not loaded"
        return f"in={self.shape[1]}, out={self.shape[0]}, format={self.fmt.spec}, backend={name}"


def group_experts(model: Any) -> None:
    """Let one call of the kernels run all experts of a layer, where `cpu` has prepared them all."""
    for _, block in experts.blocks(model):
        own = [[expert.get_submodule(name) for name in expert.names] for expert in block]
        linears = [linear for expert in own for linear in expert]
        packed = all(
            isinstance(linear, SparseLinear) and linear.backend is kernels.BACKENDS["cpu"]
            for linear in linears
        )
        if not packed or model.config.get_text_config().hidden_act != "silu":
            continue
        panels, places = join([[linear.prepared[0] for linear in expert] for expert in own])
        for linear, (start, size) in zip(linears, places.reshape(-1, 2).tolist(), strict=True):
            linear.prepared_0 = panels[start : start + size]
        block.grouped = partial(grouped, panels=panels, places=places)


def load(
    folder: str | Path | ModelFolder,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load a packed folder as a transformers model.

    Args:
        folder: a packed folder or a hub id of one.
        backend: a name of `gblm.kernels.BACKENDS`; the best one if None.
        dtype: of activations and floating values; None keeps the checkpoint's.
        device: where to put the model.

    Raises:
        CheckpointError: the folder is not an intact packed checkpoint.
    """
    source, target = ModelFolder.open(folder), check_device(device)
    check_loadable(source)
    try:
        config = model_config(source)
        config.quantization_config |= {"backend": backend, "device": str(target)}
        model = from_files(source, config, dtype)
    except GblmError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} could not be loaded by transformers: {error}") from error
    return model.to(target)


def check_loadable(folder: ModelFolder) -> None:
    """Hold the packed weights against the model that config.json describes, before loading.

    Costs headers and a model without memory; a config that claims absurd sizes is refused here.

    Raises:
        CheckpointError: they do not agree.
    """
    with PackedReader(folder) as packed:
        checked_skeleton(packed)


def checked_skeleton(packed: PackedReader) -> nn.Module:
    """Build the model that config.json describes, without memory, and hold the weights against it.

    Raises:
        CheckpointError: they do not agree.
    """
    model = named_skeleton(packed)
    check_complete(model, packed)
    for linear in packed.linears.values():
        check_linear(model, linear)
    _check_dense(model, packed)
    return model


def check_complete(model: nn.Module, reader: PackedReader) -> None:
    """Check that every linear that the manifest names is there.

    Raises:
        CheckpointError: the packed weight of a linear is missing.
    """
    for name, module in model.named_modules():
        named = isinstance(module, nn.Linear) and reader.manifest.format_of(name)
        if named and name not in reader.linears:
            raise CheckpointError(f"{reader.folder}: the packed weight of {name} is missing.")


def check_linear(model: nn.Module, linear: PackedLinear) -> nn.Linear:
    """Find the module that a packed weight belongs to.

    Raises:
        CheckpointError: there is no such linear, it has another shape, or it is tied to another.
    """
    if f"{linear.name}.weight" in (getattr(model, "all_tied_weights_keys", None) or {}):
        raise CheckpointError(
            f"{linear.name}: packed, but config.json ties it to the embeddings; a packed output "
            "head needs tie_word_embeddings: false."
        )
    try:
        module = model.get_submodule(linear.name)
    except AttributeError as error:
        raise CheckpointError(f"{linear.name}: the model has no such module.") from error
    if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != linear.shape:
        found = (
            list(module.weight.shape) if isinstance(module, nn.Linear) else type(module).__name__
        )
        raise CheckpointError(
            f"{linear.name}: packed as {list(linear.shape)}, but config.json makes it {found}."
        )
    return module


def _check_dense(model: nn.Module, reader: PackedReader) -> None:
    """Check the tensors that are not packed: all there, of the right shapes, none besides."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    packed = {f"{name}.weight" for name in reader.linears} | {*reader.tied}
    for name, _ in model.named_parameters():
        aliases = {name, *(one for pair in tied.items() if name in pair for one in pair)}
        if name not in packed and not any(alias in reader for alias in aliases):
            raise CheckpointError(f"{reader.folder}: tensor {name} is missing.")
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    stored = {name: reader.headers[name] for name in reader.dense_names()}
    stored |= {
        name: (reader.linears[head].shape, reader.dtype) for name, head in reader.tied.items()
    }
    for name, (shape, dtype) in stored.items():
        try:
            wanted = tuple(model.get_parameter(name).shape)
        except AttributeError:
            known = any(name == buffer for buffer, _ in model.named_buffers())
            if known or name.endswith(LEFT_OVER) or any(re.search(one, name) for one in ignored):
                continue
            raise CheckpointError(f"{name}: the model has no such tensor.") from None
        if wanted != shape:
            raise CheckpointError(
                f"{name}: stored as {list(shape)}, but config.json makes it {list(wanted)}."
            )
        if dtype not in VALUE_DTYPES:
            raise CheckpointError(f"{name}: stored as {dtype}; floating point is needed.")


def load_any(
    folder: str | Path | ModelFolder,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a packed or a dense folder, whichever it is."""
    source = ModelFolder.open(folder)
    if source.kind == "packed":
        loaded: nn.Module = load(source, backend, dtype, device)
        return loaded
    if backend is not None:
        raise InputError(f"{folder} is dense: --backend applies to packed folders only.")
    return loading.load(source, dtype, device)


@register_quantization_config(QUANT_METHOD)
class GblmConfig(QuantizationConfigMixin):
    """This is the "quantization_config" of config.json, plus the wish for a backend.

    Attributes:
        backend: a name of `gblm.kernels.BACKENDS`, or None for the best; never written to disk.
        device: where the model will run; None: where its parts are loaded. Never written, either.
    """

    def __init__(
        self,
        version: int = VERSION,
        groups: Any = (),
        tied: Any = (),
        backend: str | None = None,
        device: str | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.version = version
        self.groups = groups
        self.tied = tied
        self.backend = backend
        self.device = device


@register_quantizer(QUANT_METHOD)
class GblmQuantizer(HfQuantizer):
    """Puts a SparseLinear wherever the checkpoint holds a packed weight."""

    requires_calibration = True
    quantization_config: GblmConfig
    dtype: torch.dtype | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Note the dtype asked for: transformers leaves packed parts in the checkpoint's."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not checkpoint_files:
            raise ValueError("gblm: packed weights load from safetensors files only.")
        experts.unfuse(model)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._rules = partial(experts.loading_rules, model)
        with PackedReader(ModelFolder.open(Path(checkpoint_files[0]).parent)) as reader:
            check_complete(model, reader)
            for name, linear in reader.linears.items():
                module = check_linear(model, linear)
                model.set_submodule(name, SparseLinear(linear, module.bias))
            self._tied = reader.tied
            # transformers warns of what no file holds.
            ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
            model._keys_to_ignore_on_load_missing = {*ignored, *map(re.escape, reader.tied)}

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Choose the rules by which tensors are renamed; experts stay one by one.

        transformers gives the model from 5.24 on.
        """
        return self._rules(weight_conversions)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        forced = self.quantization_config.backend or kernels.requested_backend()
        loaded = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, SparseLinear)
        }
        # No kernel sees anything of a checkpoint that is damaged somewhere.
        for name, module in loaded.items():
            module.check(name, self.dtype)
        # transformers leaves the checkpoint's dtype to a tensor that it renames.
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(self._dtypes.get(name, parameter.dtype))
        for name, head in self._tied.items():
            rows = loaded[head].fmt.expand(loaded[head].parts, self._dtypes[name])
            model.get_parameter(name).data = rows
        device = self.quantization_config.device
        kernels.log_choice(module.prepare(self.dtype, forced, device) for module in loaded.values())
        group_experts(model)
        return model

    def is_serializable(self) -> bool:
        """Say no: `gblm export dense` writes a packed model out again."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Say no: packed weights are for inference."""
        return False
