"""4-bit codes two a byte, low nibble first, in two's complement.

Every row starts at a byte. A row with an odd number of codes ends in a nibble of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack [rows, n] int8 codes of −8..7 to [rows, ceil(n/2)] uint8."""
    nibbles = functional.pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8) & 15
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """[rows, ceil(count/2)] uint8 → [rows, count] int8."""
    # Shifts of int8 keep the sign.
    pairs = torch.stack([(packed << 4).view(torch.int8), packed.view(torch.int8)], -1) >> 4
    return pairs.reshape(packed.shape[0], -1)[:, :count]


def pack_ragged(codes: Tensor, counts: Tensor) -> Tensor:
    """Codes row after row, [kept] int8, and how many each row has, [out] → bytes uint8."""
    real = _real_nibbles(counts)
    nibbles = torch.zeros(len(real), dtype=torch.int8, device=codes.device)
    nibbles[real] = codes
    return pack_nibbles(nibbles.reshape(1, -1)).reshape(-1)


def unpack_ragged(packed: Tensor, counts: Tensor) -> Tensor:
    """The inverse of `pack_ragged`: [kept] int8."""
    nibbles = unpack_nibbles(packed.reshape(1, -1), 2 * len(packed))
    return nibbles.reshape(-1)[_real_nibbles(counts)]


def byte_offsets(counts: Tensor) -> Tensor:
    """Where rows begin: counts of codes [out] → [out + 1] int64; the last is the end."""
    ends = ((counts + 1) // 2).cumsum(0)
    return functional.pad(ends, (1, 0))


def _real_nibbles(counts: Tensor) -> Tensor:
    """[nibbles] bool, False for the padding of odd rows."""
    offsets = byte_offsets(counts)
    real = torch.ones(2 * int(offsets[-1]), dtype=torch.bool, device=counts.device)
    real[2 * offsets[1:][counts % 2 == 1] - 1] = False
    return real
