"""The gated MLPs of a mixture of experts: one by one, or all of a layer at once.

Expert e of a token x gives down(silu(gate(x)) · up(x)); the layer gives the sum of what a token's
experts give, weighted with their shares, which the router chose with their ids. The backend `cpu`
has all in one call, `grouped`; `triton` has a launch for each of gate, up and down, `stacked`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gblm.kernels import native
from gblm.kernels.few_tokens import aligned
from gblm.kernels.triton.backend import Pairs, Triton
from gblm.sparse.formats import Format, Shape

Multiply = Callable[[Tensor], Tensor]
Expert = tuple[Multiply, Multiply, Multiply]
ALIGNMENT = 64
# Bounds the memory between the linears of `stacked`: tokens at a time.
TURN = 1024


def one_by_one(x: Tensor, ids: Tensor, shares: Tensor, experts: Sequence[Expert]) -> Tensor:
    """Call expert after expert: the plain reference, for every backend.

    Args:
        x: the activations, [tokens, features].
        ids: which experts each token has chosen, [tokens, chosen]; a negative id is no expert.
        shares: their weights, [tokens, chosen].
        experts: gate, up and down of each expert, which multiply [..., in] to [..., out].

    Returns:
        [tokens, features] in x's dtype; added up in float32.
    """
    total = x.new_zeros(x.shape, dtype=torch.float32)
    for index in ids[ids >= 0].unique().tolist():
        tokens, places = (ids == index).nonzero(as_tuple=True)
        gate, up, down = experts[index]
        rows = x[tokens]
        between = functional.silu(gate(rows).float()) * up(rows).float()
        found = down(between.to(x.dtype)).float() * shares[tokens, places, None].float()
        total.index_add_(0, tokens, found)
    return total.to(x.dtype)


def grouped(x: Tensor, ids: Tensor, shares: Tensor, panels: Tensor, places: Tensor) -> Tensor:
    """Call all experts at once; the arguments are those of `one_by_one` and what `join` gave.

    Products are those of the backend `cpu`, bit for bit. One PyTorch op, so that it can be traced.
    """
    out: Tensor = torch.ops.gblm.cpu_experts.default(
        x.contiguous(),
        ids.to(torch.int32).contiguous(),
        shares.to(torch.float32).contiguous(),
        panels,
        places,
    )
    return out


def join(prepared: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Copy the panels of a layer into one block: experts are small, and huge pages are not.

    Args:
        prepared: panels of gate, up and down of each expert, as the backend `cpu` made them.

    Returns:
        The block, [bytes] uint8, and the first byte and the bytes of every linear in it,
        [experts, 3, 2] int64.
    """
    flat = [panels for expert in prepared for panels in expert]
    sizes = torch.tensor([panels.numel() for panels in flat], dtype=torch.int64)
    ends = ((sizes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    block = native.allocate(int(ends[-1]))
    for panels, start in zip(flat, starts.tolist(), strict=True):
        block[start : start + panels.numel()] = panels
    return block, torch.stack([starts, sizes], 1).reshape(len(prepared), 3, 2)


class Stack(NamedTuple):
    """The gates, the ups or the downs of a layer, one below the other, as a weight of `triton`.

    `shape` is the [out, in] of one of them.
    """

    fmt: Format
    shape: Shape
    prepared: Sequence[Tensor]


def stacked(
    x: Tensor, ids: Tensor, shares: Tensor, stacks: Sequence[Stack], experts: int, backend: Triton
) -> Tensor:
    """Multiply with the stacks of gate, up and down; other arguments are those of `one_by_one`.

    Only the experts that tokens have chosen are read, on the current stream and without waiting
    for the device; activations are gathered by the kernel.
    """
    if not ids.numel():
        return torch.zeros_like(x)
    if len(x) > TURN:
        turns = zip(x.split(TURN), ids.split(TURN), shares.split(TURN), strict=True)
        return torch.cat([stacked(*turn, stacks, experts, backend) for turn in turns])
    pairs = Pairs.of(ids, experts)
    gate, up, down = stacks

    def multiply(lines: Tensor, stack: Stack) -> Tensor:
        out = lines.new_empty((ids.numel(), stack.shape[0]))
        backend.multiply(lines, out, stack.prepared, stack.fmt, stack.shape, pairs)
        return out

    x = aligned(x)
    between = functional.silu(multiply(x, gate).float()) * multiply(x, up).float()
    found = multiply(between.to(x.dtype), down).reshape(*ids.shape, -1)
    # Nothing was written for the others.
    own = ((ids >= 0) & (ids < experts)).unsqueeze(-1)
    weighted = torch.where(own, found.float() * shares.float().unsqueeze(-1), 0)
    return weighted.sum(1).to(x.dtype)
