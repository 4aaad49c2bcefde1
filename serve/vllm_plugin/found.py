"""FoundLinearMethod: a linear whose format is found from its zeros once its weight is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method

from gblm.serve.foreign import is_plain, settle
from gblm.serve.vllm_plugin.linear import SparseLinearMethod
from gblm.serve.vllm_plugin.ragged import Pieces, PlainParameter, RaggedParameter


@register_weight_loader_v2_supported_method
class FoundLinearMethod(SparseLinearMethod):
    """A linear that arrives plain or as a bitmask, and is packed when the last piece is there."""

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
        """Register an empty parameter for every part that arrives; a plain one is `weight`."""
        self.shape = (sum(output_partition_sizes), input_size_per_partition)
        self.dtype = params_dtype
        self.pieces = Pieces(
            self.fmt, self.name, output_partition_sizes, self.shape[1], settle=settle
        )
        loader = extra_weight_attrs["weight_loader"]
        if is_plain(self.fmt):
            self.loaded = ("weight",)
            empty = torch.empty(0, dtype=params_dtype)
            plain = PlainParameter(
                data=empty, weight_loader=loader, part="values", pieces=self.pieces
            )
            layer.register_parameter("weight", plain)
            return
        self._check_shard(input_size)
        for part, spec in self.fmt.layout(self.shape, params_dtype).items():
            empty = torch.empty(0, dtype=spec.dtype)
            ragged = RaggedParameter(
                data=empty, weight_loader=loader, part=part, pieces=self.pieces
            )
            layer.register_parameter(part, ragged)

    def _prepare(self, layer: torch.nn.Module, parts: dict[str, Tensor]) -> None:
        if not is_plain(self.fmt):
            super()._prepare(layer, parts)
            return
        self.note_choice(None, ())
        self._serve_dense(layer, parts["values"])
