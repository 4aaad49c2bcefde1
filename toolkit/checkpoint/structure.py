"""Structure of a mask: dead rows, columns and heads, the spread of the kept weights, live tiles.

Das et al. 2023, https://arxiv.org/abs/2311.04902, observe that unstructured masks chosen with
gradients reveal structural patterns; these numbers say how much. Knows nothing of models beyond
the names of attention projections.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

HeadsOn = Literal["rows", "columns"]
TILE = 16


def heads_of(name: str) -> HeadsOn | None:
    """Tell by a linear's name where its attention heads lie; None when it has none.

    Args:
        name: local or full, such as "self_attn.q_proj".
    """
    last = name.rpartition(".")[2]
    if last in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        return "rows"
    return "columns" if last == "o_proj" else None


def structure(
    mask: Tensor, head_dim: int | None = None, heads_on: HeadsOn | None = None
) -> dict[str, float]:
    """Describe which weights a mask keeps.

    Args:
        mask: [out, in] bool, True = kept.
        head_dim: size of an attention head.
        heads_on: whether a head is `head_dim` consecutive rows or columns.

    Returns:
        Shares between 0 and 1, rounded to 6 digits, ready for JSON.
        "kept": of all weights.
        "dead_rows", "dead_columns": rows and columns that keep nothing.
        "dead_heads": heads that keep nothing; only there when `head_dim` and `heads_on` are given
        and `head_dim` divides the rows or columns.
        "row_kept_min", "row_kept_max", "row_kept_std", and the same for "column": over the share
        kept of each row; the std is the population's.
        "live_tiles_16x16", "live_tiles_1x8": tiles (rows x columns) that keep at least one weight;
        tiles cut short by the edge count as one.
    """
    out_features, in_features = mask.shape
    # Sides that are multiples of 16 let bytes be summed in sixteens and read as words of 8.
    padded = mask.new_zeros(out_features + -out_features % TILE, in_features + -in_features % TILE)
    padded[:out_features, :in_features] = mask
    rows = _row_counts(padded)[:out_features]
    columns = _column_counts(padded)[:in_features]
    stats = {
        "kept": float(rows.sum()) / mask.numel(),
        "dead_rows": _share_dead(rows),
        "dead_columns": _share_dead(columns),
        **_spread("row_kept", rows, in_features),
        **_spread("column_kept", columns, out_features),
        **_live_tiles(padded, out_features, in_features),
    }
    counts = {"rows": rows, "columns": columns, None: None}[heads_on]
    if counts is not None and head_dim and len(counts) % head_dim == 0:
        stats["dead_heads"] = _share_dead(counts.reshape(-1, head_dim).sum(dim=1))
    return {key: round(value, 6) for key, value in stats.items()}


def _row_counts(padded: Tensor) -> Tensor:
    """Count by row, [rows] int64: sums of 16 bytes fit a byte, and bytes add up fastest."""
    parts = padded.view(torch.uint8).reshape(padded.shape[0], TILE, -1)
    return parts.sum(dim=1, dtype=torch.uint8).sum(dim=1)


def _column_counts(padded: Tensor) -> Tensor:
    """Count by column, [columns] int64."""
    parts = padded.view(torch.uint8).reshape(-1, TILE, padded.shape[1])
    return parts.sum(dim=1, dtype=torch.uint8).sum(dim=0)


def _share_dead(counts: Tensor) -> float:
    return int((counts == 0).sum()) / len(counts)


def _spread(key: str, counts: Tensor, full: int) -> dict[str, float]:
    kept = counts.double() / full
    return {
        f"{key}_min": float(kept.min()),
        f"{key}_max": float(kept.max()),
        f"{key}_std": float(kept.std(correction=0)),
    }


def _live_tiles(padded: Tensor, out_features: int, in_features: int) -> dict[str, float]:
    """Count the tiles that keep something; padding keeps nothing, so only their number is cut."""
    words = padded.view(torch.int64) != 0
    tiles = words.reshape(-1, TILE, words.shape[1] // 2, 2).any(dim=1).any(dim=-1)
    return {
        "live_tiles_16x16": int(tiles.sum()) / tiles.numel(),
        "live_tiles_1x8": int(words.sum()) / (out_features * -(-in_features // 8)),
    }
