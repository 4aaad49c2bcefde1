"""Perplexity over non-overlapping windows, as GBLM-Pruner, Wanda and SparseGPT measure it.

exp of the mean over windows of the mean next-token cross-entropy; every window predicts
seq_len − 1 tokens (lib/eval.py of GBLM-Pruner). Figures compare only within one protocol line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gblm import data, packed
from gblm.folder import resolve
from gblm.model import load_tokenizer
from gblm.progress import Progress, no_progress

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
    """

    source: str = "pydoc"
    seq_len: int = 2048
    max_windows: int | None = None
    dtype: str = "auto"
    stride: int | None = None
    name: str = "own"

    def line(self, num_windows: int, dtype: torch.dtype | str, engine: str = "") -> str:
        """The whole protocol in one line, to stand beside every figure.

        Args:
            num_windows: that were measured.
            dtype: of the computation.
            engine: what computed it; hf and packed are both torch.
        """
        stride = self.stride or self.seq_len
        overlap = "no overlap" if stride == self.seq_len else f"stride {stride}"
        where = f", {TORCH.get(engine, engine)}" if engine else ""
        return (
            f"{self.text(num_windows)}, {overlap}, no special tokens, "
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
            tokenizer, self.seq_len, self.max_windows, self.stride,
        )  # fmt: skip


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Tensor, on_window: Callable[[], None] = lambda: None
) -> float:
    """Perplexity of a causal language model.

    Args:
        model: in eval mode.
        windows: token ids [num_windows, seq_len].
        on_window: called after each window.
    """
    device = next(model.parameters()).device
    total = 0.0
    for window in windows:
        ids = window.reshape(1, -1).to(device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(functional.cross_entropy(logits, ids[0, 1:]))
        on_window()
    return of_loss(total / len(windows))


def of_loss(mean: float) -> float:
    """The perplexity of a mean cross-entropy in nats; infinite where float64 ends."""
    return math.exp(mean) if mean < 700 else math.inf


def evaluate(
    model: str | Path,
    protocol: Protocol,
    baseline: str | Path | None = None,
    device: str = "cpu",
    backend: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Perplexity of a packed or dense folder, with its dense baseline beside it.

    Args:
        model: a folder or hub id.
        protocol: text, windows and dtype.
        baseline: the dense model to compare with.
        device: a torch device.
        backend: for packed weights; the best one if None. The result does not depend on it
            beyond rounding.
        progress: for progress bars.

    Returns:
        "protocol", "perplexity", and with a baseline "perplexity_baseline" and "ratio".
    """
    folder = resolve(model)
    windows = protocol.windows(load_tokenizer(folder))
    dtype = None if protocol.dtype == "auto" else getattr(torch, protocol.dtype)

    def measure(path: Path, label: str, chosen: str | None) -> tuple[float, torch.dtype]:
        step = progress(label, len(windows))
        loaded = packed.load_any(path, chosen, dtype, device)
        return perplexity(loaded, windows, step), next(loaded.parameters()).dtype

    value, used = measure(folder, "perplexity", backend)
    result: dict[str, Any] = {
        "model": str(model),
        "protocol": protocol.line(len(windows), used),
        "tokens_sha256": data.fingerprint(windows),
        "perplexity": value,
    }
    if baseline is not None:
        dense, _ = measure(resolve(baseline), "perplexity of the baseline", None)
        result |= {
            "baseline": str(baseline),
            "perplexity_baseline": dense,
            "ratio": value / dense,
        }
    return result
