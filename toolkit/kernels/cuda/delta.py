"""delta: weights of any mask as kept values and the distances between them, for few tokens.

The work is per kept weight, not per column; the head of delta.cu defines the layout. Codes are
multiplied by their scales when the model is loaded, and rounded once to the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gblm.kernels.cuda.device import THREADS, CudaBackend, Device
from gblm.kernels.cuda.nvrtc import Variant
from gblm.kernels.few_tokens import aligned
from gblm.sparse.formats import Format, Parts, Shape

RUNS, WORD, LONGEST = 32, 8, 16
# Columns are stored, plus one, in 16 bits.
MAX_COLUMNS = (1 << 16) - 1
MAX_TOKENS = 8
WARPS = THREADS // 32
MAX_BLOCKS_PER_SM = 8


class Delta(CudaBackend):
    """Holds 4-bit distances beside the kept values; more than 8 tokens meet the expanded weight."""

    name = "delta"
    max_tokens = MAX_TOKENS
    max_columns = MAX_COLUMNS

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """Make the four tensors of `pack_deltas`."""
        return pack_deltas(fmt.expand(parts, dtype), fmt.mask(parts))

    def expand(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """Write the dense weight on the device."""
        dense = x.new_zeros(shape)
        compiled = Variant("delta", (("BF16", int(x.dtype == torch.bfloat16)), ("TOKENS", 1)))
        grid = -(-shape[0] // WARPS)
        self._device_of(x).launch(compiled, "scatter", grid, [*prepared, dense, *shape])
        return dense

    def multiply(
        self, x: Tensor, out: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape
    ) -> None:
        """Multiply in one launch, or in several when rows are long and shared memory is short."""
        step = tokens_at_once(self._device_of(x), shape[1])
        for start in range(0, len(x), step):
            piece = slice(start, start + step)
            self._launch(x[piece], out[piece], prepared, shape)

    def _launch(self, x: Tensor, out: Tensor, prepared: Sequence[Tensor], shape: Shape) -> None:
        device, tokens, padded = self._device_of(x), len(x), padded_columns(shape[1])
        blocks = 1 << (tokens - 1).bit_length()
        defines = (("BF16", int(x.dtype == torch.bfloat16)), ("TOKENS", blocks))
        shared = 2 * padded * blocks
        resident = max(1, min(MAX_BLOCKS_PER_SM, device.max_shared // shared))
        grid = min(-(-shape[0] // WARPS), device.num_sms * resident)
        arguments: list[Tensor | int] = [*prepared, aligned(x), out, tokens, *shape, padded]
        device.launch(Variant("delta", defines), "delta", grid, arguments, shared)


def tokens_at_once(device: Device, columns: int) -> int:
    """Count the tokens whose activations fit into shared memory: 1, 2, 4 or 8."""
    fits = max(1, device.max_shared // (2 * padded_columns(columns)))
    return min(MAX_TOKENS, 1 << (fits.bit_length() - 1))


def padded_columns(columns: int) -> int:
    """Count the columns of x in shared memory: the zeros of last runs walk on behind the weight."""
    return -(-(columns + columns // RUNS + WORD) // 8) * 8


def pack_deltas(weight: Tensor, mask: Tensor) -> list[Tensor]:
    """Turn a dense weight and its mask into values, gaps, starts and words.

    Args:
        weight: [out, in], of a 16-bit dtype.
        mask: [out, in] bool, True = kept.

    Returns:
        values [words · 32, 8], gaps [words · 32] int32, starts [out · 32] int16 (unsigned in the
        kernel), and words [out + 1] int32. A row has at least one word.
    """
    rows, columns, values = _filled(weight, mask)
    counts = torch.bincount(rows, minlength=len(mask))
    words = ((counts + RUNS * WORD - 1) // (RUNS * WORD)).clamp_min(1)
    first_word = torch.nn.functional.pad(words.cumsum(0), (1, 0))
    # Of each entry: its number in the row, its lane, its number in the lane's run.
    number = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    length = WORD * words[rows]
    lane, within = number // length, number % length
    before = columns.roll(1)
    before[number == 0] = -1
    slot = (first_word[rows] + within // WORD) * RUNS + lane
    size = int(first_word[-1]) * RUNS
    stored = torch.zeros(size, WORD, dtype=weight.dtype, device=weight.device)
    stored[slot, within % WORD] = values
    gaps = torch.zeros(size, dtype=torch.int64, device=weight.device)
    gaps.scatter_add_(0, slot, (columns - before - 1) << 4 * (within % WORD))
    starts = torch.zeros(len(mask) * RUNS, dtype=torch.int32, device=weight.device)
    begins = within == 0
    starts[rows[begins] * RUNS + lane[begins]] = (before[begins] + 1).to(torch.int32)
    return [stored, _wrapped(gaps, 32), _wrapped(starts, 16), first_word.to(torch.int32)]


def _filled(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the row, column and value of every entry, zeros that fill long distances among them."""
    rows, columns = mask.nonzero().unbind(1)
    before = columns.roll(1)
    if len(rows):
        before[0] = -1
        before[1:][rows[1:] != rows[:-1]] = -1
    steps = (columns - before - 1) // LONGEST + 1
    source = torch.repeat_interleave(steps)
    step = torch.arange(len(source), device=mask.device) - (steps.cumsum(0) - steps)[source]
    last = step == steps[source] - 1
    place = torch.where(last, columns[source], before[source] + LONGEST * (step + 1))
    kept = weight[rows, columns][source]
    return rows[source], place, torch.where(last, kept, torch.zeros_like(kept))


def _wrapped(numbers: Tensor, bits: int) -> Tensor:
    """Store unsigned numbers of so many bits in the signed dtype with the same bits."""
    wide = numbers.to(torch.int64)
    dtype = torch.int32 if bits == 32 else torch.int16
    return torch.where(wide >= 1 << (bits - 1), wide - (1 << bits), wide).to(dtype)
