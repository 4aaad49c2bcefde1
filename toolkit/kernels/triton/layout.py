"""What the Triton kernels read: the parts of a format as they are, and where values begin.

Everything is a view of a part, or small beside it: 16 bits for each 32 columns that are not 2:4,
8 bytes a row. Nothing is rounded; it runs on whatever device holds the parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gblm.formats import Format, Parts, Shape
from gblm.formats.bits import unpack_bits
from gblm.formats.nibbles import byte_offsets

WORD = 32
# Starts of words are 16 bits.
MAX_COLUMNS = 1 << 16


class Arrays(NamedTuple):
    """One weight [out, in] in memory.

    Attributes:
        values: the part, of 2:4 weights a word for each four columns: int32 of floats, int16 of
            codes of 8 bits, uint8 of 4-bit codes. Of other masks fp8 codes are uint8, too.
        words: int32 [out, in/32], the bitmask; bit i of word w is column 32·w + i. Rows that are no
            whole words end in zeros.
        starts: int16 [out, in/32], read as unsigned: kept values of the row before the word.
            Empty for 2:4, like `begins`.
        begins: int64 [out], where the row begins in `values`, in its elements.
        scales: bfloat16 [out, groups], empty for floats.
        zeros: uint8 [out, groups], empty without zero points.
    """

    values: Tensor
    words: Tensor
    starts: Tensor
    begins: Tensor
    scales: Tensor
    zeros: Tensor


def is_two_four(fmt: Format) -> bool:
    """Whether four columns always keep two values, at a place that follows from the columns."""
    return str(fmt.pattern) == "2:4"


def arrays(fmt: Format, parts: Parts, shape: Shape) -> Arrays:
    """Parts → what the kernels read.

    Args:
        fmt: nm or bitmask, of any value type.
        parts: as stored; floating values in the activations' dtype.
        shape: [out, in], `in` at most MAX_COLUMNS.
    """
    values, words = parts["values"].contiguous(), _words(parts["bitmask"])
    # Triton knows E4M3 on newer GPUs only; the kernels widen its bits.
    values = values.view(torch.uint8) if fmt.values.is_fp8 else values
    starts, begins = values.new_empty(0, dtype=torch.int16), values.new_empty(0, dtype=torch.int64)
    if is_two_four(fmt):
        wide = {1: torch.int16, 2: torch.int32}
        values = values if fmt.values.in_nibbles else values.view(wide[values.element_size()])
    else:
        counts = unpack_bits(words.view(torch.uint8)).reshape(shape[0], -1, WORD).sum(dim=-1)
        starts = (counts.cumsum(dim=-1) - counts).to(torch.int16)
        begins = _begins(fmt, counts.sum(dim=-1))
    scales = parts.get("scales", values.new_empty(0, dtype=torch.bfloat16))
    zeros = parts.get("zeros", values.new_empty(0, dtype=torch.uint8))
    return Arrays(values, words, starts, begins, scales.contiguous(), zeros.contiguous())


def _words(bitmask: Tensor) -> Tensor:
    """[out, in/8] uint8 → int32; a view where rows are whole words."""
    bytes_missing = -bitmask.shape[1] % (WORD // 8)
    whole: Tensor = functional.pad(bitmask, (0, bytes_missing)) if bytes_missing else bitmask
    return whole.contiguous().view(torch.int32)


def _begins(fmt: Format, counts: Tensor) -> Tensor:
    """Where rows of so many codes begin; 4-bit codes begin at a byte."""
    if fmt.values.in_nibbles:
        return byte_offsets(counts)[:-1].contiguous()
    return counts.cumsum(0) - counts
