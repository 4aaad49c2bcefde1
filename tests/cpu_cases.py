"""Weights for the CPU kernels as they lie on disk, and the float64 oracle with its error bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gblm.kernels import native

MASKS = {
    "dense": native.DENSE,
    "any": native.ANY,
    "2:4": native.FOUR_OF_EIGHT,
    "4:8": native.FOUR_OF_EIGHT,
    "8:16": native.EIGHT_OF_SIXTEEN,
}
LIMITS = {"int8": 127, "int4": 7}
# A rounding to float32 or bfloat16 is off by at most this part of the result.
FLOAT_UNIT, BF16_UNIT = 2.0**-24, 2.0**-8
# Instructions may take anything smaller for zero.
SUBNORMAL = 2.0**-126
# The kernels take a group of activations below it for zeros.
LEAST = 2.0**-120


@dataclass(frozen=True)
class Case:
    """A weight on disk and what it means: values or codes that are stored, and dense in float64."""

    source: native.Source
    stored: Tensor
    mask: Tensor
    scales: Tensor | None
    dense: Tensor

    @property
    def group(self) -> int:
        """Columns that share a scale in the panels: the longest of these that divide a group."""
        if self.scales is None:
            return 0
        group = self.stored.shape[1] // self.scales.shape[1]
        return next(size for size in range(256, 0, -32) if group % size == 0)

    @property
    def panels(self) -> Tensor:
        return native.prepare(self.source)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keep_mask(shape: tuple[int, int], mask: str, density: float = 0.5, seed: int = 0) -> Tensor:
    """[out, in] bool. Of any mask, row 1 is empty and row 2 is full."""
    if mask == "dense":
        return torch.ones(shape, dtype=torch.bool)
    if mask in ("2:4", "4:8", "8:16"):
        return keep_half(shape, int(mask.rsplit(":")[1]), seed)
    keep = torch.rand(shape, generator=seeded(seed)) < density
    keep[1:2], keep[2:3] = False, True
    return keep


def keep_half(shape: tuple[int, int], group: int, seed: int = 0) -> Tensor:
    """Half of every group; of 16 three to five in each half."""
    rows, columns = shape
    if group < 16:
        order = torch.rand(rows, columns // group, group, generator=seeded(seed)).argsort(-1)
        return (order < group // 2).reshape(shape)
    order = torch.rand(rows, columns // 16, 2, 8, generator=seeded(seed)).argsort(-1)
    first = torch.randint(3, 6, (rows, columns // 16), generator=seeded(seed))
    return (order < torch.stack([first, 8 - first], -1)[..., None]).reshape(shape)


def case(
    shape: tuple[int, int], values: str, mask: str, group: int = 32, density: float = 0.5,
    seed: int = 0,
) -> Case:  # fmt: skip
    """A random weight."""
    keep = keep_mask(shape, mask, density, seed)
    if values == "float":
        return from_values(torch.randn(shape, generator=seeded(seed)).bfloat16(), keep, mask)
    limit = LIMITS[values]
    codes = torch.randint(-limit - 1, limit + 1, shape, generator=seeded(seed)).to(torch.int8)
    scales = torch.rand(shape[0], shape[1] // group, generator=seeded(seed)) + 0.01
    return from_codes(codes, scales.bfloat16(), keep, values, mask)


def from_values(weight: Tensor, keep: Tensor, mask: str) -> Case:
    """bfloat16 [out, in]; what `keep` drops is not stored."""
    stored = torch.where(keep, weight, torch.zeros((), dtype=torch.bfloat16))
    starts = functional.pad(2 * keep.sum(1).cumsum(0), (1, 0))
    return _case(stored, keep, None, "float", mask, stored[keep], starts, stored.double())


def from_codes(codes: Tensor, scales: Tensor, keep: Tensor, values: str, mask: str) -> Case:
    """int8 [out, in], bfloat16 [out, in/group]."""
    stored = codes * keep
    counts = keep.sum(1)
    data = stored[keep]
    if values == "int4":
        data = torch.cat([_nibbles(row[kept]) for row, kept in zip(stored, keep, strict=True)])
        counts = (counts + 1) // 2
    starts = functional.pad(counts.cumsum(0), (1, 0))
    group = codes.shape[1] // scales.shape[1]
    dense = stored.double() * scales.double().repeat_interleave(group, 1)
    return _case(stored, keep, scales, values, mask, data, starts, dense)


def _case(
    stored: Tensor, keep: Tensor, scales: Tensor | None, values: str, mask: str, data: Tensor,
    starts: Tensor, dense: Tensor,
) -> Case:  # fmt: skip
    bits = keep.reshape(keep.shape[0], -1, 8).long() << torch.arange(8)
    bitmask = None if mask == "dense" else bits.sum(-1).to(torch.uint8)
    shape = (stored.shape[0], stored.shape[1])
    source = native.Source(shape, values, MASKS[mask], data, starts, bitmask, scales)
    return Case(source, stored, keep, scales, dense)


def _nibbles(codes: Tensor) -> Tensor:
    pairs = functional.pad(codes, (0, codes.numel() % 2)).reshape(-1, 2).to(torch.int16) & 15
    return (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8)


def product(x: Tensor, weight: Case) -> tuple[Tensor, Tensor]:
    """x @ W.T in float64, [tokens, out], and how far bfloat16 results may be from it.

    A sum of K products in float32, in any order, is off by K roundings of the sum of sizes; the
    result is rounded to bfloat16; subnormal numbers may be zeros. Of integers, activations are
    rounded first, and only the sum over groups is rounded.
    """
    x, dense = x.double(), weight.dense
    slack = SUBNORMAL * (x.abs().sum(-1)[:, None] + dense.abs().sum(-1) + dense.shape[1])
    terms = dense.shape[1]
    if weight.group:
        x, doubt = round_activations(x, weight.group)
        slack = slack + doubt @ dense.abs().t()
        terms = dense.shape[1] // weight.group
    want, size = x @ dense.t(), x.abs() @ dense.abs().t()
    error = (terms + 8) * FLOAT_UNIT * size * (1 + 2**-8) + slack
    return want, error + BF16_UNIT * (want.abs() + error) + SUBNORMAL


def round_activations(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Activations as multiples of 1/127 of their group's largest, halves to even.

    Returns:
        What they are rounded to, and by how much they may differ: float32 cannot tell which side
        of a half a quotient is on when it is closer than its own rounding.
    """
    groups = x.reshape(x.shape[0], x.shape[1] // group, group)
    most = groups.abs().amax(-1, keepdim=True)
    quotients = torch.where(most > 0, groups * 127 / most, 0.0)
    near = ((quotients - quotients.floor() - 0.5).abs() < 127 * 4 * FLOAT_UNIT).double()
    doubt = torch.where(most < 2 * LEAST, groups.abs() + most / 127, near * most / 127)
    return (quotients.round() * most / 127).reshape(x.shape), doubt.reshape(x.shape)


def activations(tokens: int, columns: int, seed: int = 1) -> Tensor:
    """bfloat16 [tokens, columns] of very different sizes."""
    x = torch.randn(tokens, columns, generator=seeded(seed))
    return (x * torch.logspace(-2, 1, max(tokens, 1))[:tokens, None]).bfloat16()


def multiply(x: Tensor, weight: Case, panels: Tensor | None = None) -> Tensor:
    panels = weight.panels if panels is None else panels
    out: Tensor = torch.ops.gblm.cpu_linear(x, panels, weight.dense.shape[0])
    return out


def assert_within(got: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    want, bound = expected
    worst = ((got.double() - want).abs() / bound).max() if got.numel() else torch.zeros(())
    assert worst <= 1, f"{float(worst)} times the bound"
