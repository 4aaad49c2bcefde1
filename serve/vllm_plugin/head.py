"""Serve embeddings and the output head, floating or codes, with a kernel of ours where it can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from gblm import kernels
from gblm.errors import CheckpointError
from gblm.kernels import Backend
from gblm.serve.vllm_plugin.linear import SparseLinearMethod, Watched
from gblm.sparse.formats import Shape, from_spec

DENSE = from_spec("dense/dense")


class EmbeddingMethod(Watched, UnquantizedEmbeddingMethod):
    """Embeddings are looked up as vLLM does it, without a second copy to multiply with.

    vLLM makes that copy on CPU at load; here it is made when a model multiplies: Gemma 2 has no
    other output head.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name or "embed_tokens")  # vLLM gives some embeddings no name

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Refuse what was not loaded; lookups need the weight as it is."""
        self.refuse_unloaded(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply: x [..., in] → logits [..., vocabulary]."""
        if not hasattr(layer, "cpu_linear"):
            super().process_weights_after_loading(layer)
        logits: Tensor = super().apply(layer, x, bias)
        return logits


class HeadMethod(Watched, UnquantizedEmbeddingMethod):
    """A head that is not packed runs as vLLM's own, unless a kernel takes its weight as panels."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.backend: Backend | None = None
        self.shape: Shape = (0, 0)
        self.tied = False
        current = get_current_vllm_config_or_none()
        model = None if current is None else current.model_config
        self.dtype: torch.dtype | None = None if model is None else model.head_dtype

    def tie_weights(
        self, layer: torch.nn.Module, embed_tokens: VocabParallelEmbedding
    ) -> torch.nn.Module:
        """Share the embeddings' weight."""
        self.tied = True
        tied: torch.nn.Module = super().tie_weights(layer, embed_tokens)
        return tied

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Prepare the loaded weight, and let go of it unless it is that of the embeddings, too."""
        self.refuse_unloaded(layer)
        weight = layer.get_parameter("weight").data
        self.shape = (weight.shape[0], weight.shape[1])
        backend, _ = kernels.select(DENSE, self.shape, weight.dtype, weight.device)
        wanted = backend.own_op and kernels.requested_backend() in (None, backend.name)
        # vLLM multiplies with the weight itself when logits are asked for in another dtype.
        if not wanted or self.dtype not in (None, weight.dtype):
            super().process_weights_after_loading(layer)
            return
        self.backend = backend
        prepared = backend.prepare(DENSE, {"values": weight}, self.shape, weight.dtype)[0]
        layer.register_parameter("weight_packed", Parameter(prepared, requires_grad=False))
        if not self.tied:
            # As vLLM does with weights that it repacks: other code may ask for the dtype.
            layer.register_parameter("weight", Parameter(weight.new_empty(0), requires_grad=False))

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply: x [..., in] → logits [..., vocabulary]."""
        if self.backend is None:
            logits: Tensor = super().apply(layer, x, bias)
            return logits
        panels = layer.get_parameter("weight_packed")
        logits = kernels.linear(x, [panels], self.shape, DENSE, self.backend)
        return logits if bias is None else logits + bias


class PackedHeadMethod(SparseLinearMethod):
    """A head that is packed in the format `dense`; vLLM's loader cuts and pads its rows."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check and prepare; see SparseLinearMethod."""
        if "scales" in self.fmt.parts:
            # vLLM fills the rows behind the vocabulary with zeros, which are no scales.
            indices: Any = layer.shard_indices
            layer.get_parameter("scales").data[indices.num_org_elements :] = 1
        super().process_weights_after_loading(layer)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: VocabParallelEmbedding) -> None:
        """Refuse: the embeddings are not what is stored."""
        raise CheckpointError(
            f"{self.name}: packed, but config.json ties it to the embeddings; a packed output head "
            "needs tie_word_embeddings: false."
        )
