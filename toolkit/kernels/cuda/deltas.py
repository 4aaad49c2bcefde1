"""Weights of any mask as kept values and the distances between them, for cuda/delta.cu."""

from __future__ import annotations

import torch
from torch import Tensor

RUNS, WORD, LONGEST = 32, 8, 16
# Columns are stored, plus one, in 16 bits.
MAX_COLUMNS = (1 << 16) - 1


def padded_columns(columns: int) -> int:
    """Columns of x in shared memory: what fills the last runs walks on behind the weight's."""
    return -(-(columns + columns // RUNS + WORD) // 8) * 8


def pack_deltas(weight: Tensor, mask: Tensor) -> list[Tensor]:
    """Dense weight and its mask → values, gaps, starts and words.

    Args:
        weight: [out, in] of a 16-bit dtype.
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
    """Row, column and value of every entry, with zeros where the way to the next is too long."""
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
    """Unsigned numbers of so many bits, in the signed dtype of the same bits."""
    wide = numbers.to(torch.int64)
    dtype = torch.int32 if bits == 32 else torch.int16
    return torch.where(wide >= 1 << (bits - 1), wide - (1 << bits), wide).to(dtype)
