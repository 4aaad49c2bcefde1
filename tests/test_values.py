"""Value types: their specs, and what rounding to codes promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm.errors import InputError, PatternError
from gblm.sparse import passes
from gblm.sparse.values import AUTO, FLOAT, ROW, ValueType, mse_scales, parse_values, quantize
from gblm.sparse.weights import SparseWeight, dequantize

INT8 = ValueType("int8", ROW)


@pytest.mark.parametrize(
    ("text", "values"),
    [("float", FLOAT), ("int8", ValueType("int8", AUTO)), ("int8:auto", ValueType("int8", AUTO)),
     ("int8:128", ValueType("int8", 128)), ("int4:row", ValueType("int4", ROW)),
     ("int3:96", ValueType("int3", 96))],
)  # fmt: skip
def test_specs_are_read_and_written(text: str, values: ValueType) -> None:
    assert parse_values(text) == values
    assert parse_values(str(values)) == values


@pytest.mark.parametrize(
    "text",
    ["", "int2", "int8:0", "int8:", "int8:7", "int8:12800", "float:128", "float:auto", "INT8",
     "int8:128/..", "int8 ", "bf16", "int4:-1", "uint8"],
)  # fmt: skip
def test_bad_specs_are_refused(text: str) -> None:
    with pytest.raises(PatternError, match=r"values .* are unknown|group"):
        parse_values(text)


@pytest.mark.parametrize("text", ["uint4", "uint4:64", "fp8:row"])
def test_values_of_earlier_releases_say_how_to_go_on(text: str) -> None:
    with pytest.raises(
        PatternError, match=r"prune again with --values int4, .*`gblm export dense`"
    ):
        parse_values(text)


@pytest.mark.parametrize(
    ("columns", "size"), [(384, 128), (576, 96), (64, 64), (160, 32), (11008, 128)]
)
def test_auto_takes_the_largest_group_that_divides_a_linear(columns: int, size: int) -> None:
    assert ValueType("int8").resolve("w", columns).group(columns) == size


def test_columns_without_whole_groups_are_refused_with_those_that_fit() -> None:
    with pytest.raises(PatternError, match=r"w: 72 columns .* of 32 .* Choose int4:row"):
        ValueType("int4").resolve("w", 72)
    with pytest.raises(PatternError, match=r"w: 192 columns .* of 128 .* do: 32, 64, 96, 192, row"):
        ValueType("int4", 128).resolve("w", 192)
    assert ValueType("int4", ROW).resolve("w", 72).group(72) == 72
    assert FLOAT.resolve("w", 72) is FLOAT


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["int8", "int4"]),
    size=st.sampled_from([32, 64, ROW]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    exponent=st.integers(-12, 4),
    seed=st.integers(0, 10_000),
)
def test_every_kept_weight_becomes_the_nearest_code_of_its_group(
    kind: str, size: int, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(3, 128, generator=generator) * 2.0**exponent).to(dtype)
    mask = torch.rand(3, 128, generator=generator) < 0.5
    values = ValueType(kind, size)
    found = quantize(weight, mask, values)
    assert found.codes.dtype == torch.int8
    assert found.scales.dtype == torch.bfloat16
    assert found.scales.shape == (3, 128 // values.group(128))
    assert int(found.codes.abs().max()) <= values.limit
    assert not found.codes[~mask].any()
    exact = dequantize(found.codes, found.scales, torch.float32)
    step = found.scales.float().repeat_interleave(values.group(128), dim=1)
    error = torch.where(mask, weight.float() - exact, 0).abs()
    assert bool((error <= 0.5001 * step).all())
    assert torch.equal(found.weight, exact.to(dtype))


def squared_error(
    weight: torch.Tensor, found: SparseWeight, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """[out, groups], of the kept weights."""
    exact = dequantize(found.codes, found.scales, torch.float32)
    error = torch.where(found.mask, weight - exact, 0).square()
    error = error if importance is None else error * importance
    return error.reshape(*found.scales.shape, -1).sum(dim=-1)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["int8", "int4"]),
    size=st.sampled_from([32, 64, ROW]),
    density=st.sampled_from([0.02, 0.5, 1.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_searched_scales_never_have_a_larger_squared_error(
    kind: str, size: int, density: float, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 128, generator=generator) ** 3
    mask = torch.rand(3, 128, generator=generator) < density
    importance = torch.rand(128, generator=generator) ** 4 if weighted else None
    values = ValueType(kind, size)
    found = quantize(weight, mask, values, rounding="mse", importance=importance)
    nearest = quantize(weight, mask, values)
    error = squared_error(weight, found, importance)
    assert bool((error <= 1.0001 * squared_error(weight, nearest, importance)).all())
    assert bool((found.scales <= nearest.scales).all())
    assert bool((found.scales > 0).all())
    assert values.least <= int(found.codes.min()) <= int(found.codes.max()) <= values.limit
    assert not found.codes.float()[~mask].any()


def test_searched_scales_have_a_smaller_squared_error() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    mask, values = torch.ones(64, 256, dtype=torch.bool), ValueType("int4", 128)
    found = quantize(weight, mask, values, rounding="mse")
    nearest = quantize(weight, mask, values)
    assert squared_error(weight, found).sum() < 0.95 * squared_error(weight, nearest).sum()


def test_the_search_weighs_columns_and_looks_at_kept_ones_only() -> None:
    weight = torch.full((1, 32), 0.5)
    weight[0, 3] = 10.0
    mask, values = torch.ones(1, 32, dtype=torch.bool), ValueType("int4", 32)
    mask[0, 3] = False
    assert quantize(weight, mask, values, rounding="mse").codes[0, :3].tolist() == [7, 7, 7]
    mask[0, 3] = True
    # 10 / 7 is the exact scale of the large weight; steps of 0.86 make something of the others.
    importance = torch.ones(32)
    importance[3] = 1e-3
    codes = quantize(weight, mask, values, rounding="mse", importance=importance).codes
    assert codes[0, :4].tolist() == [1, 1, 1, 7]
    assert quantize(weight, mask, values, rounding="mse").codes[0, :4].tolist() == [0, 0, 0, 7]


def test_the_search_may_be_cut_into_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = torch.randn(7, 4, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(4, 32, generator=torch.Generator().manual_seed(1))
    whole = mse_scales(groups, 7, importance)
    monkeypatch.setattr(passes, "BLOCK", 300)
    assert torch.equal(mse_scales(groups, 7, importance), whole)
    assert whole.shape == (7, 4)


def test_the_scale_is_rounded_before_the_codes_are_taken() -> None:
    weight = torch.tensor([[1.003, 0.5, -0.25, 0.0, 0.1, 0.2, 0.3, 0.4]])
    found = quantize(weight, weight != 0, INT8)
    scale = (weight.abs().max() / 127).bfloat16().float()
    assert found.codes.tolist() == [(weight / scale).round().int()[0].tolist()]


def test_groups_of_zeros_have_scale_one() -> None:
    weight = torch.zeros(2, 64)
    weight[0, 0] = 1.0
    weight[1, 40] = 1e-44
    found = quantize(weight, weight != 0, ValueType("int4", 32))
    assert found.scales.tolist()[0][1] == found.scales.tolist()[1][0] == 1
    assert found.scales.tolist()[1][1] == 1
    assert bool(found.mask[1, 40])
    assert found.codes[1].tolist() == [0] * 64
    assert found.zeros == 127


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_has_no_code_is_refused(bad: float, kind: str) -> None:
    weight, values = torch.ones(2, 8), ValueType(kind, ROW)
    weight[1, 3] = bad
    mask = torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(InputError, match=rf"up_proj\.weight holds NaN or Inf.*{kind}"):
        quantize(weight, mask, values, "up_proj")
    with pytest.raises(InputError, match=rf"up_proj\.weight holds NaN or Inf.*{kind}"):
        quantize(weight, mask, values, "up_proj", rounding="mse")
    mask[1, 3] = False
    assert bool(quantize(weight, mask, values).weight.isfinite().all())


def test_a_weight_that_rounds_out_of_its_dtype_is_refused() -> None:
    weight = torch.full((1, 8), 65504.0).half()
    with pytest.raises(InputError, match=r"w\.weight: its largest values leave the range"):
        quantize(weight, weight != 0, INT8, "w")


def test_negative_products_never_round_to_negative_zero() -> None:
    codes, scales = torch.full((1, 8), -1, dtype=torch.int8), torch.full((1, 1), 1e-9).bfloat16()
    half = dequantize(codes, scales, torch.float16)
    assert torch.equal(half.view(torch.int16), torch.zeros(1, 8, dtype=torch.int16))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes_and_scales_go_along_when_a_weight_is_cut_joined_or_cast(kind: str) -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight, weight.abs() > 0.5, ValueType(kind, 32))
    halves = [whole.narrow(0, 0, 1), whole.narrow(0, 1, 3)]
    joined = SparseWeight.cat(halves)
    for name in ("weight", "mask", "codes", "scales"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    right = whole.narrow(1, 64, 64)
    assert torch.equal(right.scales, whole.scales[:, 2:])
    assert torch.equal(dequantize(right.codes, right.scales, torch.float32), right.weight)
    with pytest.raises(ValueError, match="cut groups of 32"):
        whole.narrow(1, 16, 64)
    row = quantize(weight, weight != 0, ValueType(kind, ROW))
    rows = row.narrow(1, 8, 16)
    assert torch.equal(dequantize(rows.codes, rows.scales, torch.float32), rows.weight)
    assert torch.equal(rows.scales, row.scales)
    half = whole.to(torch.bfloat16)
    assert half.codes is whole.codes
    assert half.scales.dtype == torch.bfloat16
    assert torch.equal(half.weight, whole.weight.bfloat16())
