"""Rounding whose error the columns to the right make up for, alone and along with pruning."""

from __future__ import annotations

import pytest
import torch
from correlated import output_error, problem
from pairs import pairwise

from gblm.errors import InputError, PatternError
from gblm.methods.obs import prepare_obs, round_obs
from gblm.methods.sparsegpt import SparseGPT
from gblm.sparse.patterns import NM, parse
from gblm.sparse.values import ROW, SHRINK, ValueType, quantize
from gblm.sparse.weights import SparseWeight, dequantize

DAMPING = 0.01


def best_scales(group: torch.Tensor, cost: torch.Tensor, limit: int) -> torch.Tensor:
    """Oracle: scales [rows, 1] float64, of [rows, size] with zeros."""
    widest = group.abs().amax(dim=1, keepdim=True)
    scales = torch.stack([(widest / limit * f).bfloat16().double() for f in SHRINK])
    rounded = (group / scales).clamp(-limit - 1, limit).round() * scales
    best = ((group - rounded) ** 2 * cost).sum(dim=2).argmin(dim=0)
    return scales[best, torch.arange(len(group))]


def textbook(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    values: ValueType,
    mask: torch.Tensor,
    pattern: NM | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Oracle: column by column in float64, without blocks; codes, scales and mask.

    A pattern chooses the mask of its groups on the way, and of a whole group of scales to fit it.
    """
    damped = hessian.double() + DAMPING * hessian.diagonal().double().mean() * torch.eye(
        len(hessian)
    )
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    weight, mask, pivots = weight.double().clone(), mask.clone(), upper.diagonal() ** 2
    codes, scales, size = torch.zeros_like(weight), [], values.group(weight.shape[1])
    for j in range(weight.shape[1]):
        if pattern is not None:
            for width in sorted({size, pattern.group_m}, reverse=True):
                if j % width == 0 and width >= pattern.group_m:
                    span = slice(j, j + width)
                    mask[:, span] = pattern.keep(weight[:, span] ** 2 / pivots[span], "row")
        if j % size == 0:
            span = slice(j, j + size)
            kept = weight[:, span] * mask[:, span]
            scales.append(best_scales(kept, 1 / pivots[span], values.limit))
        scale = scales[-1][:, 0]
        code = (weight[:, j] / scale).clamp(values.least, values.limit).round() * mask[:, j]
        error = (weight[:, j] - code * scale) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
        codes[:, j] = code
    return codes, torch.cat(scales, dim=1), mask


def check(found: SparseWeight, values: ValueType) -> None:
    """What every rounded weight promises."""
    rows, columns = found.mask.shape
    assert found.codes.dtype == torch.int8
    assert found.scales.dtype == torch.bfloat16
    assert found.scales.shape == (rows, columns // values.group(columns))
    assert bool((found.scales.isfinite() & (found.scales > 0)).all())
    assert not found.codes.float()[~found.mask].any()
    assert values.least <= int(found.codes.min()) <= int(found.codes.max()) <= values.limit
    assert torch.equal(found.weight, dequantize(found.codes, found.scales, found.weight.dtype))
    assert all(t.is_contiguous() for t in (found.weight, found.mask, found.codes, found.scales))


def assert_close_to(
    found: SparseWeight, codes: torch.Tensor, scales: torch.Tensor, mask: torch.Tensor
) -> None:
    """Equal but for a row or two, where float32 may have met a tie; what follows it differs."""
    pairs = [(found.codes.double(), codes), (found.scales.double(), scales), (found.mask, mask)]
    same = torch.stack([(ours == theirs).all(dim=1) for ours, theirs in pairs]).all(dim=0)
    assert int((~same).sum()) <= 2


def tiny(first: float, second: float, keep_first: bool) -> list[int]:
    """Codes of a row: the first two inputs correlate, the costly third one makes the scale 1."""
    hessian = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 99.0]])
    stats = prepare_obs({"hessian": hessian}, 1e-6)
    weight, mask = torch.tensor([[first, second, 7.0]]), torch.tensor([[keep_first, True, True]])
    found = round_obs(weight, mask, ValueType("int4", ROW), stats)
    assert found.scales.tolist() == [[1.0]]
    return found.codes[0].tolist()


def test_a_case_worked_by_hand() -> None:
    # An error e of the first moves the second by e · 0.5: 2.4 + 0.4 · 0.5 = 2.6.
    assert tiny(0.4, 2.4, True) == [0, 3, 7]
    assert tiny(-0.4, 2.6, True) == [0, 2, 7]
    # 2.2 + 1.0 · 0.5 = 2.7; kept, the first has no error.
    assert tiny(1.0, 2.2, False) == [0, 3, 7]
    assert tiny(1.0, 2.2, True) == [1, 2, 7]


@pytest.mark.parametrize(
    ("kind", "size"), [("int4", 32), ("int8", 64), ("int4", 96), ("int8", 192), ("int4", ROW)]
)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_fixed_mask_equals_the_textbook(kind: str, size: int, density: float) -> None:
    weight, hessian = problem(12, 192)
    values = ValueType(kind, size)
    mask = torch.rand(12, 192, generator=torch.Generator().manual_seed(1)) < density
    found = round_obs(weight, mask, values, prepare_obs({"hessian": hessian}, DAMPING))
    check(found, values)
    assert torch.equal(found.mask, mask)
    assert_close_to(found, *textbook(weight, hessian, values, mask))


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("2:4", 32), ("2:4", 256), ("4:8", 64), ("8:16", 32), ("8:16", 256), ("32:64", 32)],
)
def test_joint_pruning_equals_the_textbook(pattern: str, size: int) -> None:
    weight, hessian = problem(12, 256)
    values, rule, method = ValueType("int4", size), parse(pattern), SparseGPT()
    found = method.prune_quantized(weight, method.prepare({"hessian": hessian}), rule, values)
    every = torch.ones(12, 256, dtype=torch.bool)
    check(found, values)
    rule.check_mask("w", found.mask)
    assert_close_to(found, *textbook(weight, hessian, values, every, rule))


@pytest.mark.parametrize("pattern", ["0.5", "0.33"])
@pytest.mark.parametrize("size", [32, 128])
def test_blocks_are_chosen_before_their_scales_are_fitted(pattern: str, size: int) -> None:
    weight, hessian = problem(16, 384)
    values, method = ValueType("int4", size), SparseGPT()
    stats = method.prepare({"hessian": hessian})
    found = method.prune_quantized(weight, stats, parse(pattern), values)
    again = round_obs(weight, found.mask, values, stats)
    assert torch.equal(found.codes, again.codes)
    assert torch.equal(found.scales, again.scales)
    first = method.prune(weight, stats, parse(pattern)).mask[:, :128]
    assert torch.equal(found.mask[:, :128], first)


@pytest.mark.parametrize(
    ("pattern", "size", "block_size"),
    pairwise(["0.5", "2:4", "2:5", "12:24", "48:64"], [32, 128, ROW], [1, 100, 1000]),
)
def test_no_range_cuts_a_group(pattern: str, size: int, block_size: int) -> None:
    weight, hessian = problem(8, 768 if pattern == "12:24" else 640)
    rule, values = parse(pattern), ValueType("int4", size)
    method = SparseGPT(block_size=block_size)
    stats = method.prepare({"hessian": hessian})
    found = method.prune_quantized(weight, stats, rule, values)
    check(found, values)
    rule.check_mask("w", found.mask)
    assert int(found.mask.sum()) == int(method.prune(weight, stats, rule).mask.sum())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("size", [32, 64, 128, ROW])
def test_gptq_has_a_lower_output_error_than_the_nearest_codes(kind: str, size: int) -> None:
    weight, hessian = problem(48, 256, strong=8)
    values, every = ValueType(kind, size), torch.ones(48, 256, dtype=torch.bool)
    ours = round_obs(weight, every, values, prepare_obs({"hessian": hessian}, DAMPING))
    for rounding in ("nearest", "mse"):
        other = quantize(weight, every, values, rounding=rounding)
        assert output_error(weight, ours, hessian) < 0.6 * output_error(weight, other, hessian)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("size", [32, 128, ROW])
def test_joint_pruning_beats_pruning_then_rounding(pattern: str, size: int) -> None:
    weight, hessian = problem(48, 256, strong=8)
    values, rule, method = ValueType("int4", size), parse(pattern), SparseGPT()
    stats = method.prepare({"hessian": hessian})
    pruned = method.prune(weight, stats, rule)
    joint = output_error(weight, method.prune_quantized(weight, stats, rule, values), hessian)
    for rounding in ("nearest", "mse"):
        other = quantize(pruned.weight, pruned.mask, values, rounding=rounding)
        assert joint < output_error(weight, other, hessian)
    # Not by much: the masks differ, too.
    assert joint > 0.98 * output_error(weight, pruned, hessian)


def test_dead_inputs_become_zeros_and_inputs_are_not_changed() -> None:
    weight, hessian = problem(1, 64)  # one row: its transpose is the same memory
    hessian[5], hessian[:, 5] = 0, 0
    weight[0, 5] = 100.0  # would make every other code 0
    stats = prepare_obs({"hessian": hessian}, DAMPING)
    every = torch.ones(1, 64, dtype=torch.bool)
    before = [t.clone() for t in (weight, every, *stats.values())]
    found = round_obs(weight, every, ValueType("int4", ROW), stats)
    assert int(found.codes[0, 5]) == 0
    assert int(found.codes.abs().max()) == 7
    assert all(
        torch.equal(a, b) for a, b in zip((weight, every, *stats.values()), before, strict=True)
    )
    nothing = round_obs(torch.zeros(1, 64), every, ValueType("int8", 32), stats)
    assert nothing.scales.tolist() == [[1.0, 1.0]]
    assert not nothing.codes.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    weight, hessian = problem(8, 64)
    stats, values = prepare_obs({"hessian": hessian}, DAMPING), ValueType("int4", 32)
    half, full = (
        SparseGPT().prune_quantized(w, stats, NM(2, 4), values)
        for w in (weight.to(dtype), weight.to(dtype).float())
    )
    assert half.weight.dtype == dtype
    assert torch.equal(half.codes, full.codes)
    assert torch.equal(half.weight, full.weight.to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("keep", [True, False])
def test_what_has_no_code_is_refused(bad: float, keep: bool) -> None:
    weight, hessian = problem(4, 64)
    stats, values = prepare_obs({"hessian": hessian}, DAMPING), ValueType("int4", 32)
    mask = torch.ones(4, 64, dtype=torch.bool)
    weight[2, 40], mask[2, 40] = bad, keep
    with pytest.raises(InputError, match=r"up_proj\.weight holds NaN or Inf.*int4"):
        round_obs(weight, mask, values, stats, "up_proj")
    for pattern in ("2:4", "0.5"):
        with pytest.raises(InputError, match=r"up_proj\.weight holds NaN or Inf.*int4"):
            SparseGPT().prune_quantized(weight, stats, parse(pattern), values, "up_proj")


def test_what_does_not_fit_is_refused() -> None:
    stats = prepare_obs({"hessian": torch.eye(32)}, DAMPING)
    every = torch.ones(1, 32, dtype=torch.bool)
    large = torch.full((1, 32), 65504.0).half()
    with pytest.raises(InputError, match=r"w\.weight: its largest values leave the range"):
        # 65504 / 127 is rounded up to a bfloat16 scale; a smaller one costs more.
        round_obs(large, every, ValueType("int8", 32), stats, "w")
    with pytest.raises(PatternError, match="w: 32 columns do not divide"):
        round_obs(large, every, ValueType("int8", 64), stats, "w")
    with pytest.raises(PatternError, match="w: 32 columns do not divide"):
        SparseGPT().prune_quantized(large, stats, NM(2, 4), ValueType("int8", 64), "w")
