"""One rank's SparseLinearMethod and weights for it, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gblm.sparse.formats import Format

RANKS = 2
SHAPE = (16, 256)


def create(
    fmt: Format, rows: list[int], columns: int, num_ranks: int, monkeypatch: pytest.MonkeyPatch,
    rank: int,
) -> tuple[Any, torch.nn.Module]:  # fmt: skip
    """A linear of one rank, `columns` of the whole weight cut over `num_ranks`."""
    from vllm.model_executor import parameter

    from gblm.serve.vllm_plugin.linear import SparseLinearMethod

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: RANKS)
    method, layer = SparseLinearMethod(fmt, "w", lambda *choice: None), torch.nn.Module()
    method.create_weights(
        layer, columns // num_ranks, rows, columns, sum(rows), torch.bfloat16,
        weight_loader=lambda *args: None,
    )  # fmt: skip
    return method, layer


def load_columns(layer: torch.nn.Module, parts: dict[str, torch.Tensor]) -> None:
    """Load as vLLM does where ranks share the columns."""
    for part, tensor in parts.items():
        getattr(layer, part).load_row_parallel_weight(loaded_weight=tensor)


def load_pieces(
    layer: torch.nn.Module, pieces: Sequence[dict[str, torch.Tensor]], sizes: Sequence[int]
) -> None:
    """Load as vLLM does where ranks share the rows of several fused linears.

    Args:
        layer: takes the pieces.
        pieces: the whole parts of each linear.
        sizes: rows of each linear that the rank keeps.
    """
    for piece, parts in enumerate(pieces):
        for part, tensor in parts.items():
            getattr(layer, part).load_merged_column_weight(
                loaded_weight=tensor, shard_id=piece, shard_offset=sum(sizes[:piece]),
                shard_size=sizes[piece],
            )  # fmt: skip


def fused_linear(
    fmt: Format, rows: list[int], kv_heads: int | None, monkeypatch: pytest.MonkeyPatch, rank: int
) -> tuple[Any, torch.nn.Module]:
    """One rank's q/k/v, with heads of 8 rows, or gate and up: vLLM's own layer, with its loader.

    Args:
        fmt: of the weight.
        rows: of the whole pieces.
        kv_heads: how many of k and v; None for gate and up.
        monkeypatch: sets the rank.
        rank: of RANKS.
    """
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    from gblm.serve.vllm_plugin.linear import SparseLinearMethod

    for module in (linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: RANKS)
    method = SparseLinearMethod(fmt, "w", lambda *choice: None)
    config = SimpleNamespace(
        online_quantization_config=None, get_quant_method=lambda layer, prefix: method
    )
    common = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": config, "prefix": "w"}
    if kv_heads is None:
        return method, linear.MergedColumnParallelLinear(SHAPE[1], rows, **common)
    return method, linear.QKVParallelLinear(SHAPE[1], 8, rows[0] // 8, kv_heads, **common)
