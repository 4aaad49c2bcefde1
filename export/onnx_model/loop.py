"""The decode loop over an exported folder in ONNX Runtime: `python -m` of gblm.bench.loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gblm.bench.loop import serve
from gblm.export.onnx_model.decoder import OrtDecoder
from gblm.folder import read_config


class OrtLoop:
    """One sequence on CPU."""

    def __init__(self, folder: Path, work: dict[str, Any]) -> None:
        self._decoder = OrtDecoder(folder, threads=work["threads"])
        self._vocabulary = int(read_config(folder)["vocab_size"])

    @property
    def vocabulary(self) -> int:
        """Number of tokens that it knows."""
        return self._vocabulary

    def reset(self) -> None:
        """Forget all tokens."""
        self._decoder.reset()

    def run(self, tokens: Sequence[int]) -> int:
        """Append tokens; returns the most likely next one."""
        return int(self._decoder.step(torch.tensor(tokens))[-1].argmax())


if __name__ == "__main__":
    serve(OrtLoop)
