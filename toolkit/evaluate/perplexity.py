"""Perplexity over windows of a text, as GBLM-Pruner, Wanda and SparseGPT measure it, and drift.

Drift is how far one model's predictions are from another's, token by token. Perplexity is
exp of the mean next-token cross-entropy; every window of seq_len tokens predicts seq_len − 1
(lib/eval.py of GBLM-Pruner). Figures compare only where the whole line of the protocol is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm import data
from gblm.evaluate.subjects import Scores, Subject, TorchSubject
from gblm.progress import Progress, no_progress
from gblm.record import Row

# Figure of a drift → its unit.
UNITS = {"drift_mean": "nats", "top1": "share", "kl_mean": "nats"}


@dataclass(frozen=True)
class Protocol:
    """A protocol says how a perplexity is measured.

    The source is a text file or a name of `gblm.data.NAMED_SETS`, of which the held-out part is
    read, the first `max_windows` windows of `seq_len` tokens or all. With `bos` windows begin with
    what the tokenizer puts before a prompt, as a server's prompts do; the papers' code leaves it
    out.
    """

    source: str = "pydoc"
    seq_len: int = 2048
    max_windows: int | None = None
    bos: bool = True

    @property
    def text(self) -> str:
        """Name the text by its file."""
        return Path(self.source).name

    def line(self, windows: Tensor) -> str:
        """Write the whole protocol in one line, which is the load of its figures in a record.

        Args:
            windows: what is measured, [num_windows, seq_len] int64.
        """
        part = "test split" if self.source == "wikitext2" else "held-out text"
        start = "start tokens of the tokenizer" if self.bos else "no special tokens"
        return (
            f"{self.text}, {part} as one stream, {len(windows)} windows × {self.seq_len} "
            f"tokens, no overlap, {start}, sha256 {data.fingerprint(windows)[:12]}"
        )

    def windows(self, tokenizer: Any) -> Tensor:
        """Read the text as token ids [num_windows, seq_len] int64."""
        return data.evaluation_windows(
            data.read_documents(self.source, "held-out"),
            tokenizer, self.seq_len, self.max_windows, self.bos,
        )  # fmt: skip


def measure(
    sides: Mapping[str, Subject],
    protocols: Sequence[Protocol],
    tokenizer: Any,
    progress: Progress = no_progress,
) -> list[Row]:
    """Measure perplexity, and drift where there is something to drift from.

    Args:
        sides: by name what is judged and, if there is a second one, what it is held against.
        protocols: one for each text.
        tokenizer: of both sides, which see the same tokens.
        progress: for progress bars.

    Returns:
        For each text the sides' "perplexity", then the first side's figures of `Drift.summary`.
    """
    cut = [(protocol, protocol.windows(tokenizer)) for protocol in protocols]
    return [row for protocol, windows in cut for row in _text(sides, protocol, windows, progress)]


def _text(
    sides: Mapping[str, Subject], protocol: Protocol, windows: Tensor, progress: Progress
) -> list[Row]:
    step = progress(f"perplexity, {protocol.text}", len(windows))
    drift, losses = Drift(), dict.fromkeys(sides, 0.0)
    for window in windows:
        scores = {name: subject.score(window) for name, subject in sides.items()}
        for name, found in scores.items():
            losses[name] -= float(found.logprobs.double().sum())
        if len(sides) > 1:
            drift.add(*scores.values())
        step()
    count = len(windows) * (windows.shape[1] - 1)
    load = protocol.line(windows)
    rows = [
        Row(name, load, "perplexity", "", of_loss(loss / count)) for name, loss in losses.items()
    ]
    if len(sides) > 1:
        first = next(iter(sides))
        rows += [Row(first, load, key, UNITS[key], v) for key, v in drift.summary().items()]
    return rows


def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Measure the perplexity of a loaded causal language model.

    Args:
        model: in eval mode.
        windows: token ids [num_windows, seq_len] int64.
    """
    subject = TorchSubject(model)
    logprobs = torch.stack([subject.score(window).logprobs for window in windows])
    return of_loss(-float(logprobs.double().mean()))


def of_loss(mean: float) -> float:
    """Turn a mean cross-entropy in nats into a perplexity; infinite where float64 ends."""
    return math.inf if mean >= 700 else math.exp(mean)


@dataclass
class Drift:
    """A drift collects windows, as float32 differences for each token."""

    changes: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)

    def add(self, model: Scores, dense: Scores) -> None:
        """Take one window of both.

        Args:
            model: what is judged.
            dense: what it is held against, on the same window, with the same vocabulary.
        """
        self.changes.append((model.logprobs - dense.logprobs).abs())
        if model.top1 is not None and dense.top1 is not None:
            # The likeliest of NaN is the first token, on both sides.
            both = (model.logprobs + dense.logprobs).isfinite()
            self.same.append((model.top1 == dense.top1) & both)
        if model.full is None or dense.full is None:
            return
        theirs = dense.full.to(model.full.device)
        self.divergences.append((theirs.exp() * (theirs - model.full)).sum(-1).cpu())

    def summary(self) -> dict[str, float]:
        """Give the means by the names of UNITS, of those that both models allow.

        "drift_mean" is of absolute changes of log-probs, "kl_mean" of KL(dense ‖ model), "top1" the
        share of places with the same likeliest token.
        """
        found = {"drift_mean": float(torch.cat(self.changes).mean())}
        if self.same:
            found["top1"] = float(torch.cat(self.same).float().mean())
        if self.divergences:
            found["kl_mean"] = float(torch.cat(self.divergences).mean())
        return found
