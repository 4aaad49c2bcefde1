"""The gated MLPs of a mixture of experts, grouped into one call of the kernels or one by one.

Expert e of a token x gives down(silu(gate(x)) · up(x)); the layer gives the sum of what a token's
experts give, weighted with their shares, which the router chose with their ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gblm.kernels import native

Multiply = Callable[[Tensor], Tensor]
Expert = tuple[Multiply, Multiply, Multiply]
ALIGNMENT = 64


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
