"""Panels hold exactly the weight they were made of, and are made of nothing that is damaged.

Damaged panels themselves: sanitize.cpp, under sanitizers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from alike import NEEDS_KERNELS
from cpu_cases import MASKS, Case, case, from_codes, from_values, keep_mask, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gblm.kernels import native
from gblm.sparse.weights import same_bits

pytestmark = NEEDS_KERNELS
VALUES = ("float", "int8", "int4")
Change = Callable[[native.Source], dict[str, object]]


@st.composite
def weights(draw: st.DrawFn) -> Case:
    """Any shape, mask and value that a checkpoint may hold."""
    values, mask = draw(st.sampled_from(VALUES)), draw(st.sampled_from(sorted(MASKS)))
    unit = 8 if values == "float" else draw(st.sampled_from([32, 64, 96, 256, 288]))
    unit = 16 if mask == "8:16" and unit == 8 else unit
    shape = (draw(st.integers(1, 50)), unit * draw(st.integers(1, 9 if unit <= 16 else 2)))
    density, seed = draw(st.sampled_from([0, 0.05, 0.5, 0.95, 1])), draw(st.integers(0, 2**31))
    keep, random = keep_mask(shape, mask, density, seed), seeded(seed)
    if values == "float":
        bits = torch.randint(-(2**15), 2**15, shape, generator=random).to(torch.int16)
        weight = bits.view(torch.bfloat16)
        return from_values(torch.where(weight.isfinite(), weight, -0.0).bfloat16(), keep, mask)
    limit = 127 if values == "int8" else 7
    codes = torch.randint(-limit - 1, limit + 1, shape, generator=random).to(torch.int8)
    bits = torch.randint(0, 0x7F80, (shape[0], shape[1] // unit), generator=random)
    return from_codes(codes, bits.to(torch.int16).view(torch.bfloat16), keep, values, mask)


@settings(max_examples=300, deadline=None)
@given(weights())
def test_unpack_is_the_exact_inverse_of_prepare(weight: Case) -> None:
    stored, mask, scales = native.unpack(weight.panels)
    assert torch.equal(mask, weight.mask)
    if weight.scales is None:
        assert scales is None
        assert same_bits(stored, weight.stored)
    else:
        assert torch.equal(stored, weight.stored)
        assert scales is not None
        # Long groups are cut, and the pieces share their scale.
        assert scales.shape[1] == weight.dense.shape[1] // weight.group
        pieces = scales.shape[1] // weight.scales.shape[1]
        assert same_bits(scales, weight.scales.repeat_interleave(pieces, 1))


def test_panels_of_equal_weights_are_equal_byte_for_byte(threads: None) -> None:
    many = torch.get_num_threads()
    for values in VALUES:
        weight = case((37, 96), values, "any")
        torch.set_num_threads(many)
        panels = weight.panels
        torch.set_num_threads(1)
        assert torch.equal(weight.panels, panels)


def poke(name: str, index: int, value: float) -> Change:
    """Overwrite one element of one tensor of a source."""

    def change(source: native.Source) -> dict[str, object]:
        tensor = getattr(source, name).clone()
        tensor.view(-1)[index] = value
        return {name: tensor}

    return change


def add(name: str, index: int, value: int) -> Change:
    def change(source: native.Source) -> dict[str, object]:
        tensor = getattr(source, name).clone()
        tensor.view(-1)[index] += value
        return {name: tensor}

    return change


def halves(first: int, second: int) -> Change:
    """Overwrite the masks of the first sixteen columns."""

    def change(source: native.Source) -> dict[str, object]:
        assert source.bitmask is not None
        bitmask = source.bitmask.clone()
        bitmask[0, :2] = torch.tensor([first, second])
        return {"bitmask": bitmask}

    return change


BAD_SOURCES: dict[str, tuple[str, str, Change]] = {
    "NaN": ("float", "any", poke("data", 3, float("nan"))),
    "infinity": ("float", "dense", poke("data", -1, float("inf"))),
    "minus infinity": ("float", "2:4", poke("data", 0, float("-inf"))),
    "NaN scale": ("int8", "any", poke("scales", 2, float("nan"))),
    "infinite scale": ("int4", "any", poke("scales", 2, float("inf"))),
    "negative scale": ("int8", "dense", poke("scales", 2, -1.0)),
    "minus zero scale": ("int8", "dense", poke("scales", 2, -0.0)),
    "start moved": ("float", "any", add("starts", 4, 2)),
    "end moved": ("int8", "any", add("starts", -1, 1)),
    "start negative": ("int4", "any", poke("starts", 0, -1)),
    "start smallest": ("float", "any", poke("starts", 4, -(2**63))),
    "start largest": ("float", "any", poke("starts", 4, 2**63 - 1)),
    "bit added": ("float", "any", poke("bitmask", 12, 255)),
    "bits dropped": ("int8", "any", poke("bitmask", 30, 0)),
    "not 4 of 8": ("float", "2:4", poke("bitmask", 1, 0b00110111)),
    "not 8 of 16": ("int8", "8:16", poke("bitmask", 0, 0)),
    "2 in a half of 16": ("float", "8:16", halves(0b00000011, 0b00111111)),
    "6 in a half of 16": ("int4", "8:16", halves(0b11111100, 0b00000011)),
    "values missing": ("float", "any", lambda s: {"data": s.data[:-1]}),
    "no values": ("float", "dense", lambda s: {"data": s.data[:0]}),
    "dense values, claimed sparse": ("float", "dense", lambda _: {"mask": native.ANY}),
    "sparse values, claimed dense": ("int8", "any", lambda _: {"mask": native.DENSE}),
    "unknown mask": ("float", "any", lambda _: {"mask": 4}),
    "starts too few": ("float", "any", lambda s: {"starts": s.starts[:-1]}),
    "starts of 32 bits": ("float", "any", lambda s: {"starts": s.starts.int()}),
    "bitmask too short": ("float", "any", lambda s: {"bitmask": s.bitmask[:-1]}),
    "bitmask of int32": ("float", "any", lambda s: {"bitmask": s.bitmask.int()}),
    "float16 values": ("float", "any", lambda s: {"data": s.data.half()}),
    "float32 values": ("float", "any", lambda s: {"data": s.data.float()}),
    "values on another device": ("float", "any", lambda s: {"data": s.data.to("meta")}),
    "scales without codes": ("float", "any", lambda s: {"scales": torch.ones(37, 3).bfloat16()}),
    "codes without scales": ("int8", "any", lambda _: {"scales": None}),
    "float32 scales": ("int8", "any", lambda s: {"scales": s.scales.float()}),
    "scales of fewer rows": ("int8", "any", lambda s: {"scales": s.scales[:-1]}),
    "no scales": ("int8", "any", lambda s: {"scales": s.scales[:, :0]}),
    "groups of 48": ("int8", "any", lambda s: {"scales": s.scales[:, :2]}),
    "more scales than columns": ("int8", "any", lambda s: {"scales": s.scales.repeat(1, 64)}),
    "scalar scales": ("int8", "any", lambda s: {"scales": s.scales[0, 0]}),
    "scales of one dimension": ("int8", "any", lambda s: {"scales": s.scales[:, 0]}),
    "more rows": ("float", "any", lambda s: {"shape": (38, 96)}),
    "no rows": ("float", "any", lambda _: {"shape": (0, 96)}),
    "columns of no byte": ("float", "any", lambda _: {"shape": (37, 97)}),
    "huge shape": ("float", "dense", lambda _: {"shape": (37, 2**40)}),
}


@pytest.mark.parametrize("damage", BAD_SOURCES)
def test_prepare_refuses_a_damaged_source_and_names_the_weight(damage: str) -> None:
    values, mask, change = BAD_SOURCES[damage]
    source = case((37, 96), values, mask).source
    with pytest.raises(native.KernelError, match=r"^layers\.0\.q: "):
        native.prepare(replace(source, **change(source)), "layers.0.q")


def test_scales_that_only_nearly_divide_the_columns_are_refused() -> None:
    # 32768 // 1000 is 32, which divides the columns, but there are not 1024 scales.
    source = case((2, 32768), "int8", "dense").source
    assert source.scales is not None
    with pytest.raises(native.KernelError, match="1000 scales a row do not divide"):
        native.prepare(replace(source, scales=source.scales[:, :1000].contiguous()))


@pytest.mark.parametrize(
    "panels", [torch.zeros(0, dtype=torch.uint8), torch.zeros(5000, dtype=torch.uint8)]
)
def test_what_are_no_panels_is_refused(panels: Tensor) -> None:
    with pytest.raises(native.KernelError, match="panels"):
        native.unpack(panels)


def test_the_operator_refuses_arguments_that_do_not_fit() -> None:
    weight = case((20, 64), "float", "any")
    panels, x = weight.panels, torch.ones(3, 64, dtype=torch.bfloat16)
    op = torch.ops.gblm.cpu_linear
    for arguments, message in [
        ((x.float(), panels, 20), "contiguous bfloat16"),
        ((torch.ones(64, 3).bfloat16().t(), panels, 20), "contiguous bfloat16"),
        ((x[:, :32].contiguous(), panels, 20), "number of features"),
        ((x[0, 0], panels, 20), "1 to 16 dimensions"),
        ((x.reshape(3, *[1] * 16, 64), panels, 20), "1 to 16 dimensions"),
        ((x, panels, 21), "out_features"),
        ((x, panels, -1), "out_features"),
        ((x, panels.view(torch.int8), 20), "contiguous uint8"),
        ((x, panels.repeat_interleave(2)[::2], 20), "contiguous uint8"),
        ((x, panels[:-64], 20), "damaged"),
        ((x, torch.zeros(0, dtype=torch.uint8), 20), "damaged"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_large_panels_lie_in_fresh_memory_where_huge_pages_begin() -> None:
    size = native.HUGE_PAGE + 100
    for _ in range(2):  # the second time malloc keeps what lies below memory in use
        used = [torch.full((3 * size,), 1, dtype=torch.uint8) for _ in range(4)]
        del used[:3]
    memory = native.allocate(size)
    assert memory.shape == (size,)
    assert memory.data_ptr() % native.HUGE_PAGE == 0
    assert not memory.any()
    assert native.allocate(100).data_ptr() % 64 == 0
