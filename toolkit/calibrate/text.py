"""The text of a run: windows drawn from one source or several, each with its share.

A mix is written as "pydoc", "a.txt,b.jsonl" or "pydoc:1,self:2"; `self` is what the dense model
writes itself, see `gblm.calibrate.own_text`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm import data
from gblm.calibrate.own_text import own_text
from gblm.errors import UsageError
from gblm.recipe import Calibration

SELF = "self"


def parse_mix(text: str) -> dict[str, float]:
    """Return the share of each source of a mix; shares add up to 1.

    Raises:
        UsageError: a share is no positive number, or a source is named twice.
    """
    if Path(text).is_file():
        return {text: 1.0}
    shares: dict[str, float] = {}
    for one in text.split(","):
        source, _, share = one.rpartition(":")
        try:
            number = float(share) if source else 1.0
        except ValueError:
            source, number = "", 1.0
        source = source or one
        if not 0 < number < math.inf or source in shares or not source:
            raise UsageError(
                f"text {text!r}: write sources as 'pydoc', or as 'pydoc:1,self:2', each once."
            )
        shares[source] = number
    total = sum(shares.values())
    return {source: number / total for source, number in shares.items()}


def check_sources(sources: Iterable[str]) -> None:
    """Refuse sources that cannot be read, before anything is computed.

    Raises:
        GblmError: a source is unknown, missing or empty.
    """
    for source in sources:
        if source != SELF:
            data.read_documents(source, "held-out")


def count_windows(mix: str, num_samples: int) -> dict[str, int]:
    """Share windows among the sources of a mix; every source has at least one.

    Raises:
        UsageError: there are more sources than windows.
    """
    shares = parse_mix(mix)
    if len(shares) > num_samples:
        raise UsageError(
            f"text {mix!r}: {num_samples} windows cannot come from {len(shares)} sources."
        )
    counts, left, rest = {}, num_samples, 1.0
    for number, (source, share) in enumerate(shares.items()):
        others = len(shares) - number - 1
        count = left if not others else min(left - others, max(1, round(left * share / rest)))
        left, rest = left - count, rest - share
        counts[source] = count
    return counts


def draw(text: Calibration, folder: Path, tokenizer: Any) -> Tensor:
    """Draw the windows of a run.

    Args:
        text: says from what, how many, how long, and which.
        folder: of the dense model, which writes the source `self`.
        tokenizer: of the model.

    Returns:
        [num_samples, seq_len] int64, source after source; every source has at least one window.

    Raises:
        GblmError: a source cannot be read, or is too short; there are more sources than windows.
    """

    def of(source: str, count: int) -> Tensor:
        if source != SELF:
            documents = data.read_documents(source, "calibration")
            return data.calibration_windows(
                documents, tokenizer, count, text.seq_len, text.seed, text.bos
            )
        first = data.start_tokens(tokenizer) if text.bos else []
        length = text.seq_len - len(first)
        ids = torch.tensor(own_text(folder, tokenizer, count * length, text.seed))
        start = torch.tensor(first, dtype=torch.int64).expand(count, -1)
        return torch.cat([start, ids.view(count, length)], dim=1)

    counts = count_windows(text.source, text.num_samples)
    return torch.cat([of(source, count) for source, count in counts.items()])


def own_tokens(text: Calibration, tokenizer: Any) -> int:
    """Count the tokens of the model's own text that `draw` reads."""
    if SELF not in text.source:
        return 0  # and files of that name, which may be elsewhere by now, are not looked for
    count = count_windows(text.source, text.num_samples).get(SELF, 0)
    return count * (text.seq_len - len(data.start_tokens(tokenizer) if text.bos else []))
