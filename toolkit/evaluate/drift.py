"""How far one model's predictions are from another's, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gblm.errors import InputError
from gblm.evaluate.subjects import Scores

# Figure → its unit.
UNITS = {
    "drift_mean": "nats",
    "drift_p99": "nats",
    "drift_max": "nats",
    "top1": "share",
    "kl_mean": "nats",
    "kl_p99": "nats",
    "kl_mean_at_least": "nats",
    "kl_p99_at_least": "nats",
}


@dataclass
class Drift:
    """Collects windows; float32 differences, one per token that is counted.

    Attributes:
        of_likeliest: KL is over so many likeliest tokens of the model and the rest as one; None:
            over all tokens.
    """

    changes: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)
    of_likeliest: int | None = None

    def add(self, model: Scores, dense: Scores, counted: slice) -> None:
        """Take one window of both.

        Args:
            model: what is judged.
            dense: what it is held against, on the same window.
            counted: the places that count.

        Raises:
            InputError: their vocabularies differ.
        """
        self.changes.append((model.logprobs - dense.logprobs)[counted].abs())
        if model.top1 is not None and dense.top1 is not None:
            self.same.append((model.top1 == dense.top1)[counted])
        if dense.full is None:
            return
        if model.full is None:
            if model.some is not None:
                self.of_likeliest = model.some[0].shape[1]
                self.divergences.append(coarse_kl(model.some, dense.full)[counted])
            return
        if model.full.shape != dense.full.shape:
            raise InputError(
                f"the model has {model.full.shape[-1]} tokens and the baseline "
                f"{dense.full.shape[-1]}: give the dense model that it was made from."
            )
        ours, theirs = model.full[counted], dense.full[counted].to(model.full.device)
        self.divergences.append((theirs.exp() * (theirs - ours)).sum(-1).cpu())

    def summary(self) -> dict[str, float]:
        """Give the figures by the names of UNITS, of those that both models allow.

        "drift_…" are absolute changes of log-probs, "kl_…" is KL(dense ‖ model), "…_at_least" a
        lower bound of it over some tokens, "top1" the share of places with the same likeliest
        token.
        """
        changes = torch.cat(self.changes)
        found = {
            "drift_mean": float(changes.mean()),
            "drift_p99": _p99(changes),
            "drift_max": float(changes.max()),
        }
        if self.same:
            found["top1"] = float(torch.cat(self.same).float().mean())
        if self.divergences:
            kl, bound = torch.cat(self.divergences), "_at_least" if self.of_likeliest else ""
            found |= {f"kl_mean{bound}": float(kl.mean()), f"kl_p99{bound}": _p99(kl)}
        return found


def coarse_kl(some: tuple[Tensor, Tensor], dense: Tensor) -> Tensor:
    """KL(dense ‖ model) in nats, all but the model's likeliest tokens taken as one.

    At most that over all tokens, as merging outcomes never adds to it.

    Args:
        some: the model's likeliest tokens [places, k] int64 and their log-probs [places, k].
        dense: log-probs of all tokens [places, vocabulary] float32.

    Returns:
        [places] float32.

    Raises:
        InputError: the baseline has no such token.
    """
    tokens, ours = some[0], some[1].double()
    if int(tokens.min()) < 0 or int(tokens.max()) >= dense.shape[-1]:
        raise InputError(
            f"the model has a token {int(tokens.max())} and the baseline {dense.shape[-1]} tokens: "
            "give the dense model that it was made from."
        )
    theirs = dense.gather(1, tokens.to(dense.device)).double().cpu()
    # float32 log-probs of what is left may add up to a little more than 1.
    rest, rest_dense = (
        (1 - each.exp().sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
        for each in (ours, theirs)
    )
    inside = (theirs.exp() * (theirs - ours)).sum(-1)
    return (inside + rest_dense * (rest_dense / rest).log()).float()


def _p99(values: Tensor) -> float:
    """Give the smallest value that 99 % do not exceed."""
    return float(values.sort().values[max(0, -(-99 * len(values) // 100) - 1)])
