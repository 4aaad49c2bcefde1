"""Damaged parts are named before anything uses them."""

from __future__ import annotations

import pytest
import torch

from gblm.errors import CheckpointError
from gblm.sparse.formats import Format, make_format
from gblm.sparse.values import quantize
from gblm.sparse.weights import SparseWeight

SHAPE = (4, 16)
FORMATS = [("nm", "2:4"), ("bitmask", "0.5"), ("dense", "dense")]
INTEGERS = [(*fmt, values) for values in ("int8:row", "int4:row") for fmt in FORMATS]


def good(fmt: Format) -> dict[str, torch.Tensor]:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    mask = fmt.pattern.keep(weight.abs(), "row")
    if not fmt.values.is_float:
        return fmt.pack("w", quantize(weight, mask, fmt.values))
    return fmt.pack("w", SparseWeight.cut(weight, mask))


def refuse(fmt: Format, parts: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        fmt.validate("w", parts, SHAPE)


def test_nm_group_with_a_wrong_count() -> None:
    fmt = make_format("nm", "2:4")
    parts = good(fmt)
    parts["bitmask"][2, 1] = 0b11110000
    refuse(fmt, parts, r"w\.bitmask: row 2, columns 8\.\. keep 0")


@pytest.mark.parametrize("case", ["count", "order", "total"])
def test_bitmask_offsets_that_lie(case: str) -> None:
    fmt = make_format("bitmask", "0.5")
    parts = good(fmt)
    if case == "count":
        parts["bitmask"][1, 0] ^= 1
    elif case == "order":
        parts["row_offsets"][1] = 10**12
    else:
        parts["row_offsets"][-1] += 1
    refuse(fmt, parts, r"w\.row_offsets")


@pytest.mark.parametrize(
    ("name", "pattern", "values"), [*((*fmt, "float") for fmt in FORMATS), *INTEGERS]
)
def test_missing_misshapen_or_mistyped_parts(name: str, pattern: str, values: str) -> None:
    fmt = make_format(name, pattern, values)
    for part in fmt.parts:
        parts = good(fmt)
        del parts[part]
        refuse(fmt, parts, "missing|dtype None")
        parts = good(fmt)
        parts[part] = parts[part][:-1].to(torch.int16)
        refuse(fmt, parts, r"w\.|dtype")


@pytest.mark.parametrize(("name", "pattern"), FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_floats_that_are_no_numbers(name: str, pattern: str, bad: float) -> None:
    fmt = make_format(name, pattern)
    parts = good(fmt)
    parts["values"].view(-1)[1] = bad
    refuse(fmt, parts, r"w\.values: holds NaN or Inf")


def test_integer_values_are_refused() -> None:
    fmt = make_format("nm", "2:4")
    refuse(fmt, good(fmt) | {"values": torch.zeros(4, 8, dtype=torch.int8)}, "floating point")


@pytest.mark.parametrize(("name", "pattern", "values"), INTEGERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1.0, 0.0])
def test_scales_that_scale_nothing(name: str, pattern: str, values: str, bad: float) -> None:
    fmt = make_format(name, pattern, values)
    parts = good(fmt)
    parts["scales"][2, 0] = bad
    refuse(fmt, parts, r"w\.scales: row 2, group 0 is")


@pytest.mark.parametrize(("name", "pattern", "values"), INTEGERS)
def test_codes_without_an_opposite_are_codes(name: str, pattern: str, values: str) -> None:
    fmt = make_format(name, pattern, values)
    for place, nibble in ((2, 0x08), (3, 0x80)):
        parts = good(fmt)
        eight = fmt.values.kind == "int8"
        parts["values"].view(-1)[1] = -128 if eight else nibble
        fmt.validate("w", parts, SHAPE)
        assert fmt.kept(parts).reshape(-1)[1 if eight else place] == fmt.values.least
        weight = fmt.unpack(parts, torch.float64)
        assert weight.weight.min() == float(parts["scales"][0, 0]) * fmt.values.least
        assert fmt.pack("w", weight)["values"].equal(parts["values"])


def test_codes_of_another_width() -> None:
    refuse(make_format("nm", "2:4", "int8:row"), good(make_format("nm", "2:4", "int4:row")),
           r"w\.values: is \[4, 4\] torch.uint8, but .* needs \[4, 8\] torch.int8")  # fmt: skip


@pytest.mark.parametrize(("name", "pattern"), [("nm", "1:16"), ("bitmask", "0.9")])
def test_padding_that_is_not_zero(name: str, pattern: str) -> None:
    fmt = make_format(name, pattern, "int4:row")
    weight = torch.ones(SHAPE)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, 3] = True
    parts = fmt.pack("w", quantize(weight, mask, fmt.values))
    fmt.validate("w", parts, SHAPE)
    parts["values"].view(-1)[2] |= 0x10
    refuse(fmt, parts, r"w\.values: the last nibble of a row with an odd number of codes is not 0")


def test_ragged_codes_that_are_cut_off() -> None:
    fmt = make_format("bitmask", "0.5", "int4:row")
    parts = good(fmt)
    refuse(fmt, parts | {"values": parts["values"][:-1]}, r"w\.row_offsets: run from 0 to 32, but")
