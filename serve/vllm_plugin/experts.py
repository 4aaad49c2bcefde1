"""Serve a mixture of experts: each linear of each expert arrives, is cut to this rank, prepared.

vLLM's own loader copies slices into one tensor for all experts, which packed parts are not: their
formats may differ, and their lengths. So its loader is asked only whose part a tensor is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from gblm import kernels
from gblm.errors import CheckpointError
from gblm.kernels import BACKENDS, Backend, experts
from gblm.serve.vllm_plugin.linear import MISSING, NoteChoice, check_shard
from gblm.serve.vllm_plugin.ragged import give_back_memory, pack_in_blocks
from gblm.sparse.formats import Format, Shape, from_spec
from gblm.sparse.formats.manifest import Manifest

DENSE = from_spec("dense/dense")
SIDES = ("w1", "w3", "w2")  # vLLM's names of gate, up and down
Key = tuple[int, str]  # of a linear: the expert's number on this rank, and the side


class ExpertLinear(NamedTuple):
    """One linear of one expert: its name, its format, and its [out, in] on this rank."""

    name: str
    fmt: Format
    shape: Shape


class Arriving:
    """Collects the parts of a layer's experts as vLLM's loader names them."""

    def __init__(self, layer: Any, prefix: str, manifest: Manifest) -> None:
        """Look up how the experts are stored.

        Args:
            layer: vLLM's RoutedExperts, before it has weights.
            prefix: its name; experts are called `prefix.7.gate_proj`, or what the family says.
            manifest: of the checkpoint.

        Raises:
            CheckpointError: packed experts have biases, or no gate, or ranks would cut groups.
        """
        config = layer.moe_config
        self.prefix, self.dtype = prefix, layer.params_dtype
        self.rank, self.num_ranks = config.tp_rank, config.tp_size
        self.find = layer._map_global_expert_id_to_local_expert_id
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        self.formats = {
            (expert, side): manifest.format_of(f"{prefix}.{expert}.{name}")
            for expert in range(layer.global_num_experts)
            for side, name in zip(SIDES, names, strict=True)
        }
        self.is_packed = any(self.formats.values())
        self.linears: dict[Key, ExpertLinear] = {}
        self._parts: dict[Key, dict[str, Tensor]] = {}
        if not self.is_packed:
            return
        if config.has_bias or not config.is_act_and_mul:
            raise CheckpointError(
                f"{prefix}: packed experts are served with a gate and without biases only."
            )
        inner, hidden = config.intermediate_size_per_partition, config.hidden_dim
        for (expert, side), fmt in self.formats.items():
            if (local := self.find(expert)) < 0:
                continue
            name = f"{prefix}.{expert}.{names[SIDES.index(side)]}"
            shape = (hidden, inner) if side == "w2" else (inner, hidden)
            self.linears[local, side] = ExpertLinear(name, fmt or DENSE, shape)
            check_shard(
                fmt or DENSE, name, shape, shape[1] * (self.num_ranks if side == "w2" else 1)
            )

    def register(self, layer: torch.nn.Module) -> None:
        """Give vLLM's loader an empty parameter for every part that it will name."""
        for name, part in self._places().items():
            parameter = Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = partial(self._load, part)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def finish(self, layer: torch.nn.Module) -> dict[Key, dict[str, Tensor]]:
        """Remove those parameters, and give the parts of all linears on this rank.

        Raises:
            CheckpointError: a part of a linear has not arrived.
        """
        for name in self._places():
            delattr(layer, name)
        for key, linear in self.linears.items():
            if not set(linear.fmt.parts) <= self._parts.get(key, {}).keys():
                raise CheckpointError(
                    f"{linear.name}: parts of its weight are missing in the checkpoint."
                )
        found, self._parts = self._parts, {}
        return found

    def _places(self) -> dict[str, str]:
        """Map what vLLM calls the parts of all experts to their local names.

        Those of other ranks are among them: vLLM looks for them before it asks whose they are.
        """
        places: dict[str, str] = {}
        for (_, side), fmt in self.formats.items():
            group = "w2" if side == "w2" else "w13"
            parts = {"weight": "values"} if fmt is None else {part: part for part in fmt.parts}
            places |= {f"{group}_{stored}": part for stored, part in parts.items()}
        return places

    def _load(
        self, part: str, param: Parameter, loaded_weight: Tensor, weight_name: str, shard_id: str,
        expert_id: int, return_success: bool = False,
    ) -> bool | None:  # fmt: skip
        """Keep one part; with the last of a linear, check it and cut it to this rank.

        vLLM calls it like its own `RoutedExperts.weight_loader`.
        """
        key = self.find(expert_id), shard_id
        if key in self.linears:
            parts = self._parts.setdefault(key, {})
            parts[part] = loaded_weight.detach().cpu()
            if parts.keys() == set(self.linears[key].fmt.parts):
                self._parts[key] = self._cut(self.linears[key], parts, shard_id == "w2")
        return key in self.linears if return_success else None

    def _cut(
        self, linear: ExpertLinear, parts: dict[str, Tensor], is_down: bool
    ) -> dict[str, Tensor]:
        """Check a whole linear; give what this rank multiplies with, in the activations' dtype."""
        name, fmt, shape = linear
        dim = 1 if is_down else 0
        whole = list(shape)
        whole[dim] *= self.num_ranks
        fmt.validate(name, parts, (whole[0], whole[1]))
        if self.num_ranks > 1:
            own = fmt.unpack(parts).narrow(dim, self.rank * shape[dim], shape[dim])
            parts = pack_in_blocks(fmt, name, own)
        if fmt.values.is_float:
            parts["values"] = fmt.cast(name, parts["values"], self.dtype)
        return parts


def choose(layer: Any, arriving: Arriving) -> tuple[Backend, Sequence[str]]:
    """Choose what runs all experts of a layer: the backend `cpu`, or `dense`.

    Returns:
        The backend, and why better ones refused.
    """
    device = torch.device(layer.moe_config.device)
    if layer.activation != MoEActivation.SILU or layer.swiglu_limit is not None:
        return BACKENDS["dense"], ["experts: the grouped call knows plain silu alone"]
    reasons: dict[str, None] = {}
    for fmt, shape in {(linear.fmt, linear.shape) for linear in arriving.linears.values()}:
        forced = kernels.requested_backend()
        backend, why = kernels.select(fmt, shape, arriving.dtype, device, forced)
        if backend.name != "cpu":
            reasons |= dict.fromkeys(why)
            if backend.packed:
                reasons[f"{backend.name}: it has no grouped call for experts"] = None
            return BACKENDS["dense"], [*reasons]
    return BACKENDS["cpu"], []


def experts_method(layer: Any, arriving: Arriving, note_choice: NoteChoice) -> FusedMoEMethodBase:
    """Make the method of a layer of experts, some of which are packed."""
    backend, reasons = choose(layer, arriving)
    kind = GroupedExperts if backend.packed else ExpandedExperts
    return kind(layer.moe_config, arriving, partial(note_choice, backend, reasons))


class GroupedExperts(FusedMoEMethodBase):
    """Multiplies with packed experts, all of a layer in one call."""

    def __init__(self, moe: Any, arriving: Arriving, note_choice: Callable[[], None]) -> None:
        super().__init__(moe)
        self.arriving, self.note_choice = arriving, note_choice

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **attributes: Any) -> None:
        """Let the parts of the experts arrive."""
        self.arriving.register(layer)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """Give none: vLLM's kernels are not asked."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Turn the parts into panels, and join those of all experts."""
        parts = self.arriving.finish(layer)
        prepared: dict[Key, Tensor] = {}
        for key, (_, fmt, shape) in self.arriving.linears.items():
            backend = BACKENDS["cpu"]
            prepared[key] = backend.prepare(fmt, parts.pop(key), shape, self.arriving.dtype)[0]
            self.note_choice()
        count = len(prepared) // len(SIDES)
        joined = experts.join([[prepared[index, side] for side in SIDES] for index in range(count)])
        for name, tensor in zip(("weight_packed", "places"), joined, strict=True):
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        prepared.clear()
        give_back_memory()

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Multiply: x [tokens, hidden] with the experts of this rank that each token has chosen."""
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids]
        if layer.apply_router_weight_on_input:
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        return experts.grouped(x, topk_ids, topk_weights, layer.weight_packed, layer.places)


class ExpandedExperts(UnquantizedFusedMoEMethod):
    """Expands packed experts at load, and then runs as vLLM's own."""

    supports_eplb = False  # experts that are there twice arrive once

    def __init__(self, moe: Any, arriving: Arriving, note_choice: Callable[[], None]) -> None:
        super().__init__(moe)
        self.arriving, self.note_choice = arriving, note_choice
        self.sizes: dict[str, Any] = {}

    def create_weights(self, layer: torch.nn.Module, **sizes: Any) -> None:
        """Let the parts of the experts arrive; there is no dense weight yet."""
        self.sizes = sizes
        self.arriving.register(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make vLLM's dense weights, and fill them."""
        device = next(layer.parameters()).device
        parts = self.arriving.finish(layer)
        with device:
            super().create_weights(layer, **self.sizes)
        half = layer.w13_weight.shape[1] // 2
        for weight in (layer.w13_weight, layer.w2_weight):
            weight.data.zero_()
        for key, (_, fmt, (rows, columns)) in self.arriving.linears.items():
            index, side = key
            weight = (layer.w2_weight if side == "w2" else layer.w13_weight).data[index]
            start = half if side == "w3" else 0
            dense = fmt.expand(parts.pop(key), self.arriving.dtype)
            weight[start : start + rows, :columns] = dense
            self.note_choice()
        give_back_memory()
        super().process_weights_after_loading(layer)


class DenseExperts(UnquantizedFusedMoEMethod):
    """Experts that are not packed run as vLLM's own; what was not loaded is refused."""

    def __init__(self, moe: Any, prefix: str) -> None:
        super().__init__(moe)
        self.prefix = prefix

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Make the weights as vLLM does, filled with NaN."""
        super().create_weights(layer, *sizes, **attributes)
        for weight in (layer.w13_weight, layer.w2_weight):
            weight.data.fill_(math.nan)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse an expert that has no gate, up or down; then do what vLLM does."""
        half = layer.w13_weight.shape[1] // 2
        # Elsewhere there may be padding, which nobody fills.
        first = torch.cat([layer.w13_weight.data[:, ::half, 0], layer.w2_weight.data[:, :1, 0]], 1)
        if bool(first.isnan().any()):
            raise CheckpointError(MISSING.format(self.prefix))
        super().process_weights_after_loading(layer)
