"""Serve a packed output head whose rows are the embeddings, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from gblm.errors import MachineError
from gblm.serve.vllm_plugin.head import PackedHeadMethod
from gblm.serve.vllm_plugin.linear import NoteChoice
from gblm.sparse.formats import Format
from gblm.sparse.formats.bits import unpack_nibbles
from gblm.sparse.weights import dequantize_rows


class TiedEmbeddingMethod(QuantizeMethodBase):
    """Embeddings that no file holds are rows of the head's codes, expanded when they are read."""

    def __init__(self) -> None:
        """Refuse a server that has the embeddings elsewhere than the head.

        Raises:
            MachineError: pipeline stages would part them.
        """
        current = get_current_vllm_config_or_none()
        if current is not None and current.parallel_config.pipeline_parallel_size > 1:
            raise MachineError(
                "the output head holds the embeddings of this model, which pipeline stages would "
                "part: make the folder with --head float, or serve without them."
            )
        self.dtype = torch.bfloat16

    def create_weights(
        self, layer: torch.nn.Module, *sizes: Any, params_dtype: torch.dtype, **attributes: Any
    ) -> None:
        """Register an empty weight: other code may ask for its dtype."""
        self.dtype = params_dtype
        empty = torch.empty(0, dtype=params_dtype)
        layer.register_parameter("weight", Parameter(empty, requires_grad=False))

    def embedding(self, layer: torch.nn.Module, input_: Tensor) -> Tensor:
        """Look up: ids [...] → embeddings [..., hidden]."""
        codes, scales = (layer.get_parameter(part)[input_] for part in ("values", "scales"))
        if codes.dtype == torch.uint8:
            codes = unpack_nibbles(codes, 2 * codes.shape[-1])
        return dequantize_rows(codes, scales, self.dtype)

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse: the head multiplies."""
        raise NotImplementedError


class TiedHeadMethod(PackedHeadMethod):
    """A packed head that shares its codes with the embeddings."""

    def __init__(
        self, fmt: Format, name: str, note_choice: NoteChoice, embeddings: torch.nn.Module
    ) -> None:
        super().__init__(fmt, name, note_choice)
        self.embeddings = embeddings

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Give the codes to the embeddings, then prepare them for the head."""
        for part in self.fmt.parts:
            shared = Parameter(layer.get_parameter(part).data, requires_grad=False)
            self.embeddings.register_parameter(part, shared)
        super().process_weights_after_loading(layer)
