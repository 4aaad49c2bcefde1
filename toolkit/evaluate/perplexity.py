"""Perplexity over non-overlapping windows, as GBLM-Pruner, Wanda and SparseGPT measure it.

exp of the mean over windows of the mean next-token cross-entropy; every window predicts
seq_len − 1 tokens (lib/eval.py of GBLM-Pruner). Figures compare only within one protocol line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm import data
from gblm.evaluate.subjects import TorchSubject

# The papers' windows; `own` takes what is asked for.
SEQ_LENS = {"gblm": 2048, "wanda": 4096}
TORCH = {"hf": "torch", "packed": "torch"}


@dataclass(frozen=True)
class Protocol:
    """How a perplexity is measured.

    Attributes:
        source: a text file or a name of `gblm.data.NAMED_SETS`, of which the held-out part is read.
        seq_len: tokens per window.
        max_windows: the first so many windows; all if None.
        dtype: of weights and activations; "auto" is the checkpoint's.
        stride: tokens between the starts of two windows, of which only the last so many of a later
            window count; `seq_len`, no overlap, if None.
        name: "gblm", "wanda" or "own".
        bos: windows begin with what the tokenizer puts before a prompt, as a server's prompts do;
            the papers' code leaves it out.
    """

    source: str = "pydoc"
    seq_len: int = 2048
    max_windows: int | None = None
    dtype: str = "auto"
    stride: int | None = None
    name: str = "own"
    bos: bool = True

    def line(self, num_windows: int, dtype: torch.dtype | str, engine: str = "") -> str:
        """The whole protocol in one line, to stand beside every figure.

        Args:
            num_windows: that were measured.
            dtype: of the computation.
            engine: what computed it; hf and packed are both torch.
        """
        stride = self.stride or self.seq_len
        overlap = "no overlap" if stride == self.seq_len else f"stride {stride}"
        start = "start tokens of the tokenizer" if self.bos else "no special tokens"
        where = f", {TORCH.get(engine, engine)}" if engine else ""
        return (
            f"{self.text(num_windows)}, {overlap}, {start}, "
            f"{str(dtype).removeprefix('torch.')}{where}"
        )

    def text(self, num_windows: int) -> str:
        """Which text is measured, and in how large pieces."""
        name = "" if self.name == "own" else f"protocol {self.name}: "
        part = "test split" if self.source == "wikitext2" else "held-out text"
        return (
            f"{name}{Path(self.source).name}, {part} as one stream, "
            f"{num_windows} windows × {self.seq_len} tokens"
        )

    def windows(self, tokenizer: Any) -> Tensor:
        """The text as token ids [num_windows, seq_len] int64."""
        return data.evaluation_windows(
            data.read_documents(self.source, "held-out"),
            tokenizer, self.seq_len, self.max_windows, self.stride, self.bos,
        )  # fmt: skip


def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Perplexity of a loaded causal language model.

    Args:
        model: in eval mode.
        windows: token ids [num_windows, seq_len] int64.
    """
    logprobs = TorchSubject(model).logprobs(windows)
    return of_loss(-float(logprobs.double().mean()))


def of_loss(mean: float) -> float:
    """The perplexity of a mean cross-entropy in nats; infinite where float64 ends."""
    return math.exp(mean) if mean < 700 else math.inf
