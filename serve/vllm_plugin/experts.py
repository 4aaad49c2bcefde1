"""Serve a mixture of experts: each linear of each expert arrives, is cut to this rank, prepared.

vLLM's own loader copies slices into one tensor for all experts, which packed parts are not: their
formats may differ, and their lengths. So its loader is asked only whose part a tensor is.
"""

from __future__ import annotations

import math
from abc import abstractmethod
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
from gblm.errors import CheckpointError, UsageError
from gblm.kernels import BACKENDS, Backend, experts
from gblm.kernels.triton.backend import Arrays, Triton
from gblm.serve.vllm_plugin.linear import MISSING, NoteChoice, check_shard
from gblm.serve.vllm_plugin.ragged import give_back_memory
from gblm.sparse.formats import Format, Shape, from_spec, join_formats
from gblm.sparse.formats.manifest import Manifest

DENSE = from_spec("dense/dense")
SIDES = ("w1", "w3", "w2")  # vLLM's names of gate, up and down
Key = tuple[int, str]  # of a linear: the expert's number on this rank, and the side


class ExpertLinear(NamedTuple):
    """One linear of one expert: its name, its format, and its [out, in] on this rank."""

    name: str
    fmt: Format
    shape: Shape


def stored_parts(fmt: Format | None) -> dict[str, str]:
    """Map what files call the parts of a linear to their local names; None: it is not packed."""
    return {"weight": "values"} if fmt is None else {part: part for part in fmt.parts}


class Arriving:
    """Collects the parts of a layer's experts as vLLM's loader names them."""

    def __init__(self, layer: Any, prefix: str, manifest: Manifest) -> None:
        """Look up how the experts are stored.

        Args:
            layer: vLLM's RoutedExperts, before it has weights.
            prefix: its name; a linear is `prefix.7.gate_proj`, or as the family calls it.
            manifest: of the checkpoint.

        Raises:
            CheckpointError: packed experts have biases, or no gate, or ranks would cut groups.
        """
        config = layer.moe_config
        self.dtype = layer.params_dtype
        self.rank, self.num_ranks = config.tp_rank, config.tp_size
        self.find = layer._map_global_expert_id_to_local_expert_id
        roles = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        names = {
            (expert, side): f"{prefix}.{expert}.{role}"
            for expert in range(layer.global_num_experts)
            for side, role in zip(SIDES, roles, strict=True)
        }
        self.formats = {key: manifest.format_of(name) for key, name in names.items()}
        self.is_packed = any(self.formats.values())
        if self.is_packed and (config.has_bias or not config.is_act_and_mul):
            raise CheckpointError(
                f"{prefix}: packed experts are served without biases, and with a gate, only."
            )
        inner, hidden = config.intermediate_size_per_partition, config.hidden_dim
        self.linears: dict[Key, ExpertLinear] = {}
        for (expert, side), name in names.items():
            fmt = self.formats[expert, side] or DENSE
            shape = (hidden, inner) if side == "w2" else (inner, hidden)
            if (local := self.find(expert)) >= 0:
                self.linears[local, side] = ExpertLinear(name, fmt, shape)
        self._arriving: dict[Key, dict[str, Tensor]] = {}
        self._done: dict[Key, dict[str, Tensor]] = {}

    def kinds(self) -> set[tuple[Format, Shape]]:
        """Give the formats and shapes of all linears on this rank, each once."""
        return {(linear.fmt, linear.shape) for linear in self.linears.values()}

    def joined_format(self, side: str) -> Format | None:
        """Find the format of all gates, ups or downs as one weight; None if there is none."""
        return join_formats(one.fmt for (_, own), one in self.linears.items() if own == side)

    def check_shards(self) -> None:
        """Raise CheckpointError when tensor-parallel ranks would cut what belongs together."""
        for (_, side), (name, fmt, shape) in self.linears.items():
            ranks = self.num_ranks if side == "w2" else 1
            check_shard(fmt, name, shape, shape[1] * ranks)

    def register(self, layer: torch.nn.Module) -> None:
        """Give vLLM's loader an empty parameter for every part that it will name."""
        for name, stored in self._places().items():
            parameter = Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = partial(self._load, stored)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def finish(self, layer: torch.nn.Module) -> dict[Key, dict[str, Tensor]]:
        """Remove those parameters, and give the parts of all linears on this rank.

        Raises:
            CheckpointError: a part of a linear has not arrived.
        """
        for name in self._places():
            delattr(layer, name)
        for key, linear in self.linears.items():
            if key not in self._done:
                raise CheckpointError(
                    f"{linear.name}: parts of its weight are missing in the checkpoint."
                )
        done, self._done = self._done, {}
        return done

    def _places(self) -> dict[str, str]:
        """Map what vLLM calls a part of any expert to what files call it.

        Other ranks' experts are among them: vLLM looks for a part before it asks whose it is.
        """
        return {
            f"{'w2' if side == 'w2' else 'w13'}_{stored}": stored
            for (_, side), fmt in self.formats.items()
            for stored in stored_parts(fmt)
        }

    def _load(
        self, stored: str, param: Parameter, loaded_weight: Tensor, weight_name: str,
        shard_id: str, expert_id: int, return_success: bool = False,
    ) -> bool | None:  # fmt: skip
        """Keep one part; with the last of a linear, check it and cut it to this rank.

        vLLM calls it as it calls its own `RoutedExperts.weight_loader`.
        """
        key = self.find(expert_id), shard_id
        linear = self.linears.get(key)
        if linear is not None:
            part = stored_parts(self.formats[expert_id, shard_id]).get(stored)
            if part is None:
                raise CheckpointError(f"{linear.name}.{stored}: the manifest knows no such part.")
            parts = self._arriving.setdefault(key, {})
            parts[part] = loaded_weight.detach().cpu()
            if parts.keys() == set(linear.fmt.parts):
                self._done[key] = self._cut(linear, self._arriving.pop(key), shard_id == "w2")
        return linear is not None if return_success else None

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
            parts = fmt.pack(name, own)
        if fmt.values.is_float:
            parts["values"] = fmt.cast(name, parts["values"], self.dtype)
        return parts


def choose(layer: Any, arriving: Arriving) -> tuple[Backend, Sequence[str]]:
    """Choose what runs all experts of a layer: a backend that has a call for them, or vLLM itself.

    Returns:
        The backend, `dense` for vLLM's own kernels; and why better ones refused.

    Raises:
        UsageError: the backend that is asked for is unknown or refuses.
    """
    device = torch.device(layer.moe_config.device)
    if layer.activation != MoEActivation.SILU or layer.swiglu_limit is not None:
        return BACKENDS["dense"], ["experts: the grouped call knows plain silu alone"]
    forced = kernels.requested_backend()
    if forced:
        for fmt, shape in arriving.kinds():
            kernels.select(fmt, shape, arriving.dtype, device, forced)
        if not BACKENDS[forced].packed:
            return BACKENDS[forced], []
    reasons: list[str] = []
    for name in [forced] if forced else METHODS:
        reason = _refusal(name, arriving, device)
        if reason is None:
            return BACKENDS[name], reasons
        reasons.append(f"{name}: {reason}")
    return BACKENDS["dense"], reasons


def _refusal(name: str, arriving: Arriving, device: torch.device) -> str | None:
    """Say why a backend cannot run all experts of a layer, for people; None when it can."""
    if name not in METHODS:
        return "it has no grouped call for experts"
    for fmt, shape in arriving.kinds():
        if reason := kernels.refusal(BACKENDS[name], fmt, shape, arriving.dtype, device):
            return reason
    if name == "triton" and not all(map(arriving.joined_format, SIDES)):
        return "experts of a layer are stored in different formats"
    return None


def experts_method(layer: Any, arriving: Arriving, note_choice: NoteChoice) -> FusedMoEMethodBase:
    """Make the method of a layer of experts, some of which are packed.

    Raises:
        CheckpointError: ranks would cut what belongs together.
        UsageError: adapters are asked for; or only vLLM's own kernels are left, which have no
            expert parallelism on CPU.
    """
    arriving.check_shards()
    if layer.moe_config.is_lora_enabled:
        raise UsageError(
            "vLLM adds adapters within its own kernels for experts, which have no place for packed "
            "ones: leave --enable-lora out."
        )
    backend, reasons = choose(layer, arriving)
    if not backend.packed and layer.use_ep and torch.device(layer.moe_config.device).type == "cpu":
        why = "; ".join(reasons) or "another one is asked for"
        raise UsageError(
            "vLLM's own experts have no expert parallelism on CPU, and the backend cpu does not "
            f"serve these ({why}): leave --enable-expert-parallel out."
        )
    kind = METHODS.get(backend.name, ExpandedExperts)
    return kind(layer.moe_config, arriving, partial(note_choice, backend, reasons))


class GroupedExperts(FusedMoEMethodBase):
    """Multiplies with packed experts, all of a layer at once."""

    def __init__(self, moe: Any, arriving: Arriving, note_choice: Callable[[], None]) -> None:
        super().__init__(moe)
        self.arriving, self.note_choice = arriving, note_choice

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **attributes: Any) -> None:
        """Let the parts of the experts arrive."""
        self.arriving.register(layer)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """Give none: vLLM's kernels are not asked."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Turn the parts into what the backend reads, as parameters of the layer."""
        device = next(layer.parameters()).device
        for name, tensor in self.prepare(self.arriving.finish(layer)).items():
            layer.register_parameter(name, Parameter(tensor.to(device), requires_grad=False))
        for _ in self.arriving.linears:
            self.note_choice()
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
        return self.multiply(layer, x, topk_ids, topk_weights)

    @abstractmethod
    def prepare(self, parts: dict[Key, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Give what `multiply` reads of a layer, by name; takes the parts out as it goes."""

    @abstractmethod
    def multiply(self, layer: Any, x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        """Multiply as `experts.one_by_one` does, with this rank's experts."""


class PanelExperts(GroupedExperts):
    """Multiplies on the backend `cpu`: one call of the kernels."""

    def prepare(self, parts: dict[Key, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Turn the parts into panels, and join those of all experts."""
        backend, dtype = BACKENDS["cpu"], self.arriving.dtype
        panels = {
            key: backend.prepare(fmt, parts.pop(key), shape, dtype)[0]
            for key, (_, fmt, shape) in self.arriving.linears.items()
        }
        count = len(panels) // len(SIDES)
        joined = experts.join([[panels[index, side] for side in SIDES] for index in range(count)])
        return dict(zip(("weight_packed", "places"), joined, strict=True))

    def multiply(self, layer: Any, x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        """Call the kernels once."""
        return experts.grouped(x, ids, shares, layer.weight_packed, layer.places)


class StackedExperts(GroupedExperts):
    """Multiplies on the backend `triton`: a launch for all gates, all ups and all downs each."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.backend = Triton()
        self.count = len(self.arriving.linears) // len(SIDES)
        self.kinds = {
            side: (fmt, self.arriving.linears[0, side].shape)
            for side in SIDES
            if (fmt := self.arriving.joined_format(side))
        }

    def prepare(self, parts: dict[Key, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Put the weights of all experts one below the other, side by side."""
        found = {}
        for side, (fmt, (rows, columns)) in self.kinds.items():
            joined = fmt.join([parts.pop((index, side)) for index in range(self.count)])
            shape = (self.count * rows, columns)
            prepared = self.backend.prepare(fmt, joined, shape, self.arriving.dtype)
            for field, tensor in zip(Arrays._fields, prepared, strict=True):
                found[f"{side}_{field}"] = tensor
        return found

    def multiply(self, layer: Any, x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        """Launch the kernel three times."""
        stacks = [
            experts.Stack(*kind, [getattr(layer, f"{side}_{field}") for field in Arrays._fields])
            for side, kind in self.kinds.items()
        ]
        return experts.stacked(x, ids, shares, stacks, self.count, self.backend)


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


# What runs the experts of a layer on a backend; in order of preference.
METHODS: dict[str, type[GroupedExperts]] = {"cpu": PanelExperts, "triton": StackedExperts}
