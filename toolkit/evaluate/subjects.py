"""Models to be evaluated, through one interface whatever runs them.

A subject scores windows of tokens. It knows nothing of texts, metrics or tasks. Engines that need
other parts of the package are named here and imported when they are chosen.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gblm import packed
from gblm.errors import InputError, UsageError
from gblm.model.folder import ModelFolder

ONNX_MODEL, ONNX_REPORT = "model.onnx", "onnx_report.json"
# Of the likeliest tokens at each place where an engine does not give all: vLLM's own limit.
TOP = 20


@dataclass(frozen=True)
class Scores:
    """The scores are what a model says of one window of tokens; row i is about token i + 1.

    `logprobs` are of the window's own tokens [seq_len − 1] float32, `top1` the likeliest tokens
    [seq_len − 1] int64, `full` the log-probs of all [seq_len − 1, vocabulary] float32. Where an
    engine gives only some, they are in `some`: the likeliest tokens [seq_len − 1, k] int64, from
    the likeliest down, and their log-probs. What an engine does not tell is None.
    """

    logprobs: Tensor
    top1: Tensor | None = None
    full: Tensor | None = None
    some: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, logits: Tensor, window: Tensor) -> Scores:
        """Take logits [seq_len, vocabulary] of a window [seq_len]; `full` stays on their device."""
        full = logits[:-1].float().log_softmax(-1)
        own = full.gather(1, window[1:, None].to(full.device))[:, 0]
        return cls(own.cpu(), full.argmax(-1).cpu(), full)

    @classmethod
    def likeliest(cls, own: Sequence[float], best: Sequence[Mapping[int, float]]) -> Scores:
        """Take log-probs of the tokens and of as many likeliest ones at each place.

        Args:
            own: [seq_len − 1].
            best: token → log-prob, the likeliest first.

        Raises:
            InputError: there are not as many everywhere.
        """
        if len({len(row) for row in best}) != 1 or not best[0]:
            raise InputError("vLLM did not give as many likeliest tokens at every place.")
        tokens = torch.tensor([list(row) for row in best])
        logprobs = torch.tensor([list(row.values()) for row in best], dtype=torch.float32)
        return cls(torch.tensor(own, dtype=torch.float32), tokens[:, 0], None, (tokens, logprobs))


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

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Give back what it holds."""


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


@dataclass(frozen=True)
class Engine:
    """An engine runs folders of some kinds, which `folder_kind` names.

    `subject` is "module:class" of its Subject, which takes a folder and a dtype; None for torch.
    """

    kinds: tuple[str, ...]
    subject: str | None = None


ENGINES = {
    "hf": Engine(("hf",)),
    "packed": Engine(("packed",)),
    "vllm": Engine(("hf", "packed"), "gblm.serve.vllm_plugin.scoring:VllmSubject"),
    "onnx": Engine(("onnx",), "gblm.export.onnx.subject:OnnxSubject"),
}


def folder_kind(folder: ModelFolder) -> str:
    """Tell which kind a folder is of, which is its own engine too: "onnx", "packed" or "hf"."""
    if (folder.path / ONNX_MODEL).is_file():
        return "onnx"
    return "packed" if folder.kind == "packed" else "hf"


def open_subject(
    folder: ModelFolder,
    engine: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    backend: str | None = None,
) -> Subject:
    """Load a model.

    Args:
        folder: a dense, packed or exported folder.
        engine: a key of ENGINES; by the folder if None.
        dtype: "auto" is the checkpoint's.
        device: of hf and packed.
        backend: of packed weights in torch; the best one if None.

    Raises:
        UsageError: the engine is unknown, or cannot run this folder or take these options.
        GblmError: what loading raises.
    """
    kind = folder_kind(folder)
    engine = engine or kind
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r} is unknown: choose from {', '.join(ENGINES)}.")
    chosen = ENGINES[engine]
    if kind not in chosen.kinds:
        raise UsageError(
            f"--engine {engine} cannot run {folder}, a folder of kind {kind}; it runs "
            f"{' and '.join(chosen.kinds)}."
        )
    if chosen.subject is None:
        wanted = None if dtype == "auto" else getattr(torch, dtype)
        return TorchSubject(packed.load_any(folder, backend, wanted, device), engine)
    if device != "cpu" or backend:
        raise UsageError(f"--device and --backend do not go with --engine {engine}.")
    module, _, name = chosen.subject.partition(":")
    make: Any = getattr(importlib.import_module(module), name)
    subject: Subject = make(folder, dtype)
    return subject
