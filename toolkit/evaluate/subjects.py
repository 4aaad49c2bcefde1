"""Models to be evaluated, through one interface whatever runs them.

A subject scores windows of tokens. It knows nothing of texts, metrics or tasks. ONNX Runtime is
imported for exported folders alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gblm import packed
from gblm.errors import UsageError
from gblm.model.folder import ModelFolder
from gblm.model.loading import auto_dtype, check_device

ONNX_MODEL, ONNX_REPORT = "model.onnx", "onnx_report.json"


@dataclass(frozen=True)
class Scores:
    """The scores are what a model says of one window of tokens; row i is about token i + 1.

    `logprobs` are of the window's own tokens [seq_len − 1] float32, `top1` the likeliest tokens
    [seq_len − 1] int64, `full` the log-probs of all [seq_len − 1, vocabulary] float32. What a
    server does not tell is None.
    """

    logprobs: Tensor
    top1: Tensor | None = None
    full: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, window: Tensor) -> Scores:
        """Take logits [seq_len, vocabulary] of a window [seq_len]; `full` stays on their device."""
        full = logits[:-1].float().log_softmax(-1)
        own = full.gather(1, window[1:, None].to(full.device))[:, 0]
        return cls(own.cpu(), full.argmax(-1).cpu(), full)


class Subject(ABC):
    """A subject is a model that scores; it names its engine and the dtype of its computation.

    The folder is that of the model, if it is on this machine and someone has to know it.
    """

    engine: str
    dtype: str
    folder: ModelFolder | None = None

    @abstractmethod
    def score(self, window: Tensor) -> Scores:
        """Score a window [seq_len] int64."""


class TorchSubject(Subject):
    """This subject is a transformers model, dense or packed, in eval mode."""

    def __init__(self, model: nn.Module, engine: str = "hf") -> None:
        self.model = model
        self.engine = engine
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")

    @torch.no_grad()
    def score(self, window: Tensor) -> Scores:
        """Score a window [seq_len] int64."""
        ids = window.reshape(1, -1).to(next(self.model.parameters()).device)
        return Scores.of(self.model(input_ids=ids, use_cache=False).logits[0], window)


class OnnxSubject(Subject):
    """This subject is an exported graph in ONNX Runtime, in the precision of its export."""

    engine = "onnx"

    def __init__(self, folder: ModelFolder, dtype: str, seq_len: int) -> None:
        """Open the graph, with room for so many tokens, if the model knows so many.

        Raises:
            UsageError: another dtype than that of the graph was asked for.
        """
        from gblm.export.onnx.decoder import CAPACITY, OnnxDecoder

        decoder = OnnxDecoder(folder.path, capacity=max(CAPACITY, seq_len))
        self.folder, self._decoder = folder, decoder
        self.dtype = self._decoder.dtype
        if dtype not in ("auto", self.dtype):
            raise UsageError(
                f"{folder}: the graph computes in {self.dtype}, not in --dtype {dtype}; export it "
                "again with another --precision."
            )

    def score(self, window: Tensor) -> Scores:
        """Score a window [seq_len] int64, from an empty cache."""
        self._decoder.reset()
        return Scores.of(self._decoder.step(window), window)


def folder_kind(folder: ModelFolder) -> str:
    """Tell which kind a folder is of, which is its own engine too: "onnx", "packed" or "hf"."""
    if (folder.path / ONNX_MODEL).is_file():
        return "onnx"
    return "packed" if folder.kind == "packed" else "hf"


def open_subject(
    folder: ModelFolder,
    dtype: str = "auto",
    device: str = "cpu",
    backend: str | None = None,
    seq_len: int = 0,
) -> Subject:
    """Load a model into the engine that it was made for.

    Args:
        folder: a dense, packed or exported folder.
        dtype: see `gblm.model.loading.auto_dtype` for "auto".
        device: of dense and packed folders.
        backend: of packed weights; the best one if None.
        seq_len: the longest window that it will score.

    Raises:
        UsageError: the folder cannot take these options.
        GblmError: what loading raises.
    """
    kind = folder_kind(folder)
    if kind != "onnx":
        check_device(device)
        wanted = auto_dtype(folder, device) if dtype == "auto" else getattr(torch, dtype)
        return TorchSubject(packed.load_any(folder, backend, wanted, device), kind)
    if device != "cpu" or backend:
        raise UsageError("--device and --backend do not go with an exported folder.")
    return OnnxSubject(folder, dtype, seq_len)
