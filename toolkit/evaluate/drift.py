"""How far one model's predictions are from another's, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gblm.errors import InputError
from gblm.evaluate.subjects import Scores


@dataclass
class Drift:
    """Collects windows; float32 differences, one per token that is counted."""

    changes: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)

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
        self.same.append((model.top1 == dense.top1)[counted])
        if model.full is None or dense.full is None:
            return
        if model.full.shape != dense.full.shape:
            raise InputError(
                f"the model has {model.full.shape[-1]} tokens and the baseline "
                f"{dense.full.shape[-1]}: give the dense model that it was made from."
            )
        ours, theirs = model.full[counted], dense.full[counted].to(model.full.device)
        self.divergences.append((theirs.exp() * (theirs - ours)).sum(-1).cpu())

    def summary(self) -> dict[str, float | None]:
        """Absolute change of log-probs in nats, KL(dense ‖ model) in nats, shared top-1.

        "kl_mean" and "kl_p99" are None where an engine gives no full distribution.
        """
        changes = torch.cat(self.changes)
        found: dict[str, float | None] = {
            "mean": float(changes.mean()),
            "p99": _p99(changes),
            "max": float(changes.max()),
            "top1": float(torch.cat(self.same).float().mean()),
            "kl_mean": None,
            "kl_p99": None,
        }
        if self.divergences:
            kl = torch.cat(self.divergences)
            found |= {"kl_mean": float(kl.mean()), "kl_p99": _p99(kl)}
        return found


def _p99(values: Tensor) -> float:
    """The smallest value that 99 % do not exceed."""
    return float(values.sort().values[max(0, -(-99 * len(values) // 100) - 1)])
