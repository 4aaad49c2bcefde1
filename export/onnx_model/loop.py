"""The loop over an exported folder in ONNX Runtime: `python -m` of gblm.bench.loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gblm.bench.loop import Decoder, serve
from gblm.errors import InputError
from gblm.export.onnx_model.decoder import OrtDecoder
from gblm.export.onnx_model.runtime import REPORT_FILE
from gblm.files import read_json
from gblm.model.folder import ModelFolder


class OrtLoop(Decoder):
    """One sequence on CPU."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        report = folder / REPORT_FILE
        if report.is_file() and read_json(report).get("target") == "cuda":
            raise InputError(
                f"{folder} was exported for CUDA, and this times ONNX Runtime on CPU: export it "
                "with --target cpu."
            )
        self._decoder = OrtDecoder(folder, threads=settings["threads"])
        self._vocabulary = int(ModelFolder.open(folder).config["vocab_size"])

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        return self._vocabulary

    def reset(self) -> None:
        """Forget all tokens."""
        self._decoder.reset()

    def run(self, tokens: Sequence[int]) -> int:
        """Append tokens; gives the most likely next one."""
        return int(self._decoder.step(torch.tensor(tokens))[-1].argmax())


if __name__ == "__main__":
    serve(OrtLoop)
