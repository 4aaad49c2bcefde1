"""Quads: four columns of a row that follow each other, w0 to w3, zero where none is kept.

Of a 2:4 weight the two values of a quad are one word; of others a value is found by counting bits.
`layout.py` describes the arrays.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What quads of fp8 lack to be codes: exact, and cheaper of a sum than of each weight.
FP8_UNIT = tl.constexpr(256.0)


@triton.jit
def _bits_set(word: tl.tensor) -> tl.tensor:
    """How many; LLVM knows the idiom and makes it one instruction."""
    word = word.to(tl.uint32)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _e4m3(byte: tl.tensor) -> tl.tensor:
    """A code of E4M3 over FP8_UNIT, float16: exponent and mantissa where the wider ones end."""
    bits = byte.to(tl.int32)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _pair(word: tl.tensor, zero: tl.tensor, KIND: tl.constexpr, FLOAT: tl.constexpr) -> tl.tuple:
    """The two values of a word of a 2:4 weight; codes counted from their zero point, or `_e4m3`."""
    if KIND == 16:
        first = (word & 0xFFFF).to(tl.int16).to(FLOAT, bitcast=True)
        second = (word >> 16).to(tl.int16).to(FLOAT, bitcast=True)
    elif KIND == 8:
        first = word.to(tl.int8)
        second = (word >> 8).to(tl.int8)
    elif KIND == 28:
        first = _e4m3(word)
        second = _e4m3(word >> 8)
    elif KIND == 4:
        first = (word.to(tl.int32) << 28) >> 28
        second = (word.to(tl.int32) << 24) >> 28
    else:
        first = (word & 15).to(tl.int32) - zero[:, None]
        second = (word >> 4).to(tl.int32) - zero[:, None]
    return first, second


@triton.jit
def _from_bytes(
    values: tl.tensor, rank: tl.tensor, mask: tl.tensor, zero: tl.tensor, KIND: tl.constexpr
) -> tl.tuple:
    """w0 to w3 from 4-bit codes of a row, the first of them at `rank`: three bytes hold them."""
    kept0 = mask & 1
    kept1 = (mask >> 1) & 1
    kept2 = (mask >> 2) & 1
    kept3 = (mask >> 3) & 1
    order2 = kept0 + kept1
    order3 = order2 + kept2
    odd = rank & 1
    # Nibbles from the byte's first to the last that is wanted; none when nothing is kept.
    count = tl.where((mask & 15) != 0, odd + order3 + kept3, 0)
    own = values + (rank >> 1)
    window = tl.load(own, mask=count > 0, other=0).to(tl.int32)
    window |= tl.load(own + 1, mask=count > 2, other=0).to(tl.int32) << 8
    window |= tl.load(own + 2, mask=count > 4, other=0).to(tl.int32) << 16
    window = window >> (4 * odd)
    w0 = _nibble(window, kept0, zero, KIND)
    w1 = _nibble(window >> (4 * kept0), kept1, zero, KIND)
    w2 = _nibble(window >> (4 * order2), kept2, zero, KIND)
    w3 = _nibble(window >> (4 * order3), kept3, zero, KIND)
    return w0, w1, w2, w3


@triton.jit
def _nibble(window: tl.tensor, kept: tl.tensor, zero: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The lowest four bits as a code, counted from its zero point, where one is kept."""
    code = (window << 28) >> 28 if KIND == 4 else (window & 15) - zero[:, None]
    return tl.where(kept != 0, code, 0)


@triton.jit
def load_quads(
    weight: tl.tuple,
    tile: tl.tuple,
    columns: tl.tensor,
    TWO_FOUR: tl.constexpr,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    FLOAT: tl.constexpr,
    INTO: tl.constexpr,
) -> tl.tuple:
    """w0 to w3 [rows, quads] of a tile, as INTO, which holds them exactly; fp8 over FP8_UNIT."""
    values, words, starts, begins = weight
    row, quad, zero = tile
    inside = (quad < columns // 4)[None, :] if TAIL else None
    none: tl.constexpr = 0 if TAIL else None
    place = row[:, None] * tl.cdiv(columns, 32) + (quad // 8)[None, :]
    shift = ((quad & 7) * 4)[None, :]
    word = tl.load(words + place, mask=inside, other=none)
    mask = word >> shift
    kept0 = (mask & 1) != 0
    kept1 = (mask & 2) != 0
    kept2 = (mask & 4) != 0
    kept3 = (mask & 8) != 0
    if TWO_FOUR:
        pair = values + row[:, None] * (columns // 4) + quad[None, :]
        first, second = _pair(tl.load(pair, mask=inside, other=none), zero, KIND, FLOAT)
        first = first.to(INTO)
        second = second.to(INTO)
        w0 = tl.where(kept0, first, 0)
        w1 = tl.where(kept1, tl.where(kept0, second, first), 0)
        w2 = tl.where(kept2, tl.where((mask & 3) != 0, second, first), 0)
        w3 = tl.where(kept3, second, 0)
    else:
        start = tl.load(starts + place, mask=inside, other=none).to(tl.int32) & 0xFFFF
        own = values + tl.load(begins + row)[:, None]
        rank = start + _bits_set(word & ((1 << shift) - 1))
        if KIND == 16 or KIND == 8:
            rank1 = rank + (mask & 1)
            rank2 = rank1 + ((mask >> 1) & 1)
            rank3 = rank2 + ((mask >> 2) & 1)
            w0 = tl.load(own + rank, mask=kept0, other=0).to(INTO)
            w1 = tl.load(own + rank1, mask=kept1, other=0).to(INTO)
            w2 = tl.load(own + rank2, mask=kept2, other=0).to(INTO)
            w3 = tl.load(own + rank3, mask=kept3, other=0).to(INTO)
        elif KIND == 28:
            rank1 = rank + (mask & 1)
            rank2 = rank1 + ((mask >> 1) & 1)
            rank3 = rank2 + ((mask >> 2) & 1)
            w0 = _e4m3(tl.load(own + rank, mask=kept0, other=0)).to(INTO)
            w1 = _e4m3(tl.load(own + rank1, mask=kept1, other=0)).to(INTO)
            w2 = _e4m3(tl.load(own + rank2, mask=kept2, other=0)).to(INTO)
            w3 = _e4m3(tl.load(own + rank3, mask=kept3, other=0)).to(INTO)
        else:
            w0, w1, w2, w3 = _from_bytes(own, rank, mask, zero, KIND)
            w0 = w0.to(INTO)
            w1 = w1.to(INTO)
            w2 = w2.to(INTO)
            w3 = w3.to(INTO)
    return w0, w1, w2, w3


@triton.jit
def tile_of(quads: tl.tuple) -> tl.tensor:
    """[rows, quads] four times → [rows, columns]."""
    w0, w1, w2, w3 = quads
    joined = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(joined, (w0.shape[0], 4 * w0.shape[1]))
