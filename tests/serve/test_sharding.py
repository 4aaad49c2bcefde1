"""Each tensor-parallel rank holds exactly the parts of its cut of the weight, codes included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm_linear import RANKS, SHAPE, create, fused_linear, load_columns, load_pieces
from weights import weight_of

from gblm.errors import CheckpointError
from gblm.sparse import passes
from gblm.sparse.formats import Format, from_spec
from gblm.sparse.formats.manifest import Group, Manifest
from gblm.sparse.weights import SparseWeight

pytestmark = pytest.mark.vllm
RECTANGLES = ["nm/2:4", "nm/2:4/int8:64", "nm/2:4/int4:128", "nm/2:4/int8:row", "nm/4:8/int4:row",
              "dense/dense/int8:32", "dense/dense/int4:row", "nm/8:16",
              "nm/8:16/int8:64", "nm/8:16/int4:row"]  # fmt: skip
RAGGED = ["bitmask/0.5", "bitmask/0.5/int8:64", "bitmask/0.7/int4:64", "bitmask/0.7/int4:row"]


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("spec", [*RECTANGLES, *RAGGED])
def test_columns_are_cut_in_whole_groups(
    spec: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, (rows, columns) = from_spec(spec), SHAPE
    weight = weight_of(fmt, SHAPE)
    method, layer = create(fmt, [rows], columns, RANKS, monkeypatch, rank)
    load_columns(layer, fmt.pack("w", weight))
    half = columns // RANKS
    check(fmt, method._loaded_parts(layer), weight.narrow(1, rank * half, half))


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("spec", [*RECTANGLES, *RAGGED])
def test_fused_rows_are_cut_and_joined(
    spec: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, (rows, columns) = from_spec(spec), SHAPE
    gate, up = weight_of(fmt, SHAPE), weight_of(fmt, (8, columns))
    sizes = [rows // RANKS, 8 // RANKS]
    method, layer = create(fmt, sizes, columns, 1, monkeypatch, rank)
    load_pieces(layer, [fmt.pack("w", weight) for weight in (gate, up)], sizes)
    own = [w.narrow(0, rank * size, size) for w, size in zip((gate, up), sizes, strict=True)]
    check(fmt, method._loaded_parts(layer), SparseWeight.cat(own))


ROWS = {"qkv, heads split": ([32, 16, 16], 2), "qkv, head shared": ([32, 8, 8], 1), "gate, up":
        ([24, 24], None)}  # fmt: skip


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("spec", [*RAGGED, "nm/2:4", "nm/2:4/int8:row"])
def test_what_is_fused_on_disk_is_cut_into_its_pieces(
    spec: str, kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own layers and loaders: heads of 8 rows, four of q."""
    fmt, (rows, kv_heads) = from_spec(spec), ROWS[kind]
    whole = weight_of(fmt, (sum(rows), SHAPE[1]))
    method, layer = fused_linear(fmt, rows, kv_heads, monkeypatch, rank)
    load(layer, fmt.pack("w", whole))
    starts = [sum(rows[:piece]) for piece in range(len(rows))]
    shared = [kv_heads == 1 and piece > 0 for piece in range(len(rows))]
    sizes = [size // (1 if one else RANKS) for size, one in zip(rows, shared, strict=True)]
    own = SparseWeight.cat([
        whole.narrow(0, start + (0 if one else rank * size), size)
        for start, size, one in zip(starts, sizes, shared, strict=True)
    ])  # fmt: skip
    check(fmt, method._loaded_parts(layer), own)


def test_some_pieces_may_be_fused_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, rows = from_spec("bitmask/0.7/int4:64"), [8, 24, 16]
    weights = [weight_of(fmt, (size, SHAPE[1])) for size in rows]
    method, layer = fused_linear(fmt, rows, None, monkeypatch, 1)
    load(layer, fmt.pack("w", weights[2]), 2)
    load(layer, fmt.pack("w", SparseWeight.cat(weights[:2])), (0, 1))
    own = [w.narrow(0, size // RANKS, size // RANKS) for w, size in zip(weights, rows, strict=True)]
    check(fmt, method._loaded_parts(layer), SparseWeight.cat(own))


@pytest.mark.parametrize("rows", [40, 56])
def test_fused_rows_of_another_number_are_refused(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = from_spec("bitmask/0.5")
    _, layer = fused_linear(fmt, [24, 24], None, monkeypatch, 0)
    with pytest.raises(CheckpointError, match=rf"w\.bitmask: .*{rows}.*48"):
        load(layer, fmt.pack("w", weight_of(fmt, (rows, SHAPE[1]))))


def load(layer: torch.nn.Module, tensors: dict[str, torch.Tensor], *shard: object) -> None:
    """As vLLM's models do with tensors that have the names of the parameters."""
    for part, tensor in tensors.items():
        parameter = layer.get_parameter(part)
        parameter.weight_loader(parameter, tensor, *shard)


def config_of(**formats: tuple[str, str, str]) -> Any:
    """Of linears that vLLM fuses: format, pattern and values of each."""
    from gblm.serve.vllm_plugin.config import SparseConfig

    groups = (
        Group(format=name, pattern=pattern, values=values, targets=(f"m.{linear}",))
        for linear, (name, pattern, values) in formats.items()
    )
    config = SparseConfig(Manifest(groups=tuple(groups)))
    config.packed_modules_mapping = {"gate_up_proj": [*formats]}
    return config


@pytest.mark.parametrize("values", ["float", "int4:64"])
def test_fused_rows_may_differ_in_sparsity(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = {"gate_proj": "0.3", "up_proj": "0.7"}
    config = config_of(**{name: ("bitmask", one, values) for name, one in patterns.items()})
    joined = config._format_of("m.gate_up_proj")
    assert joined is not None
    columns = SHAPE[1]
    method, layer = create(joined, [8 // RANKS, 8 // RANKS], columns, 1, monkeypatch, 1)
    formats = [config.manifest.format_of(f"m.{name}") for name in patterns]
    weights = [weight_of(fmt, (8, columns)) for fmt in formats if fmt]
    parts = [fmt.pack("w", one) for fmt, one in zip(formats, weights, strict=True) if fmt]
    load_pieces(layer, parts, [8 // RANKS, 8 // RANKS])
    own = [weight.narrow(0, 8 // RANKS, 8 // RANKS) for weight in weights]
    check(joined, method._loaded_parts(layer), SparseWeight.cat(own))


def test_fused_rows_of_two_formats_are_refused() -> None:
    config = config_of(gate_proj=("nm", "2:4", "float"), up_proj=("bitmask", "0.5", "float"))
    with pytest.raises(CheckpointError, match="vLLM fuses gate_proj, up_proj, but"):
        config._format_of("m.gate_up_proj")


def check(fmt: Format, parts: dict[str, torch.Tensor], weight: SparseWeight) -> None:
    shape = (weight.mask.shape[0], weight.mask.shape[1])
    fmt.validate("w", parts, shape)
    want = fmt.pack("w", weight)
    assert parts.keys() == want.keys()
    for part, tensor in want.items():
        assert parts[part].dtype == tensor.dtype
        assert torch.equal(parts[part].view(torch.uint8), tensor.view(torch.uint8)), part


@pytest.mark.parametrize(
    ("spec", "columns", "num_ranks", "match"),
    [
        ("nm/2:4/int8:128", 384, 2, "192 columns .* of 128 .*over 2 tensor-.*that work: 1, 3"),
        ("bitmask/0.5/int4:64", 576, 2, "288 columns .* of 64 .*sizes that work: 1, 3, 9"),
        ("nm/1:32/int4:32", 128, 4, "int4 codes of 32 columns end within a byte.*work: 1, 2"),
        ("nm/2:4", 48, 4, "12 columns are not a multiple of 8.*sizes that work: 1, 2, 3, 6"),
    ],
)
def test_cuts_through_groups_are_refused_with_sizes_that_work(
    spec: str, columns: int, num_ranks: int, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=match):
        create(from_spec(spec), [8], columns, num_ranks, monkeypatch, 0)


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("spec", RAGGED)
def test_ragged_pieces_are_joined_in_blocks(
    spec: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks have query heads of their own and share the key and value head."""
    fmt, columns = from_spec(spec), SHAPE[1]
    monkeypatch.setattr(passes, "BLOCK", 3 * columns)
    q, kv = weight_of(fmt, (16, columns)), weight_of(fmt, (8, columns))
    method, layer = create(fmt, [8, 8, 8], columns, 1, monkeypatch, rank)
    for shard, weight in (("q", q), ("k", kv), ("v", kv)):
        for part, tensor in fmt.pack("w", weight).items():
            getattr(layer, part).load_qkv_weight(
                loaded_weight=tensor, shard_id=shard, num_heads=RANKS, shard_offset=0, shard_size=0
            )
    assert not method.pieces._done, "a weight stays unpacked"
    check(fmt, method._loaded_parts(layer), SparseWeight.cat([q.narrow(0, 8 * rank, 8), kv, kv]))
