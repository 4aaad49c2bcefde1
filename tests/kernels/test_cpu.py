"""The CPU kernels multiply as float64 does, within a bound that is derived, on every CPU."""

from __future__ import annotations

from itertools import product as product_of

import pytest
import torch
from alike import NEEDS_KERNELS
from cpu_cases import (
    LEAST,
    SUBNORMAL,
    Case,
    activations,
    assert_within,
    case,
    from_codes,
    from_values,
    keep_mask,
    multiply,
    product,
)

from gblm.kernels import native

pytestmark = NEEDS_KERNELS
VALUES = ("float", "int8", "int4")
MASKS = ("dense", "any", "2:4", "4:8", "8:16")


def small(values: str, mask: str) -> Case:
    """37 rows leave a panel of 5; 72 columns leave a block of 8, 80 of 16."""
    return case((37, odd_columns(values, mask, 72)), values, mask)


def odd_columns(values: str, mask: str, columns: int) -> int:
    """As many as fill no whole block, where the values and the mask can have them."""
    unit = 32 if values != "float" else 16 if mask == "8:16" else 8
    return -(-columns // unit) * unit


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("values", VALUES)
def test_every_batch_of_1_to_70_tokens_is_within_the_bound(
    instructions: str, values: str, mask: str
) -> None:
    weight = small(values, mask)
    panels, x = weight.panels, activations(70, weight.dense.shape[1])
    want, bound = product(x, weight)
    for tokens in range(1, 71):
        assert_within(multiply(x[:tokens], weight, panels), (want[:tokens], bound[:tokens]))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("values", VALUES)
def test_long_rows_and_large_batches_are_within_the_bound(
    instructions: str, values: str, mask: str
) -> None:
    # More columns than fit into cache at once, more tokens than are taken at once.
    columns = 2304 if values != "float" else odd_columns(values, mask, 2312)
    weight = case((18, columns), values, mask, group=256)
    panels, x = weight.panels, activations(1100, weight.dense.shape[1])
    want, bound = product(x, weight)
    for tokens in (0, 1, 16, 17, 64, 65, 256, 513, 1100):
        assert_within(multiply(x[:tokens], weight, panels), (want[:tokens], bound[:tokens]))


@pytest.mark.parametrize("shape", [(5, 40), (150, 392)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.25])
@pytest.mark.parametrize("values", VALUES)
def test_many_tokens_and_few_weights_are_within_the_bound(
    instructions: str, values: str, density: float, shape: tuple[int, int]
) -> None:
    columns = shape[1] if values == "float" else shape[1] // 32 * 32
    weight = case((shape[0], columns), values, "any", density=density)
    panels = weight.panels
    for tokens in (70, 95, 96, 97, 112, 127, 161, 511, 512, 609):
        x = activations(tokens, columns)
        assert_within(multiply(x, weight, panels), product(x, weight))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("values", VALUES)
def test_any_shape_is_within_the_bound(instructions: str, values: str, mask: str) -> None:
    for shape in ((1, 32), (15, 64), (16, 32), (17, 224), (96, 160)):
        weight = case(shape, values, mask)
        for tokens in (1, 6, 40):
            x = activations(tokens, shape[1])
            assert_within(multiply(x, weight), product(x, weight))


@pytest.mark.parametrize("group", [32, 64, 96, 128, 192, 384, 768])
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_any_group_size_is_within_the_bound(instructions: str, values: str, group: int) -> None:
    for mask in MASKS:
        weight = case((20, 768), values, mask, group)
        for tokens in (1, 5, 20, 40):
            x = activations(tokens, 768)
            assert_within(multiply(x, weight), product(x, weight))


def adversarial_floats() -> Case:
    """Rows: zeros kept, −0, subnormals, the largest, cancelling pairs, one value, mixed sizes."""
    rows, columns = 24, 64
    weight = torch.zeros(rows, columns)
    keep = keep_mask((rows, columns), "any")
    keep[3:] = True
    weight[4] = -0.0
    weight[5] = torch.arange(columns) * 2.0**-133  # bfloat16 has subnormals down to 2**-133
    weight[6] = 3.38e38 / columns
    weight[7] = torch.tensor([1.0, -1.0]).repeat(columns // 2)
    weight[8, -1] = 1.0
    weight[9] = torch.logspace(-38, 30, columns)
    weight[10:] = torch.randn(rows - 10, columns, generator=torch.Generator().manual_seed(0))
    return from_values(weight.bfloat16(), keep, "any")


def adversarial_codes(values: str, limit: int) -> Case:
    """Rows: zeros kept, largest codes of one and of both signs; scales of zero, tiny and large."""
    shape = (24, 256)
    codes = torch.full(shape, limit, dtype=torch.int8)
    codes[::2] = -limit - 1
    codes[3] = 0
    codes[4, ::2] = limit
    keep = keep_mask(shape, "any")
    keep[3:] = True
    scales = torch.tensor([1.0, 0.0, 2.0**-133, 1e30, 1e-30, 2.0**-126, 1.0, 3.0])
    return from_codes(codes, scales.bfloat16().repeat(24, 1), keep, values, "any")


@pytest.mark.parametrize("tokens", [1, 4, 9, 33])
@pytest.mark.parametrize("values", VALUES)
def test_adversarial_weights_are_within_the_bound(
    instructions: str, values: str, tokens: int
) -> None:
    weight = adversarial_floats() if values == "float" else adversarial_codes(
        values, 127 if values == "int8" else 7
    )  # fmt: skip
    columns = weight.dense.shape[1]
    ones = torch.ones(tokens, columns, dtype=torch.bfloat16)
    for x in (ones, -ones, activations(tokens, columns).clamp(-1, 1)):
        assert_within(multiply(x, weight), product(x, weight))


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_the_sum_of_the_longest_group_of_least_codes_fits(instructions: str, values: str) -> None:
    codes = torch.full((16, 256), -128 if values == "int8" else -8, dtype=torch.int8)
    scales = torch.ones(16, 1, dtype=torch.bfloat16)
    weight = from_codes(codes, scales, torch.ones(codes.shape, dtype=torch.bool), values, "dense")
    for tokens in (1, 5, 40):
        x = torch.ones(tokens, 256, dtype=torch.bfloat16)
        assert multiply(x, weight).unique().tolist() == [256 * int(codes[0, 0])]


@pytest.mark.parametrize("size", [0.0, 2.0**-133, SUBNORMAL, LEAST / 2, LEAST, 2 * LEAST, 1e30])
@pytest.mark.parametrize("values", VALUES)
def test_tiny_and_huge_activations_are_within_the_bound(
    instructions: str, values: str, size: float
) -> None:
    weight = small(values, "any")
    for tokens in (1, 3, 18):
        x = (activations(tokens, weight.dense.shape[1]).clamp(-4, 4) / 4 * size).bfloat16()
        assert_within(multiply(x, weight), product(x, weight))


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_activations_are_rounded_half_to_even_one_scale_a_token_and_group(
    instructions: str, values: str
) -> None:
    codes = torch.eye(32, dtype=torch.int8)
    scales = torch.ones(32, 1, dtype=torch.bfloat16)
    weight = from_codes(codes, scales, codes != 0, values, "any")
    # The scale is 1, so every quotient is exact.
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5, 3.25])
    x[1, :2] = torch.tensor([-127.0, 60.5])
    got = multiply(x, weight)
    assert got[0, :6].tolist() == [127, 0, 2, 0, -2, 3]
    assert got[1, :2].tolist() == [-127, 60]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("values", VALUES)
def test_1_to_8_threads_give_identical_bits(
    instructions: str, threads: None, values: str, mask: str
) -> None:
    weight = case((330, 256), values, mask)
    panels = weight.panels
    for tokens in (1, 7, 40):
        x = activations(tokens, 256)
        torch.set_num_threads(1)
        alone = multiply(x, weight, panels)
        for count in range(2, 9):
            torch.set_num_threads(count)
            assert torch.equal(multiply(x, weight, panels), alone)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("values", VALUES)
def test_nan_and_infinite_activations_spoil_their_own_token_only(
    instructions: str, values: str, mask: str
) -> None:
    weight = small(values, mask)
    panels = weight.panels
    poisons = (float("nan"), float("inf"), float("-inf"))
    for tokens, poison in product_of((1, 3, 12, 16, 17, 40), poisons):
        x = activations(tokens, weight.dense.shape[1])
        clean = multiply(x, weight, panels)
        x[0, 5] = poison
        x[-1] = poison
        got = multiply(x, weight, panels)
        assert not bool(torch.isfinite(got[-1]).any())
        # Weights that are not there may be skipped: 0 · NaN is NaN or nothing.
        assert not bool(torch.isfinite(got[0][weight.mask[:, 5]]).any())
        assert torch.equal(got[1:-1], clean[1:-1])


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_a_poisoned_token_of_many_spoils_itself_only(instructions: str, density: float) -> None:
    weight = case((37, 72), "float", "any", density=density)
    x = activations(150, 72)
    clean = multiply(x, weight)
    x[77] = float("nan")
    got = multiply(x, weight)
    # Weights that are not there may be skipped: 0 · NaN is NaN or nothing.
    assert not bool(torch.isfinite(got[77][weight.mask.any(1)]).any())
    assert torch.equal(got[:77], clean[:77])
    assert torch.equal(got[78:], clean[78:])


@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (2, 0), (1, 1, 1, 4)], ids=str)
def test_leading_dimensions_are_kept(leading: tuple[int, ...]) -> None:
    weight = case((20, 64), "float", "any")
    x = activations(24, 64)[: torch.Size(leading).numel()].reshape(*leading, 64)
    got = multiply(x, weight)
    assert got.shape == (*leading, 20)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.reshape(-1, 20), multiply(x.reshape(-1, 64), weight))


@pytest.mark.parametrize("values", VALUES)
def test_activations_and_panels_may_lie_at_any_address(instructions: str, values: str) -> None:
    weight = small(values, "any")
    panels, columns = weight.panels, weight.dense.shape[1]
    moved = torch.zeros(panels.numel() + 1, dtype=torch.uint8)[1:]
    moved.copy_(panels)
    x = activations(6, columns)
    shifted = torch.zeros(6 * columns + 1, dtype=torch.bfloat16)[1:].copy_(x.flatten())
    for tokens in (1, 6):
        got = multiply(shifted[: tokens * columns].reshape(tokens, columns), weight, moved)
        assert torch.equal(got, multiply(x[:tokens], weight, panels))


@pytest.mark.parametrize("values", VALUES)
def test_multiplying_and_onednn_do_not_disturb_each_other(instructions: str, values: str) -> None:
    # oneDNN sets up tile registers of its own, of the same thread.
    weight = case((64, 256), values, "any")
    panels, x = weight.panels, activations(40, 256)
    other = torch.nn.functional.linear(x, x)
    for tokens in (3, 16, 40):
        ours = multiply(x[:tokens], weight, panels)
        assert torch.equal(torch.nn.functional.linear(x, x), other)
        assert torch.equal(multiply(x[:tokens], weight, panels), ours)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_instruction_sets_give_the_same_integers(instructions: str, values: str, mask: str) -> None:
    weight = small(values, mask)
    panels = weight.panels
    for tokens in (1, 2, 5, 16, 17, 40):
        x = activations(tokens, weight.dense.shape[1])
        native.use_instruction_set("portable")
        want = multiply(x, weight, panels)
        native.use_instruction_set(instructions)
        assert torch.equal(multiply(x, weight, panels), want)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(native.KernelError, match="'z80' is not available"):
        native.use_instruction_set("z80")
