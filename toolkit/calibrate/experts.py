"""Experts that few tokens of the calibration text reach: their statistics are those of all experts.

An expert's statistics and gradients are taken on the tokens that the router sends it. Where these
are fewer than MIN_TOKENS, they say little, and the mean over all experts of the decoder layer takes
their place: for gate and up that is the input of the whole block, each token as often as it is
used; for down and for gradients, what an average expert has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gblm.calibrate.ranks import Ranks
from gblm.model.experts import ExpertLinear, blocks

logger = logging.getLogger(__name__)
# A norm of a column is known to about 10 % then, and it is no more than a sentence or two.
MIN_TOKENS = 64


@dataclass
class Use:
    """A Use sums up what a text asks of an expert, over the tokens that reach it.

    With the router's weight w of a token, 1 where inputs are weighted before, and the expert's
    output f: `square` is Σ w², `added` is Σ w ‖f‖₂.
    """

    tokens: int = 0
    square: float = 0.0
    added: float = 0.0


@contextmanager
def counted(layer: nn.Module) -> Iterator[dict[str, Use]]:
    """Sum up the use of each expert while the block runs, by local name of the expert."""
    experts = {f"{b}.{i}": one for b, block in blocks(layer) for i, one in enumerate(block)}
    uses = {name: Use() for name in experts}

    def hook(name: str) -> Any:
        def count(expert: Any, args: Any, out: Tensor) -> None:
            norms = torch.linalg.vector_norm(out.detach().float(), dim=-1)
            weights = torch.ones_like(norms) if expert.routing is None else expert.routing.float()
            use = uses[name]
            use.tokens += len(norms)
            use.square += float(weights.square().sum())
            use.added += float(weights @ norms)

        return count

    handles = [one.register_forward_hook(hook(name)) for name, one in experts.items()]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def scarce(uses: Mapping[str, Use], ranks: Ranks, layer: str, what: str) -> set[str]:
    """Find the experts that few tokens reached, on all ranks together, and log which they are.

    Args:
        uses: by local name of the expert.
        ranks: the processes that share the text.
        layer: full name of the decoder layer.
        what: they will be lent, in words.
    """
    if not uses:
        return set()
    counts = torch.tensor([use.tokens for use in uses.values()], device=ranks.device)
    ranks.sum_(counts)
    few = [name for name, n in zip(uses, counts.tolist(), strict=True) if n < MIN_TOKENS]
    for block in dict.fromkeys(name.rpartition(".")[0] for name in few):
        numbers = [name.rpartition(".")[2] for name in few if name.startswith(f"{block}.")]
        logger.info(
            "%s.%s: experts %s saw fewer than %d tokens of the text and take the mean %s of all",
            layer, block, ", ".join(numbers), MIN_TOKENS, what,
        )  # fmt: skip
    return set(few)


def lend(few: set[str], own: Mapping[str, Tensor], experts: Mapping[str, ExpertLinear]) -> None:
    """Put the mean over all experts in the place of what some experts have, in place.

    Args:
        few: local names of those experts.
        own: a sum or mean over samples for each linear, by local name.
        experts: which expert a linear belongs to.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for name in own:
        if name in experts:
            alike.setdefault((experts[name].block, experts[name].role), []).append(name)
    for names in alike.values():
        poor = [name for name in names if experts[name].expert in few]
        if poor:
            mean = torch.zeros_like(own[names[0]])
            for name in names:
                mean += own[name] / len(names)
            for name in poor:
                own[name].copy_(mean)
