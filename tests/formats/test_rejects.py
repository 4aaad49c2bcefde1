"""Damaged parts are named before anything uses them."""

from __future__ import annotations

import pytest
import torch

from gblm.errors import CheckpointError
from gblm.formats import Format, make_format
from gblm.weights import SparseWeight

SHAPE = (4, 16)


def good(fmt: Format) -> dict[str, torch.Tensor]:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    mask = fmt.pattern.keep(weight.abs(), "row")
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


@pytest.mark.parametrize(("name", "pattern"), [("nm", "2:4"), ("bitmask", "0.5")])
def test_missing_misshapen_or_mistyped_parts(name: str, pattern: str) -> None:
    fmt = make_format(name, pattern)
    for part in fmt.parts:
        parts = good(fmt)
        del parts[part]
        refuse(fmt, parts, "missing|dtype None")
        parts = good(fmt)
        parts[part] = parts[part][:-1].to(torch.int16)
        refuse(fmt, parts, r"w\.|dtype")


def test_integer_values_are_refused() -> None:
    fmt = make_format("nm", "2:4")
    refuse(fmt, good(fmt) | {"values": torch.zeros(4, 8, dtype=torch.int8)}, "floating point")
