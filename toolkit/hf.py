"""transformers' public quantizer hooks for `quant_method: gblm`. Imported by gblm.packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gblm import kernels, packed
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.sparse.formats.manifest import QUANT_METHOD, VERSION


@register_quantization_config(QUANT_METHOD)
class GblmConfig(QuantizationConfigMixin):
    """The "quantization_config" object of config.json, plus the wish for a backend.

    Attributes:
        backend: a name of `gblm.kernels.BACKENDS`, or None for the best; never written to disk.
        device: where the model will run; None: where its parts are loaded. Never written, either.
    """

    def __init__(
        self,
        version: int = VERSION,
        groups: Any = (),
        backend: str | None = None,
        device: str | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.version = version
        self.groups = groups
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
        model: nn.Module,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not checkpoint_files:
            raise ValueError("gblm: packed weights load from safetensors files only.")
        with PackedReader(ModelFolder.open(Path(checkpoint_files[0]).parent)) as reader:
            packed.check_complete(model, reader)
            for name, linear in reader.linears.items():
                module = packed.check_linear(model, linear)
                model.set_submodule(name, packed.SparseLinear(linear, module.bias))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        forced = self.quantization_config.backend or kernels.requested_backend()
        loaded = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, packed.SparseLinear)
        }
        # No kernel sees anything of a checkpoint that is damaged somewhere.
        for name, module in loaded.items():
            module.check(name, self.dtype)
        device = self.quantization_config.device
        kernels.log_choice(module.prepare(self.dtype, forced, device) for module in loaded.values())
        return model

    def is_serializable(self) -> bool:
        """No: `gblm export dense` writes a packed model out again."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Packed weights are for inference."""
        return False
