"""What every format promises, over FORMATS × dtypes × awkward shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import pairwise
from weights import weight_of

from gblm.errors import CheckpointError, PatternError
from gblm.sparse import passes
from gblm.sparse.formats import FORMATS, Format, format_for, from_spec, make_format
from gblm.sparse.formats.bits import pack_bits, unpack_bits
from gblm.sparse.patterns import parse
from gblm.sparse.values import ValueType, parse_values, quantize
from gblm.sparse.weights import SparseWeight, same_bits

CASES = [("nm", "2:4"), ("nm", "4:8"), ("nm", "8:16"), ("nm", "1:4"), ("nm", "3:4"),
         ("bitmask", "0.5"), ("bitmask", "0.9"), ("bitmask", "0"),
         ("dense", "dense")]  # fmt: skip
INTEGERS = ["int8:row", "int4:row", "int8:32", "int4:32", "int8:64", "int4:64"]
NARROW = ["int3:row", "int3:32"]
SHAPES = [(1, 8), (3, 16), (16, 64), (7, 40), (5, 192)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def fitted(pattern: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape, twice as wide where it would cut a group of 8:16."""
    return (shape[0], 2 * shape[1]) if pattern == "8:16" and shape[1] % 16 else shape


def test_every_format_is_tested() -> None:
    assert {name for name, _ in CASES} == set(FORMATS)


def fits(case: tuple[str, str], values: str, shape: tuple[int, int], *_: object) -> bool:
    try:
        make_format(*case, values).check_shape("w", shape)
    except (CheckpointError, PatternError):
        return False
    return True


@pytest.mark.parametrize(
    ("case", "values", "shape", "dtype"),
    pairwise(CASES, ["float", *INTEGERS, *NARROW], SHAPES, DTYPES, allowed=fits),
    ids=str,
)
def test_unpack_is_the_exact_inverse_of_pack(
    case: tuple[str, str], values: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    fmt = make_format(*case, values)
    weight = weight_of(fmt, shape, dtype)
    parts = fmt.pack("w", weight)
    fmt.validate("w", parts, shape)
    back = fmt.unpack(parts, dtype)
    for name in ("weight", "mask", "codes", "scales"):
        one, other = getattr(back, name), getattr(weight, name)
        assert (one is None) == (other is None)
        assert one is None or same_bits(one, other)
    assert same_bits(fmt.expand(parts, dtype), weight.weight)
    assert all(same_bits(tensor, parts[p]) for p, tensor in fmt.pack("w", back).items())


@pytest.mark.parametrize("values", ["float", "int8:32", "int4:row"])
@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_blocks_of_rows_change_nothing(
    name: str, pattern: str, values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, score = make_format(name, pattern, values), torch.randn(96, 7).t().bfloat16()

    def packed() -> dict[str, torch.Tensor]:
        mask = fmt.pattern.keep(score, "row") & (score > -1)
        weight = SparseWeight.cut(score, mask if name != "dense" else torch.ones_like(mask))
        if values != "float":
            weight = quantize(score, weight.mask, fmt.values)
        parts = fmt.pack("w", weight)
        fmt.validate("w", parts, (7, 96))
        return parts | {"unpacked": fmt.expand(parts)}

    whole = packed()
    monkeypatch.setattr(passes, "BLOCK", 3 * 96)
    assert all(same_bits(tensor, whole[part]) for part, tensor in packed().items())


@pytest.mark.parametrize("values", ["float", "int8:32", "int4:row"])
@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_layout_describes_the_parts(name: str, pattern: str, values: str) -> None:
    fmt, shape = make_format(name, pattern, values), (16, 64)
    parts = fmt.pack("w", weight_of(fmt, shape, torch.bfloat16))
    layout = fmt.layout(shape, torch.bfloat16)
    assert tuple(layout) == tuple(parts) == fmt.parts
    for part, spec in layout.items():
        assert spec.fits(tuple(parts[part].shape), parts[part].dtype)
    headers = {part: (tuple(t.shape), t.dtype) for part, t in parts.items()}
    assert fmt.shape_of("w", headers) == shape


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_special_values_survive(name: str, pattern: str) -> None:
    fmt, shape = make_format(name, pattern), fitted(pattern, (5, 8))
    drawn = weight_of(fmt, shape, torch.float32)
    specials = [float("nan"), float("inf"), -float("inf"), 1e-45, 3.4e38]
    for place, value in zip(drawn.mask.nonzero(), specials, strict=False):
        drawn.weight[tuple(place)] = value
    assert same_bits(fmt.unpack(fmt.pack("w", drawn)).weight, drawn.weight)


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_negative_zero_is_stored_as_positive_zero(name: str, pattern: str) -> None:
    fmt, shape = make_format(name, pattern), fitted(pattern, (2, 8))
    mask = fmt.pattern.keep(torch.rand(shape), "row")
    back = fmt.unpack(fmt.pack("w", SparseWeight(torch.full(shape, -0.0), mask))).weight
    assert same_bits(back, torch.zeros(shape))


@settings(max_examples=100, deadline=None)
@given(
    case=st.sampled_from([case for case in CASES if case[0] != "dense"]),
    values=st.sampled_from(["float", "int8:row", "int4:row"]),
    rows=st.integers(1, 6),
    octets=st.integers(1, 6),
    seed=st.integers(0, 10_000),
)
def test_fewer_kept_weights_than_allowed_pack_exactly(
    case: tuple[str, str], values: str, rows: int, octets: int, seed: int
) -> None:
    fmt, shape = make_format(*case, values), fitted(case[1], (rows, 8 * octets))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    mask = fmt.pattern.keep(weight.abs(), "row")
    mask &= torch.rand(shape, generator=generator) < 0.7
    sparse = SparseWeight.cut(weight, mask)
    if not fmt.values.is_float:
        sparse = quantize(weight, mask, fmt.values)
    parts = fmt.pack("w", sparse)
    fmt.validate("w", parts, shape)
    assert same_bits(fmt.expand(parts, torch.float32), sparse.weight)
    for row in range(rows):
        again = fmt.expand(fmt.rows(parts, row, row + 1), torch.float32)
        assert same_bits(again, sparse.weight[row : row + 1])


@pytest.mark.parametrize("values", ["float", "int8:32", "int4:row"])
@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_rows_are_the_parts_of_the_cut_weight(name: str, pattern: str, values: str) -> None:
    fmt, shape = make_format(name, pattern, values), (7, 96)
    weight = weight_of(fmt, shape, torch.float32)
    parts = fmt.pack("w", weight)
    for start, stop in ((0, 7), (2, 3), (3, 7)):
        cut = weight.narrow(0, start, stop - start)
        rows = fmt.rows(parts, start, stop)
        fmt.validate("w", rows, (stop - start, 96))
        assert all(same_bits(rows[p], tensor) for p, tensor in fmt.pack("w", cut).items())
    joined = fmt.join([fmt.rows(parts, start, stop) for start, stop in ((0, 1), (1, 4), (4, 7))])
    assert all(same_bits(joined[part], tensor) for part, tensor in parts.items())


@pytest.mark.parametrize("values", ["float", "int8:32", "int4:32"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "1:4", "dense"])
@pytest.mark.parametrize("dim", [0, 1])
def test_cut_parts_equal_packing_the_cut_weight(pattern: str, dim: int, values: str) -> None:
    fmt, shape = format_for(parse(pattern), parse_values(values)), (8, 64)
    weight = weight_of(fmt, shape, torch.float32)
    parts = fmt.pack("w", weight)
    for start in (0, shape[dim] // 2):
        want = fmt.pack("w", weight.narrow(dim, start, shape[dim] // 2))
        for part, tensor in parts.items():
            size = tensor.shape[dim] // 2
            offset = 0 if start == 0 else size
            assert same_bits(tensor.narrow(dim, offset, size).contiguous(), want[part])


def filled_by_loop(mask: torch.Tensor) -> torch.Tensor:
    """Oracle: column by column from the left, while its half holds less than 5 and the group 8."""
    filled = mask.clone()
    for row, column in (~mask).nonzero().tolist():
        group, half = column // 16 * 16, column // 8 * 8
        if filled[row, half : half + 8].sum() < 5 and filled[row, group : group + 16].sum() < 8:
            filled[row, column] = True
    return filled


@settings(max_examples=100, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_8_16_keeps_zeros_where_its_halves_allow(share: float, seed: int) -> None:
    fmt, generator = make_format("nm", "8:16"), torch.Generator().manual_seed(seed)
    mask = fmt.pattern.keep(torch.rand(20, 32, generator=generator), "row")
    mask &= torch.rand(20, 32, generator=generator) < share
    mask[::3, :8] = mask[1::3, 24:] = False
    stored = fmt.stored_mask(mask)
    assert torch.equal(stored, filled_by_loop(mask))
    parts = {"values": torch.zeros(20, 16), **fmt.mask_parts(stored)}
    fmt.validate("w", parts, (20, 32))


def test_stored_halves_of_8_16_that_keep_too_many_are_refused() -> None:
    fmt, mask = make_format("nm", "8:16"), torch.zeros(4, 32, dtype=torch.bool)
    mask[:, 2:7] = mask[:, 9:12] = mask[:, 17:20] = mask[:, 26:31] = True
    parts = {"values": torch.ones(4, 16), **fmt.mask_parts(mask)}
    fmt.validate("w", parts, (4, 32))
    mask[2, 17], mask[2, 31] = False, True
    parts |= fmt.mask_parts(mask)
    message = (
        r"w\.bitmask: row 2, columns 24\.\.31 keep 6 weights; 8:16 keeps 3 to 5 in each half of a "
        r"group\. The file is damaged"
    )
    with pytest.raises(CheckpointError, match=message):
        fmt.validate("w", parts, (4, 32))
    mask[2, 31] = False
    with pytest.raises(CheckpointError, match=r"row 2, columns 16\.\. keep 7 weights"):
        fmt.validate("w", parts | fmt.mask_parts(mask), (4, 32))


def test_pack_refuses_a_dense_weight() -> None:
    dense = SparseWeight.cut(torch.ones(4, 8), torch.ones(4, 8).bool())
    with pytest.raises(PatternError, match=r"w: row 0, columns 0\.\.3 hold 4 non-zeros; 2:4"):
        make_format("nm", "2:4").pack("w", dense)


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_columns_that_are_no_multiple_of_8_are_refused(name: str, pattern: str) -> None:
    weight = SparseWeight(torch.zeros(4, 12), torch.zeros(4, 12) == 0)
    with pytest.raises(PatternError, match=r"w: 12 columns"):
        make_format(name, pattern).pack("w", weight)


@pytest.mark.parametrize("values", ["float", *INTEGERS])
@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_spec_round_trips(name: str, pattern: str, values: str) -> None:
    spec = make_format(name, pattern, values).spec
    assert spec == f"{name}/{pattern}" + ("" if values == "float" else f"/{values}")
    fmt = from_spec(spec)
    assert (fmt.name, str(fmt.pattern), str(fmt.values)) == (name, pattern, values)
    assert type(format_for(parse(pattern))) is FORMATS[name]


@pytest.mark.parametrize("values", ["int8", "int8:auto", "int8:0", "int8:48", "int3:64", "", "f"])
def test_hostile_or_unsettled_values_are_refused(values: str) -> None:
    with pytest.raises(CheckpointError, match="manifest: "):
        make_format("nm", "2:4", values)


@pytest.mark.parametrize("values", NARROW)
def test_kernels_see_three_bits_as_four(values: str) -> None:
    fmt, shape = make_format("dense", "dense", values), (5, 192)
    codes, groups = torch.arange(-4, 4).to(torch.int8).repeat(5, 24), fmt.layout(shape)["scales"]
    every = torch.ones(shape, dtype=torch.bool)
    scales = torch.rand(groups.shape, dtype=torch.float32).add(1).bfloat16()
    parts = fmt.pack("w", SparseWeight.from_codes(codes, scales, every, torch.bfloat16))
    assert parts["values"].shape == (5, 3 * 192 // 8)
    assert from_spec(fmt.spec) == fmt
    known, wider = fmt.widened(), fmt.widen(parts)
    assert known.spec == f"dense/dense/{values.replace('int3', 'int4')}"
    known.validate("w", wider, shape)
    assert all(torch.equal(one.unpack(its).codes, codes)
               for one, its in ((fmt, parts), (known, wider)))  # fmt: skip
    sparse = make_format("nm", "2:4", "int4:32")
    assert sparse.widened() is sparse
    assert sparse.widen(parts) is parts


def test_folders_of_values_that_went_are_told_how_to_go_on() -> None:
    with pytest.raises(CheckpointError, match=r"uint4:64.* prune again with --values int4"):
        make_format("nm", "2:4", "uint4:64")


def test_a_format_never_loses_or_makes_up_codes() -> None:
    integers, floats = make_format("nm", "2:4", "int8:row"), make_format("nm", "2:4")
    weight = weight_of(integers, (4, 8), torch.float32)
    with pytest.raises(PatternError, match=r"w: format nm/2:4 would lose the weight's codes"):
        floats.pack("w", weight)
    with pytest.raises(PatternError, match=r"w: format nm/2:4/int8:row stores codes, but the"):
        integers.pack("w", SparseWeight(weight.weight, weight.mask))
    with pytest.raises(PatternError, match="do not fit int4, which has -8 to 7"):
        make_format("nm", "2:4", "int4:row").pack("w", weight)
    grouped = weight_of(integers, (4, 64), torch.float32)
    with pytest.raises(PatternError, match=r"scales are \[4, 1\] torch.bfloat16; format .* needs"):
        make_format("nm", "2:4", "int8:32").pack("w", grouped)


def test_dense_refuses_a_mask_with_holes() -> None:
    weight = SparseWeight.cut(torch.eye(8), torch.eye(8).bool())
    with pytest.raises(PatternError, match="w: row 0, column 1 is dropped; dense keeps all"):
        make_format("dense", "dense").pack("w", weight)


@pytest.mark.parametrize(
    ("name", "pattern"), [("zip", "2:4"), ("nm", "0.5"), ("bitmask", "2:4"), ("nm", "9:4"),
                          ("os:system", "2:4"), ("nm", "__import__"), ("nm", "16x16@0.5"),
                          ("bitmask", "0x16@1"), ("dense", "0"), ("bitmask", "dense"),
                          ("bitmask", "16x20000@0.5")]
)  # fmt: skip
def test_hostile_or_unknown_names_are_refused(name: str, pattern: str) -> None:
    with pytest.raises(CheckpointError):
        make_format(name, pattern)


def test_bit_order_is_least_significant_first() -> None:
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 0] = mask[0, 9] = True
    assert pack_bits(mask).tolist() == [[1, 2]]
    assert torch.equal(unpack_bits(pack_bits(mask)), mask)


def test_disk_layout_is_pinned() -> None:
    """docs/format.md, example; a change here needs a new manifest version."""
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 3, 0, 4], [0, 5, 6, 0, 7, 0, 0, 0]])
    nm = make_format("nm", "2:4").pack("w", SparseWeight.cut(weight, weight.bool()))
    assert nm["values"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert nm["bitmask"].tolist() == [[0b10100101], [0b00110110]]
    ragged = make_format("bitmask", "0.5").pack("w", SparseWeight.cut(weight, weight.bool()))
    assert ragged["values"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert ragged["bitmask"].tolist() == [[0b10100101], [0b00010110]]
    assert ragged["row_offsets"].tolist() == [0, 4, 7]


def test_disk_layout_of_codes_is_pinned() -> None:
    """docs/format.md, example of integer values."""
    weight = torch.tensor([[7.0, 0, -2, 0, 0, 3, 0, 4], [0, 5, 6, 0, 7, 0, 0, 0]])
    sparse = quantize(weight, weight != 0, ValueType("int4", -1))
    nm = make_format("nm", "2:4", "int4:row").pack("w", sparse)
    assert nm["values"].tolist() == [[0xE7, 0x43], [0x65, 0x07]]
    assert nm["scales"].tolist() == [[1], [1]]
    ragged = make_format("bitmask", "0.5", "int4:row").pack("w", sparse)
    assert ragged["values"].tolist() == [0xE7, 0x43, 0x65, 0x07]
    assert ragged["row_offsets"].tolist() == [0, 4, 7]
    wide = quantize(weight, weight != 0, ValueType("int8", -1))
    scale = torch.tensor(7 / 127).bfloat16()
    codes = make_format("nm", "2:4", "int8:row").pack("w", wide)
    assert codes["values"].tolist() == [[127, -36, 54, 72], [91, 109, 127, 0]]
    assert codes["scales"].tolist() == [[float(scale)]] * 2


# What a file may hold instead of numbers: tests/damage.py. Here is what differs by the format.

STORED = [make_format(*case, values)
          for case in (("nm", "2:4"), ("bitmask", "0.5"), ("dense", "dense"))
          for values in ("float", "int8:row", "int4:row")]  # fmt: skip
CODES = [fmt for fmt in STORED if not fmt.values.is_float]


def refuse(fmt: Format, parts: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        fmt.validate("w", parts, (4, 16))


@pytest.mark.parametrize("fmt", STORED, ids=lambda fmt: fmt.spec)
def test_missing_misshapen_or_mistyped_parts(fmt: Format) -> None:
    good = fmt.pack("w", weight_of(fmt, (4, 16)))
    for part in fmt.parts:
        refuse(fmt, {name: good[name] for name in good if name != part}, "missing|dtype None")
        refuse(fmt, good | {part: good[part][:-1].to(torch.int16)}, r"w\.|dtype")


@pytest.mark.parametrize("fmt", CODES, ids=lambda fmt: fmt.spec)
def test_codes_without_an_opposite_are_codes(fmt: Format) -> None:
    weight = torch.ones(4, 16).cumsum(dim=1)
    good = fmt.pack("w", quantize(weight, fmt.pattern.keep(weight, "row"), fmt.values))
    for place, nibble in ((2, 0x08), (3, 0x80)):
        parts = good | {"values": good["values"].clone()}
        eight = fmt.values.kind == "int8"
        parts["values"].view(-1)[1] = -128 if eight else nibble
        fmt.validate("w", parts, (4, 16))
        assert fmt.kept(parts).reshape(-1)[1 if eight else place] == fmt.values.least
        found = fmt.unpack(parts, torch.float64)
        assert found.weight.min() == float(parts["scales"][0, 0]) * fmt.values.least
        assert fmt.pack("w", found)["values"].equal(parts["values"])


@pytest.mark.parametrize(("name", "pattern"), [("nm", "1:16"), ("bitmask", "0.9")])
def test_padding_that_is_not_zero(name: str, pattern: str) -> None:
    fmt, mask = make_format(name, pattern, "int4:row"), torch.zeros(4, 16, dtype=torch.bool)
    mask[:, 3] = True
    parts = fmt.pack("w", quantize(torch.ones(4, 16), mask, fmt.values))
    fmt.validate("w", parts, (4, 16))
    parts["values"].view(-1)[2] |= 0x10
    refuse(fmt, parts, r"w\.values: the last nibble of a row with an odd number of codes is not 0")


def test_ragged_codes_that_are_cut_off() -> None:
    fmt = make_format("bitmask", "0.5", "int4:row")
    parts = fmt.pack("w", weight_of(fmt, (4, 16)))
    refuse(fmt, parts | {"values": parts["values"][:-1]}, r"w\.row_offsets: run from 0 to \d+, but")
