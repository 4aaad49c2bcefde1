"""The kernels: x @ W.T for few tokens, or for pairs of tokens and experts, and the dense weight.

A quad is four columns of a row that follow each other, w0 to w3, zero where none is kept: of a 2:4
weight its two values are one word; of others a value is found by counting bits. `backend.Arrays`
describes what is read, and `backend.blocks` chooses the blocks.

Triton's interpreter knows bfloat16 as bits only: it multiplies them, converts integers to them,
and cuts float32 off. There (INTERPRETED) products are those of float32, and rounding is done here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FLOATS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _bits_set(word: tl.tensor) -> tl.tensor:
    """Count the bits that are set; LLVM knows the idiom and makes it one instruction."""
    word = word.to(tl.uint32)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _pair(word: tl.tensor, KIND: tl.constexpr, FLOAT: tl.constexpr) -> tl.tuple:
    """Split a word of a 2:4 weight into its two values."""
    if KIND == 16:
        first = (word & 0xFFFF).to(tl.int16).to(FLOAT, bitcast=True)
        second = (word >> 16).to(tl.int16).to(FLOAT, bitcast=True)
    elif KIND == 8:
        first = word.to(tl.int8)
        second = (word >> 8).to(tl.int8)
    else:
        first = (word.to(tl.int32) << 28) >> 28
        second = (word.to(tl.int32) << 24) >> 28
    return first, second


@triton.jit
def _from_bytes(values: tl.tensor, rank: tl.tensor, mask: tl.tensor) -> tl.tuple:
    """Read w0 to w3 from a row's 4-bit codes, the first at `rank`: three bytes hold them."""
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
    w0 = _nibble(window, kept0)
    w1 = _nibble(window >> (4 * kept0), kept1)
    w2 = _nibble(window >> (4 * order2), kept2)
    w3 = _nibble(window >> (4 * order3), kept3)
    return w0, w1, w2, w3


@triton.jit
def _nibble(window: tl.tensor, kept: tl.tensor) -> tl.tensor:
    """Read the lowest four bits as a code, where one is kept."""
    return tl.where(kept != 0, (window << 28) >> 28, 0)


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
    """Read w0 to w3 [rows, quads] of a tile as INTO, which is exact."""
    values, words, starts, begins = weight
    row, quad = tile
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
        first, second = _pair(tl.load(pair, mask=inside, other=none), KIND, FLOAT)
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
        else:
            w0, w1, w2, w3 = _from_bytes(own, rank, mask)
            w0 = w0.to(INTO)
            w1 = w1.to(INTO)
            w2 = w2.to(INTO)
            w3 = w3.to(INTO)
    return w0, w1, w2, w3


@triton.jit
def tile_of(quads: tl.tuple) -> tl.tensor:
    """Interleave w0 to w3 [rows, quads] to [rows, columns]."""
    w0, w1, w2, w3 = quads
    joined = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(joined, (w0.shape[0], 4 * w0.shape[1]))


@triton.jit
def _sixteenth(four: tl.tensor, PLACE: tl.constexpr, FLOAT: tl.constexpr) -> tl.tensor:
    """Take one of the four activations of a 64-bit word, as float32."""
    return (four >> (16 * PLACE)).to(tl.int16).to(FLOAT, bitcast=True).to(tl.float32)


@triton.jit
def _sums_of_one(
    quads: tl.tuple,
    x: tl.tensor,
    quad: tl.tensor,
    columns: tl.tensor,
    TAIL: tl.constexpr,
    FLOAT: tl.constexpr,
) -> tl.tensor:
    """Sum the products of a tile's quads with the line that begins at x [1]: [rows, quads]."""
    w0, w1, w2, w3 = quads
    real = quad < columns // 4 if TAIL else None
    four = tl.load(x + quad, mask=real, other=0 if TAIL else None)[None, :]
    total = w0 * _sixteenth(four, 0, FLOAT)
    total += w1 * _sixteenth(four, 1, FLOAT)
    total += w2 * _sixteenth(four, 2, FLOAT)
    total += w3 * _sixteenth(four, 3, FLOAT)
    return total


@triton.jit
def _sums_of_many(
    quads: tl.tuple,
    x: tl.tensor,
    lines: tl.tensor,
    real: tl.tensor,
    first: tl.tensor,
    columns: tl.tensor,
    TAIL: tl.constexpr,
    FLOAT: tl.constexpr,
) -> tl.tensor:
    """Sum the products of a tile, whose first column is `first`, with lines of x: [rows, lines]."""
    tile = tile_of(quads)
    column = first + tl.arange(0, tile.shape[1])[:, None]
    inside = real[None, :]
    if TAIL:
        inside = inside & (column < columns)
    at = x.to(tl.pointer_type(FLOAT), bitcast=True) + lines[None, :] * columns + column
    return tl.dot(tile, tl.load(at, mask=inside, other=0).to(tile.dtype))


@triton.jit
def _rounded(total: tl.tensor, INTO: tl.constexpr) -> tl.tensor:
    """Round float32 to the nearest INTO, ties to even."""
    if INTERPRETED and INTO == tl.bfloat16:  # noqa: SIM300
        bits = total.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        total = bits.to(tl.float32, bitcast=True)
    return total.to(INTO)


@triton.jit
def _scaled(code: tl.tensor, scale: tl.tensor, INTO: tl.constexpr) -> tl.tensor:
    """Multiply in float32 and round once; a small negative product becomes +0.0."""
    product = _rounded(code * scale, INTO)
    if INTO == tl.float16:  # noqa: SIM300
        product = tl.where(product == 0, 0, product)
    return product


@triton.jit(do_not_specialize=["tokens"])
def multiply(
    x: tl.tensor,
    values: tl.tensor,
    words: tl.tensor,
    starts: tl.tensor,
    begins: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    groups: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    TWO_FOUR: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    CHOSEN: tl.constexpr,
) -> None:
    """Compute out[s, t, n] = Σ_k x[t, k] · W[n, k] over the columns k of the share s.

    With CHOSEN, W is a stack of experts' weights, and t a pair of a token and an expert e:
    out[s, t, n] = Σ_k x[t // CHOSEN, k] · W[e · rows + n, k]. A program takes pairs of one expert.

    Args:
        x: int64 [tokens, columns/4], each four activations of FLOAT.
        values: the kept values; see `backend.Arrays`, also for the next five.
        words: int32 [rows, columns/32].
        starts: int16 [rows, columns/32]; unused with TWO_FOUR.
        begins: int64 [rows]; unused with TWO_FOUR.
        scales: bfloat16 [rows, groups]; unused without codes.
        out: [SPLIT, tokens, rows], float32 or FLOAT.
        order: see `backend.Pairs`, like `groups`; None without CHOSEN.
        groups: None without CHOSEN.
        tokens: at most TOKENS; with CHOSEN any number of pairs.
        rows: of the weight, or of an expert's.
        columns: of the weight, a multiple of 8.
        TWO_FOUR: whether the pattern is 2:4.
        KIND: the bits of a value: 16 for floats, 8 and 4 for codes.
        GROUP: columns that share a scale, a multiple of COLUMNS; 0 for one a row.
        TAIL: whether columns are no whole tiles.
        FLOAT: bfloat16 or float16, of activations and floating values.
        ROWS: of a tile.
        COLUMNS: of a tile.
        TOKENS: of a program: 1, or 16 and more, which use tensor cores.
        SPLIT: shares of the columns, each a program of its own.
        CHOSEN: pairs that share a line of x; 0 without experts.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < rows
    row = tl.where(real, row, 0)
    own = out + tl.program_id(1) * tokens * rows + row
    token = tl.arange(0, TOKENS)
    taken = token < tokens
    line = token
    if CHOSEN:
        group = groups + 3 * tl.program_id(2)
        count = tl.load(group + 2)
        if count == 0:
            return
        row += tl.load(group) * rows
        taken = token < count
        token = tl.load(order + tl.load(group + 1) + token, mask=taken, other=0)
        line = token // CHOSEN
    INTO: tl.constexpr = tl.float32 if TOKENS == 1 or INTERPRETED else FLOAT
    steps = tl.cdiv(columns, COLUMNS)
    share = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * share
    sums = tl.zeros((ROWS, COLUMNS // 4 if TOKENS == 1 else TOKENS), dtype=tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        quad = step * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        if GROUP:
            scale = scales + row * (columns // GROUP) + step * COLUMNS // GROUP
        quads = load_quads(
            (values, words, starts, begins), (row, quad), columns,
            TWO_FOUR, KIND, TAIL, FLOAT, INTO,
        )  # fmt: skip
        if TOKENS == 1:
            total = _sums_of_one(quads, x + line * (columns // 4), quad, columns, TAIL, FLOAT)
        else:
            total = _sums_of_many(quads, x, line, taken, step * COLUMNS, columns, TAIL, FLOAT)
        if GROUP:
            total *= tl.load(scale).to(tl.float32)[:, None]
        sums += total
    if KIND != 16 and GROUP == 0:
        sums *= tl.load(scales + row).to(tl.float32)[:, None]
    DTYPE: tl.constexpr = out.dtype.element_ty
    if TOKENS == 1:
        tl.store(own + token * rows, _rounded(tl.sum(sums, axis=1), DTYPE), mask=real)
    else:
        kept = real[:, None] & taken[None, :]
        tl.store(own[:, None] + token[None, :] * rows, _rounded(sums, DTYPE), mask=kept)


@triton.jit(do_not_specialize=["size"])
def add_shares(
    shares: tl.tensor, out: tl.tensor, size: tl.tensor, SPLIT: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Add up out[i] = Σ_s shares[s, i], always in the same order.

    Args:
        shares: [SPLIT, size] float32.
        out: [size] bfloat16 or float16.
        size: elements.
        SPLIT: shares.
        BLOCK: elements of a program.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for share in tl.static_range(SPLIT):
        total += tl.load(shares + share * size + at, mask=at < size, other=0.0)
    tl.store(out + at, _rounded(total, out.dtype.element_ty), mask=at < size)


@triton.jit
def expand(
    values: tl.tensor,
    words: tl.tensor,
    starts: tl.tensor,
    begins: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    TWO_FOUR: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write out[n, k] = W[n, k]: the value, or code · scale, rounded once; never −0.0.

    Arguments are those of `multiply`, but out is [rows, columns] of FLOAT.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < rows
    row = tl.where(real, row, 0)
    step = tl.program_id(1)
    quad = step * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    group = row * (columns // GROUP) + step * COLUMNS // GROUP if GROUP else row
    w0, w1, w2, w3 = load_quads(
        (values, words, starts, begins), (row, quad), columns,
        TWO_FOUR, KIND, TAIL, FLOAT, FLOAT if KIND == 16 else tl.float32,
    )  # fmt: skip
    if KIND != 16:
        scale = tl.load(scales + group).to(tl.float32)[:, None]
        w0 = _scaled(w0, scale, FLOAT)
        w1 = _scaled(w1, scale, FLOAT)
        w2 = _scaled(w2, scale, FLOAT)
        w3 = _scaled(w3, scale, FLOAT)
    tile = tile_of((w0, w1, w2, w3))
    column = step * COLUMNS + tl.arange(0, COLUMNS)
    at = out + row[:, None] * columns + column[None, :]
    tl.store(at, tile, mask=real[:, None] & (column < columns)[None, :])
