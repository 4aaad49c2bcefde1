"""What every format promises, over FORMATS × dtypes × awkward shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm.errors import CheckpointError, PatternError
from gblm.formats import FORMATS, Format, format_for, from_spec, make_format
from gblm.formats.bits import pack_bits, unpack_bits
from gblm.patterns import Block, Scope, parse
from gblm.weights import SparseWeight

CASES = [("nm", "2:4"), ("nm", "4:8"), ("nm", "1:4"), ("nm", "3:4"), ("bitmask", "0.5"),
         ("bitmask", "0.9"), ("bitmask", "0"), ("bitmask", "1x4@0.5")]  # fmt: skip
SHAPES = [(1, 8), (3, 16), (16, 64), (7, 40)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_weight(fmt: Format, shape: tuple[int, int], dtype: torch.dtype) -> SparseWeight:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    weight = torch.randn(shape, generator=generator).to(dtype)
    return SparseWeight.cut(weight, fmt.pattern.keep(weight.float().abs(), "row"))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_every_format_is_tested() -> None:
    assert {name for name, _ in CASES} == set(FORMATS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_unpack_is_the_exact_inverse_of_pack(
    name: str, pattern: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    fmt = make_format(name, pattern)
    weight = random_weight(fmt, shape, dtype)
    parts = fmt.pack("w", weight)
    fmt.validate("w", parts, shape)
    back = fmt.unpack(parts)
    assert same_bits(back.weight, weight.weight)
    assert torch.equal(back.mask, weight.mask)
    assert same_bits(fmt.expand(parts), weight.weight)


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_layout_describes_the_parts(name: str, pattern: str) -> None:
    fmt, shape = make_format(name, pattern), (16, 64)
    parts = fmt.pack("w", random_weight(fmt, shape, torch.bfloat16))
    layout = fmt.layout(shape, torch.bfloat16)
    assert tuple(layout) == tuple(parts) == fmt.parts
    for part, spec in layout.items():
        assert spec.fits(tuple(parts[part].shape), parts[part].dtype)
    assert fmt.shape_of(tuple(parts["bitmask"].shape)) == shape


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_special_values_survive(name: str, pattern: str) -> None:
    fmt, shape = make_format(name, pattern), (2, 8)
    weight = random_weight(fmt, shape, torch.float32).weight
    kept = weight.nonzero()
    specials = [float("nan"), float("inf"), -float("inf"), 1e-45, 3.4e38]
    for place, value in zip(kept, specials, strict=False):
        weight[tuple(place)] = value
    back = fmt.unpack(fmt.pack("w", SparseWeight.from_zeros(weight))).weight
    assert same_bits(back, weight)


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_negative_zero_is_stored_as_positive_zero(name: str, pattern: str) -> None:
    fmt, shape = make_format(name, pattern), (2, 8)
    mask = fmt.pattern.keep(torch.rand(shape), "row")
    back = fmt.unpack(fmt.pack("w", SparseWeight(torch.full(shape, -0.0), mask))).weight
    assert same_bits(back, torch.zeros(shape))


@settings(max_examples=50, deadline=None)
@given(
    case=st.sampled_from(CASES),
    rows=st.integers(1, 6),
    octets=st.integers(1, 6),
    seed=st.integers(0, 10_000),
)
def test_fewer_kept_weights_than_allowed_pack_exactly(
    case: tuple[str, str], rows: int, octets: int, seed: int
) -> None:
    fmt, shape = make_format(*case), (rows, 8 * octets)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    mask = fmt.pattern.keep(weight.abs(), "row")
    mask &= torch.rand(shape, generator=generator) < 0.7
    parts = fmt.pack("w", SparseWeight.cut(weight, mask))
    fmt.validate("w", parts, shape)
    assert same_bits(fmt.expand(parts), torch.where(mask, weight, torch.zeros(())))


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_rows_are_the_parts_of_the_cut_weight(name: str, pattern: str) -> None:
    fmt, shape = make_format(name, pattern), (7, 16)
    weight = random_weight(fmt, shape, torch.float32)
    parts = fmt.pack("w", weight)
    for start, stop in ((0, 7), (2, 3), (3, 7)):
        cut = SparseWeight(weight.weight[start:stop], weight.mask[start:stop])
        rows = fmt.rows(parts, start, stop)
        fmt.validate("w", rows, (stop - start, 16))
        assert all(torch.equal(rows[p], tensor) for p, tensor in fmt.pack("w", cut).items())


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize("dim", [0, 1])
def test_cut_parts_equal_packing_the_cut_weight(pattern: str, dim: int) -> None:
    fmt, shape = make_format("nm", pattern), (8, 32)
    weight = random_weight(fmt, shape, torch.float32)
    parts = fmt.pack("w", weight)
    for start in (0, shape[dim] // 2):
        length = shape[dim] // 2
        cut = SparseWeight(
            weight.weight.narrow(dim, start, length), weight.mask.narrow(dim, start, length)
        )
        want = fmt.pack("w", cut)
        for part, tensor in parts.items():
            size = tensor.shape[dim] // 2
            offset = 0 if start == 0 else size
            assert torch.equal(tensor.narrow(dim, offset, size), want[part])


def test_pack_refuses_a_dense_weight() -> None:
    dense = SparseWeight.from_zeros(torch.ones(4, 8))
    with pytest.raises(PatternError, match=r"w: row 0, columns 0\.\.3 hold 4 non-zeros; 2:4"):
        make_format("nm", "2:4").pack("w", dense)


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_columns_that_are_no_multiple_of_8_are_refused(name: str, pattern: str) -> None:
    weight = SparseWeight.from_zeros(torch.zeros(4, 12))
    with pytest.raises(PatternError, match=r"w: 12 columns"):
        make_format(name, pattern).pack("w", weight)


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_spec_round_trips(name: str, pattern: str) -> None:
    fmt = from_spec(make_format(name, pattern).spec)
    assert (fmt.name, str(fmt.pattern)) == (name, pattern)
    assert type(format_for(parse(pattern))) is FORMATS[name]


@pytest.mark.parametrize(
    ("name", "pattern"), [("zip", "2:4"), ("nm", "0.5"), ("bitmask", "2:4"), ("nm", "9:4"),
                          ("os:system", "2:4"), ("nm", "__import__"), ("nm", "16x16@0.5"),
                          ("bitmask", "0x16@0.5"), ("bitmask", "16x2000@0.5")]
)  # fmt: skip
def test_hostile_or_unknown_names_are_refused(name: str, pattern: str) -> None:
    with pytest.raises(CheckpointError):
        make_format(name, pattern)


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_stored_as_they_are(dtype: torch.dtype, scope: Scope) -> None:
    fmt = from_spec("bitmask/16x8@0.75")
    assert fmt.pattern == Block(0.75, 16, 8)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    pruned = SparseWeight.cut(weight, fmt.pattern.keep(weight.float().abs(), scope))
    parts = fmt.pack("w", pruned)
    fmt.validate("w", parts, (32, 64))
    back = fmt.unpack(parts)
    fmt.pattern.check_mask("w", back.mask)
    assert same_bits(back.weight, pruned.weight)
    assert torch.equal(back.mask, pruned.mask)


def test_blocks_that_do_not_fit_are_refused() -> None:
    weight = SparseWeight.from_zeros(torch.zeros(24, 64))
    with pytest.raises(PatternError, match=r"w: 24 rows do not divide into blocks of 16"):
        make_format("bitmask", "16x8@0.5").pack("w", weight)


def test_bit_order_is_least_significant_first() -> None:
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 0] = mask[0, 9] = True
    assert pack_bits(mask).tolist() == [[1, 2]]
    assert torch.equal(unpack_bits(pack_bits(mask)), mask)


def test_disk_layout_is_pinned() -> None:
    """docs/format.md, example; a change here needs a new manifest version."""
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 3, 0, 4], [0, 5, 6, 0, 7, 0, 0, 0]])
    nm = make_format("nm", "2:4").pack("w", SparseWeight.from_zeros(weight))
    assert nm["values"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert nm["bitmask"].tolist() == [[0b10100101], [0b00110110]]
    ragged = make_format("bitmask", "0.5").pack("w", SparseWeight.from_zeros(weight))
    assert ragged["values"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert ragged["bitmask"].tolist() == [[0b10100101], [0b00010110]]
    assert ragged["row_offsets"].tolist() == [0, 4, 7]
