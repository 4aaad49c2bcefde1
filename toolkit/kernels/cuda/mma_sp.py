"""mma_sp: 2:4 weights that the sparse tensor core of NVIDIA GPUs reads compressed.

In memory a weight is tiles of 16 rows × 64 columns, the operand of the sparse tensor core; the
head of mma_sp.cu defines them. Making tiles permutes and pads, and rounds nothing. Fragments and
metadata follow NVIDIA's PTX ISA 8.5, 9.7.14.6 (mma.sp.m16n8k32, ordered metadata).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gblm.kernels.cuda.device import THREADS, CudaBackend
from gblm.kernels.cuda.nvrtc import Variant
from gblm.kernels.few_tokens import dtype_refusal
from gblm.sparse.formats import Format, Parts, Shape

ROWS, STEP = 16, 64
# Mask of four columns → places of its two kept ones, first | second << 2; others are no 2:4.
PLACES = {0b0011: 4, 0b0101: 8, 0b1001: 12, 0b0110: 9, 0b1010: 13, 0b1100: 14}
FIRST_TWO = PLACES[0b0011]
MAX_TOKENS = 64
# Above, activations are rearranged first: the loads of more fragments would fill the L1 cache.
MAX_DIRECT = 16
WARPS = THREADS // 32


class SparseTensorCore(CudaBackend):
    """Serves 2:4 weights on GPUs of compute capability 8.0 to 12.1; above 64 tokens, expanded."""

    name = "mma_sp"
    formats = ("nm",)
    max_tokens = MAX_TOKENS

    def refuses_weight(self, fmt: Format, shape: Shape, dtype: torch.dtype) -> str | None:
        """Refuse other patterns, and activations of other dtypes."""
        if str(fmt.pattern) != "2:4":
            return f"the pattern must be 2:4, not {fmt.pattern}"
        return dtype_refusal(dtype)

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """Make the values, metadata and scales of `pack_tiles`."""
        return pack_tiles(fmt, parts, shape)

    def expand(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """Write the dense weight on the device."""
        rows, columns = padded(fmt, shape)
        dense = x.new_empty(shape)
        grid = -(-(rows // ROWS) * (columns // STEP) // WARPS)
        arguments: list[Tensor | int] = [*prepared, dense, *shape]
        self._device_of(x).launch(variant(fmt, shape, x.dtype, 1), "expand", grid, arguments)
        return dense

    def multiply(
        self, x: Tensor, out: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape
    ) -> None:
        """Multiply in one launch; more than 16 tokens are rearranged by another one before."""
        device, tokens = self._device_of(x), len(x)
        compiled = variant(fmt, shape, x.dtype, tokens)
        rows, columns = padded(fmt, shape)
        if tokens > MAX_DIRECT:
            pieces = columns // STEP * 2 * token_blocks(tokens)
            fragments = x.new_empty(pieces * 32 * 8)
            grid = -(-pieces * 32 // THREADS)
            device.launch(compiled, "repack", grid, [x, fragments, tokens, shape[1]])
            x = fragments
        device.launch(compiled, "mma_sp", rows // ROWS, [*prepared, x, out, tokens, *shape])


def token_blocks(tokens: int) -> int:
    """Count the blocks of eight tokens: one of the compiled numbers, 1, 2, 4 or 8."""
    return 1 << (max(-(-tokens // 8), 1) - 1).bit_length()


def variant(fmt: Format, shape: Shape, dtype: torch.dtype, tokens: int) -> Variant:
    """Choose the variant that multiplies so many tokens by a weight [out, in]."""
    defines = {
        "BF16": int(dtype == torch.bfloat16),
        "TOKENS": token_blocks(tokens),
        "VALUES": fmt.values.bits,
        "GROUP": scale_group(fmt, shape),
        "TAIL": int(padded(fmt, shape)[1] != shape[1]),
        "REPACKED": int(tokens > MAX_DIRECT),
    }
    return Variant("mma_sp", tuple(defines.items()))


def scale_group(fmt: Format, shape: Shape) -> int:
    """Count the columns that share a scale; 0 for floats and for one scale a row."""
    group = 0 if fmt.values.is_float else fmt.values.group(shape[1])
    return 0 if group == shape[1] else group


def unit_columns(group: int) -> int:
    """Count the columns that a warp takes at a time: whole steps and whole groups."""
    return STEP if group == 0 else group if group % STEP == 0 else 2 * group


def padded(fmt: Format, shape: Shape) -> Shape:
    """Give the shape [out, in] in memory, which is whole tiles and whole units."""
    unit = unit_columns(scale_group(fmt, shape))
    return -(-shape[0] // ROWS) * ROWS, -(-shape[1] // unit) * unit


def pack_tiles(fmt: Format, parts: Parts, shape: Shape) -> list[Tensor]:
    """Turn parts of the format nm/2:4 into the kernels' values, metadata and scales.

    Args:
        fmt: the format nm/2:4 with any value type.
        parts: the stored tensors; floating values in the activations' dtype.
        shape: the weight's [out, in].

    Returns:
        uint8 values, int32 metadata [tiles, steps, 32], and scales [tiles, groups, 16]: bfloat16;
        one zero for floats.
    """
    kept, (rows, columns) = fmt.kept(parts), padded(fmt, shape)
    missing = (0, (columns - shape[1]) // 2, 0, rows - shape[0])
    values = _store(functional.pad(kept, missing), fmt)
    return [values, _metadata(parts["bitmask"], rows, columns), _scales(fmt, parts, shape)]


def _fragments(kept: Tensor) -> Tensor:
    """Permute [rows, columns/2] to [tiles, steps, half, lane, 8]: two elements a register a0..a3.

    Lane 4g + t of a half holds the groups t and t + 4 of the rows g and g + 8: a0 is row g, group
    t; a1 row g + 8, group t; a2 and a3 the same of group t + 4.
    """
    tiles, steps = kept.shape[0] // ROWS, kept.shape[1] * 2 // STEP
    # tile, row / 8, g, step, half, group / 4, t, element
    cut = kept.reshape(tiles, 2, 8, steps, 2, 2, 4, 2)
    return cut.permute(0, 3, 4, 2, 6, 5, 1, 7).reshape(tiles, steps, 2, 32, 8)


def _store(kept: Tensor, fmt: Format) -> Tensor:
    """Turn padded kept values [rows, columns/2] into bytes, in the order of mma_sp.cu."""
    fragments = _fragments(kept)
    if fmt.values.is_float:
        return fragments.contiguous().view(torch.uint8).reshape(-1)
    by_lane = fragments.permute(0, 1, 3, 2, 4).contiguous()
    if not fmt.values.in_nibbles:
        # Registers 2r and 2r + 1 alternate in the bytes of a word.
        words = by_lane.reshape(*by_lane.shape[:-1], 2, 2, 2).transpose(-1, -2)
        return words.contiguous().view(torch.uint8).reshape(-1)
    nibbles = by_lane + 8
    pairs = nibbles.to(torch.int32).reshape(*nibbles.shape[:-1], 4, 2)
    shifts = 4 * torch.arange(4, dtype=torch.int32, device=kept.device)
    low, high = (pairs << shifts.unsqueeze(-1)).sum(dim=-2, dtype=torch.int32).unbind(-1)
    return (low | high << 16).contiguous().view(torch.uint8).reshape(-1)


def _metadata(bitmask: Tensor, rows: int, columns: int) -> Tensor:
    """Turn a bitmask [out, in/8] uint8 into metadata, int32 [tiles, steps, 32]."""
    table = torch.full((16,), FIRST_TWO, dtype=torch.int32, device=bitmask.device)
    for mask, code in PLACES.items():
        table[mask] = code
    masks = torch.stack([bitmask & 15, bitmask >> 4], dim=-1).flatten(1)
    places = table[masks.long()]
    missing = (0, columns // 4 - places.shape[1], 0, rows - places.shape[0])
    whole: Tensor = functional.pad(places, missing, value=FIRST_TWO)
    # tile, row / 8, g, step, half, block of 16 columns, group
    cut = whole.reshape(rows // ROWS, 2, 8, columns // STEP, 2, 2, 4)
    shifts = 4 * torch.arange(4, dtype=torch.int32, device=bitmask.device)
    halves = (cut << shifts).sum(dim=-1, dtype=torch.int32)
    words = halves[:, 0] | halves[:, 1] << 16
    return words.permute(0, 2, 1, 3, 4).reshape(rows // ROWS, columns // STEP, 32).contiguous()


def _scales(fmt: Format, parts: Parts, shape: Shape) -> Tensor:
    if fmt.values.is_float:
        return torch.zeros(1, dtype=torch.bfloat16, device=parts["values"].device)
    rows, columns = padded(fmt, shape)
    group = scale_group(fmt, shape)
    groups = columns // group if group else 1
    missing = (0, groups - parts["scales"].shape[1], 0, rows - shape[0])
    stored: Tensor = functional.pad(parts["scales"], missing)
    by_group: Tensor = stored.reshape(rows // ROWS, ROWS, groups).transpose(1, 2)
    return by_group.contiguous()
