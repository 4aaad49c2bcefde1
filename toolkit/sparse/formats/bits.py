"""Bits of a mask and codes of 4 and 3 bits, packed into bytes.

Bit i, least significant first, of a mask's byte b is column 8·b + i. Codes lie two a byte, low
nibble first, in two's complement; every row starts at a byte, and one with an odd number of codes
ends in a nibble of zero. Of 3-bit codes eight lie in three bytes, the first in the lowest bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gblm.sparse.passes import places, row_blocks


def pack_bits(mask: Tensor) -> Tensor:
    """Pack [out, in] bool, `in` a multiple of 8, to [out, in/8] uint8."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    groups = mask.reshape(mask.shape[0], -1, 8).to(torch.uint8)
    return (groups * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(bitmask: Tensor) -> Tensor:
    """Unpack [out, in/8] uint8 to [out, in] bool."""
    if bitmask.device.type == "cpu":
        bits = np.unpackbits(bitmask.numpy(), axis=1, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bitmask.device)
    return (bitmask.unsqueeze(-1) & weights).ne(0).reshape(bitmask.shape[0], -1)


def expand_bits(values: Tensor, bitmask: Tensor) -> Tensor:
    """Expand kept values in row order, and their bitmask [out, in/8], to dense [out, in]."""
    shape = (bitmask.shape[0], 8 * bitmask.shape[1])
    dense = torch.zeros(shape, dtype=values.dtype, device=values.device)
    if values.device.type != "cpu":
        return dense.masked_scatter_(unpack_bits(bitmask), values)
    # Positions first, then a scatter: three times as fast on CPU as torch's masked_scatter.
    rest = values.reshape(-1)
    for rows in row_blocks(shape):
        found = places(unpack_bits(bitmask[rows]))
        dense[rows].view(-1).scatter_(0, found, rest[: len(found)])
        rest = rest[len(found) :]
    return dense


def row_counts(bitmask: Tensor) -> Tensor:
    """Count the set bits of each row: [out, in/8] uint8 → [out] int64."""
    blocks = row_blocks((bitmask.shape[0], 8 * bitmask.shape[1]))
    return torch.cat([unpack_bits(bitmask[rows]).sum(dim=1, dtype=torch.int64) for rows in blocks])


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack [rows, n] int8 codes of −8..7 to [rows, ceil(n/2)] uint8."""
    nibbles = functional.pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8) & 15
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Unpack [..., ceil(count/2)] uint8 to [..., count] int8."""
    # Shifts of int8 keep the sign.
    pairs = torch.stack([(packed << 4).view(torch.int8), packed.view(torch.int8)], -1) >> 4
    return pairs.flatten(-2)[..., :count]


def pack_eights(codes: Tensor) -> Tensor:
    """Pack [rows, n] int8 codes of −4..3, n a multiple of 8, to [rows, 3·n/8] uint8."""
    eights = (codes & 7).to(torch.int32).unflatten(-1, (-1, 8))
    words = (eights << _places_of_eight(codes.device)).sum(-1, dtype=torch.int32)
    return torch.stack([words & 255, words >> 8 & 255, words >> 16], -1).to(torch.uint8).flatten(-2)


def unpack_eights(packed: Tensor) -> Tensor:
    """Unpack [..., 3·n/8] uint8 to [..., n] int8."""
    low, middle, high = packed.to(torch.int32).unflatten(-1, (-1, 3)).unbind(-1)
    words = (low | middle << 8 | high << 16).unsqueeze(-1)
    # Shifts of int32 keep the sign.
    codes: Tensor = words << 29 - _places_of_eight(packed.device) >> 29
    return codes.to(torch.int8).flatten(-2)


def _places_of_eight(device: torch.device) -> Tensor:
    return torch.arange(0, 24, 3, dtype=torch.int32, device=device)


def pack_ragged(codes: Tensor, counts: Tensor) -> Tensor:
    """Pack codes row after row, [kept] int8, of which rows have `counts` [out], to uint8 bytes."""
    real = _real_nibbles(counts)
    nibbles = torch.zeros(len(real), dtype=torch.int8, device=codes.device)
    nibbles.scatter_(0, places(real), codes)
    return pack_nibbles(nibbles.reshape(1, -1)).reshape(-1)


def unpack_ragged(packed: Tensor, counts: Tensor) -> Tensor:
    """Undo `pack_ragged`: give the codes [kept] int8."""
    nibbles = unpack_nibbles(packed.reshape(1, -1), 2 * len(packed))
    return nibbles.reshape(-1).index_select(0, places(_real_nibbles(counts)))


def byte_offsets(counts: Tensor) -> Tensor:
    """Tell where rows of `counts` [out] codes begin, and where the last ends: [out + 1] int64."""
    ends = ((counts + 1) // 2).cumsum(0)
    return functional.pad(ends, (1, 0))


def _real_nibbles(counts: Tensor) -> Tensor:
    """[nibbles] bool, False for the padding of odd rows."""
    offsets = byte_offsets(counts)
    real = torch.ones(2 * int(offsets[-1]), dtype=torch.bool, device=counts.device)
    real[2 * offsets[1:][counts % 2 == 1] - 1] = False
    return real
