from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm.checkpoint.structure import HeadsOn, heads_of, structure


def structure_by_loop(
    mask: torch.Tensor, head_dim: int | None, heads_on: HeadsOn | None
) -> dict[str, float]:
    """Oracle: look at every row, column, head and tile, one at a time."""
    rows, columns = [list(row) for row in mask.tolist()], [list(c) for c in mask.T.tolist()]
    found = {"kept": sum(map(sum, rows)) / mask.numel()}
    for key, lines in (("row", rows), ("column", columns)):
        shares = [sum(line) / len(line) for line in lines]
        mean = sum(shares) / len(shares)
        found[f"dead_{key}s"] = shares.count(0) / len(shares)
        found[f"{key}_kept_min"], found[f"{key}_kept_max"] = min(shares), max(shares)
        found[f"{key}_kept_std"] = (sum((s - mean) ** 2 for s in shares) / len(shares)) ** 0.5
    for height, width in ((16, 16), (1, 8)):
        live = [
            any(any(row[left : left + width]) for row in rows[top : top + height])
            for top in range(0, len(rows), height)
            for left in range(0, len(columns), width)
        ]
        found[f"live_tiles_{height}x{width}"] = sum(live) / len(live)
    lines = {"rows": rows, "columns": columns, None: []}[heads_on]
    if lines and head_dim and len(lines) % head_dim == 0:
        heads = [lines[i : i + head_dim] for i in range(0, len(lines), head_dim)]
        found["dead_heads"] = sum(not any(map(any, head)) for head in heads) / len(heads)
    return found


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    share=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    head_dim=st.sampled_from([None, 1, 4, 5]),
    heads_on=st.sampled_from([None, "rows", "columns"]),
    seed=st.integers(0, 10_000),
)
def test_the_numbers_are_those_of_a_plain_loop(
    shape: tuple[int, int], share: float, head_dim: int | None, heads_on: HeadsOn | None, seed: int
) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    found = structure(mask, head_dim, heads_on)
    assert found == pytest.approx(structure_by_loop(mask, head_dim, heads_on), abs=6e-7)
    assert found == json.loads(json.dumps(found))


def test_views_of_any_stride_will_do() -> None:
    mask = torch.rand(33, 48, generator=torch.Generator().manual_seed(0)) < 0.2
    assert structure(mask.T) == structure(mask.T.contiguous())
    assert structure(mask[1:, 3:]) == structure(mask[1:, 3:].clone())


def test_counts_do_not_overflow_a_byte() -> None:
    assert structure(torch.ones(600, 700, dtype=torch.bool))["row_kept_min"] == 1.0
    assert structure(torch.ones(600, 700, dtype=torch.bool))["column_kept_min"] == 1.0


def test_dead_heads_are_found_on_either_side() -> None:
    mask = torch.ones(16, 12, dtype=torch.bool)
    mask[4:8] = False
    assert structure(mask, 4, "rows")["dead_heads"] == 0.25
    assert structure(mask.T, 4, "columns")["dead_heads"] == 0.25
    assert structure(mask, 4, "columns")["dead_heads"] == 0.0


@pytest.mark.parametrize(("head_dim", "heads_on"), [(None, "rows"), (4, None), (5, "rows")])
def test_dead_heads_stay_out_where_there_are_no_heads(
    head_dim: int | None, heads_on: HeadsOn | None
) -> None:
    assert "dead_heads" not in structure(torch.ones(16, 12, dtype=torch.bool), head_dim, heads_on)


def test_heads_are_known_by_the_projection() -> None:
    for name in ("q_proj", "self_attn.k_proj", "model.layers.0.self_attn.v_proj", "qkv_proj"):
        assert heads_of(name) == "rows"
    assert heads_of("self_attn.o_proj") == "columns"
    assert heads_of("mlp.down_proj") is None
    assert heads_of("mlp.no_proj") is None
