"""FoundLinearMethod: a linear whose format is found from its zeros once its weight is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method

from gblm.serve.foreign import is_plain, settle
from gblm.serve.vllm_plugin.linear import SparseLinearMethod
from gblm.serve.vllm_plugin.ragged import Pieces, RaggedParameter


@register_weight_loader_v2_supported_method
class FoundLinearMethod(SparseLinearMethod):
    """A linear that arrives plain or as a bitmask, and is packed when the last piece is there."""

    def _register(
        self, layer: torch.nn.Module, input_size: int, rows: list[int], loader: Any
    ) -> None:
        """A plain weight arrives as `weight`, of any number of columns."""
        pieces = Pieces(self.fmt, self.name, rows, self.shape[1], settle=settle)
        if not is_plain(self.fmt):
            self._check_shard(input_size)
            self._register_ragged(layer, pieces, loader)
            return
        self.pieces, self.loaded = pieces, ("weight",)
        empty = torch.empty(0, dtype=self.dtype)
        plain = RaggedParameter(data=empty, weight_loader=loader, part="values", pieces=pieces)
        layer.register_parameter("weight", plain)

    def _prepare(self, layer: torch.nn.Module, parts: dict[str, Tensor]) -> None:
        if not is_plain(self.fmt):
            super()._prepare(layer, parts)
            return
        self.note_choice(None, (), None)
        self._serve_dense(layer, parts["values"])
