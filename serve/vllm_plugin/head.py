"""The output head of a packed model: dense, but read at the speed of memory where a kernel can."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from gblm import kernels
from gblm.formats import from_spec
from gblm.kernels import Backend

DENSE = from_spec("dense/dense")


class HeadMethod(UnquantizedEmbeddingMethod):
    """vLLM's own head, unless the cpu backend takes its weight: the same values as panels."""

    def __init__(self) -> None:
        super().__init__()
        self.backend: Backend | None = None
        self.shape = (0, 0)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Prepare the loaded weight, which may be that of the embeddings, too."""
        weight = layer.weight.data
        self.shape = (weight.shape[0], weight.shape[1])
        backend, _ = kernels.select(DENSE, self.shape, weight.dtype, weight.device)
        if not (backend.own_op and kernels.requested_backend() in (None, backend.name)):
            super().process_weights_after_loading(layer)
            return
        self.backend = backend
        prepared = backend.prepare(DENSE, {"values": weight}, self.shape, weight.dtype)[0]
        layer.register_parameter("weight_packed", Parameter(prepared, requires_grad=False))

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] → logits [..., vocabulary]."""
        if self.backend is None:
            logits: Tensor = super().apply(layer, x, bias)
            return logits
        logits = kernels.linear(x, [layer.weight_packed], self.shape, DENSE, self.backend)
        return logits if bias is None else logits + bias
