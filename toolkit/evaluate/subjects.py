"""Models to be evaluated, through one interface whatever runs them: HF, packed, ONNX, vLLM.

A subject scores windows of tokens. It knows nothing of texts, metrics or tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gblm import packed
from gblm.errors import InputError, UsageError
from gblm.folder import read_json_object

ONNX_MODEL, ONNX_REPORT = "model.onnx", "onnx_report.json"
# Of the likeliest tokens at each place where an engine does not give all: vLLM's own limit.
TOP = 20


@dataclass(frozen=True)
class Scores:
    """What a model says of one window of `seq_len` tokens; row i is about token i + 1.

    Attributes:
        logprobs: of the window's own tokens [seq_len − 1] float32.
        top1: the likeliest tokens [seq_len − 1] int64.
        full: log-probs of all tokens [seq_len − 1, vocabulary] float32; None where the engine gives
            only some.
        some: those: the likeliest tokens [seq_len − 1, k] int64, from the likeliest down, and
            their log-probs [seq_len − 1, k] float32; None where `full` is there.
    """

    logprobs: Tensor
    top1: Tensor
    full: Tensor | None
    some: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, logits: Tensor, window: Tensor) -> Scores:
        """From logits [seq_len, vocabulary] of a window [seq_len]; `full` stays on their device."""
        full = logits[:-1].float().log_softmax(-1)
        own = full.gather(1, window[1:, None].to(full.device))[:, 0]
        return cls(own.cpu(), full.argmax(-1).cpu(), full)

    @classmethod
    def likeliest(cls, own: Sequence[float], best: Sequence[Mapping[int, float]]) -> Scores:
        """From log-probs of the tokens and of as many likeliest ones at each place.

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
    """A model that scores.

    Attributes:
        engine: a key of ENGINES.
        dtype: of the computation, by name.
    """

    engine: str
    dtype: str

    @abstractmethod
    def score(self, window: Tensor) -> Scores:
        """Score a window [seq_len] int64."""

    def logprobs(self, windows: Tensor) -> Tensor:
        """Log-probs of every token but the first.

        Args:
            windows: [num_windows, seq_len] int64.

        Returns:
            [num_windows, seq_len − 1] float32.
        """
        return torch.stack([self.score(window).logprobs for window in windows])

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Give back what it holds."""


class TorchSubject(Subject):
    """A transformers model, dense or packed.

    Attributes:
        model: the model itself, in eval mode.
    """

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
    """An exported folder in ONNX Runtime on CPU."""

    engine = "onnx"

    def __init__(self, folder: Path, dtype: str) -> None:
        from gblm.export.onnx_model.decoder import OrtDecoder

        _refuse_bfloat16(folder, dtype)
        self._decoder = OrtDecoder(folder)
        kinds = {node.name: node.type for node in self._decoder.session.get_outputs()}
        names = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16"}
        self.dtype = names[kinds["logits"][len("tensor(") : -1]]
        if dtype not in ("auto", self.dtype):
            raise UsageError(
                f"{folder}: the graph computes in {self.dtype}, not in --dtype {dtype}; export it "
                "again with another --precision."
            )

    def score(self, window: Tensor) -> Scores:
        """Score a window [seq_len] int64, from an empty cache."""
        self._decoder.reset()
        return Scores.of(self._decoder.step(window), window)


def _refuse_bfloat16(folder: Path, dtype: str) -> None:
    """Say what ONNX Runtime's own words on a missing MatMul do not."""
    report = folder / ONNX_REPORT
    precision = read_json_object(report).get("precision") if report.is_file() else None
    if "bfloat16" in (dtype, {"bf16": "bfloat16"}.get(str(precision))):
        raise UsageError(
            f"{folder}: --engine onnx runs on CPU, where ONNX Runtime has no MatMul for bfloat16: "
            "evaluate the folder that it was exported from, with --engine hf, packed or vllm."
        )


def detect(folder: Path) -> str:
    """The engine of a folder: "onnx", "packed" or "hf"."""
    if (folder / ONNX_MODEL).is_file():
        return "onnx"
    return "packed" if packed.is_packed(folder) else "hf"


def open_subject(
    folder: Path,
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
    kind = detect(folder)
    engine = engine or kind
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r} is unknown: choose from {', '.join(ENGINES)}.")
    if kind not in RUNS[engine]:
        raise UsageError(
            f"--engine {engine} cannot run {folder}, a folder of kind {kind}; it runs "
            f"{' and '.join(RUNS[engine])}."
        )
    if engine in ("onnx", "vllm") and (device != "cpu" or backend):
        raise UsageError(f"--device and --backend do not go with --engine {engine}.")
    return ENGINES[engine](folder, dtype, device, backend)


def _torch(engine: str) -> Callable[[Path, str, str, str | None], Subject]:
    def make(folder: Path, dtype: str, device: str, backend: str | None) -> Subject:
        wanted = None if dtype == "auto" else getattr(torch, dtype)
        return TorchSubject(packed.load_any(folder, backend, wanted, device), engine)

    return make


def _onnx(folder: Path, dtype: str, device: str, backend: str | None) -> Subject:
    return OnnxSubject(folder, dtype)


def _vllm(folder: Path, dtype: str, device: str, backend: str | None) -> Subject:
    from gblm.evaluate.vllm_subject import VllmSubject

    return VllmSubject(folder, dtype)


# Kinds of folders that an engine runs.
RUNS = {"hf": ("hf",), "packed": ("packed",), "onnx": ("onnx",), "vllm": ("hf", "packed")}
ENGINES: dict[str, Callable[[Path, str, str, str | None], Subject]] = {
    "hf": _torch("hf"),
    "packed": _torch("packed"),
    "vllm": _vllm,
    "onnx": _onnx,
}
