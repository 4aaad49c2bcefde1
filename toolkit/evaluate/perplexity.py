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


@dataclass(frozen=True)
class Protocol:
    """How a perplexity is measured.

    Attributes:
        source: a text file or a name of `gblm.data.NAMED_SETS`, of which the held-out part is read.
        seq_len: tokens per window.
        max_windows: the first so many windows; all if None.
        dtype: of weights and activations; "auto" is the checkpoint's.
    """

    source: str = "pydoc"
    seq_len: int = 2048
    max_windows: int | None = None
    dtype: str = "auto"

    def line(self, num_windows: int, dtype: torch.dtype) -> str:
        """The whole protocol in one line, to stand beside every figure."""
        name = Path(self.source).name
        return (
            f"{name}, held-out text as one stream, {num_windows} windows × {self.seq_len} tokens, "
            f"no overlap, no special tokens, {str(dtype).removeprefix('torch.')}"
        )


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
    mean = total / len(windows)
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
    windows = data.evaluation_windows(
        data.read_documents(protocol.source, "held-out"),
        load_tokenizer(folder),
        protocol.seq_len,
        protocol.max_windows,
    )
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
