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
from typing import Any

import torch
from torch import Tensor, nn

from gblm.calibrate.ranks import Ranks
from gblm.model.experts import ExpertLinear, blocks

logger = logging.getLogger(__name__)
# A norm of a column is known to about 10 % then, and it is no more than a sentence or two.
MIN_TOKENS = 64


@contextmanager
def counted(layer: nn.Module) -> Iterator[dict[str, int]]:
    """Count the tokens that reach each expert while the block runs, by local name of the expert."""
    experts = {f"{b}.{i}": one for b, block in blocks(layer) for i, one in enumerate(block)}
    tokens = dict.fromkeys(experts, 0)

    def hook(name: str) -> Any:
        def count(module: nn.Module, args: tuple[Tensor]) -> None:
            tokens[name] += len(args[0])

        return count

    handles = [one.register_forward_pre_hook(hook(name)) for name, one in experts.items()]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


def scarce(tokens: Mapping[str, int], ranks: Ranks, layer: str, what: str) -> set[str]:
    """Find the experts that few tokens reached, on all ranks together, and log which they are.

    Args:
        tokens: by local name of the expert.
        ranks: the processes that share the text.
        layer: full name of the decoder layer.
        what: they will be lent, in words.
    """
    if not tokens:
        return set()
    counts = torch.tensor(list(tokens.values()), device=ranks.device)
    ranks.sum_(counts)
    few = [name for name, n in zip(tokens, counts.tolist(), strict=True) if n < MIN_TOKENS]
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
