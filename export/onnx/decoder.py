"""Run an exported folder in onnxruntime-genai, one sequence at a time.

`gblm eval` and the validation of exports use it; run as a program it is a loop of `gblm bench`.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gblm.bench.loop import Decoder, serve
from gblm.errors import CheckpointError, MachineError, UsageError
from gblm.export.onnx.runtime import (
    CONFIG_FILE,
    LIBRARY_FILE,
    MODEL_FILE,
    check_installation,
    library,
)
from gblm.files import read_json

CAPACITY = 2048
OPERATORS = "custom_ops_library"


class OnnxDecoder(Decoder):
    """Decodes one sequence, on the device that the folder was exported for."""

    def __init__(self, folder: Path, threads: int | None = None, capacity: int = CAPACITY) -> None:
        """Load the model.

        Args:
            folder: as `export_onnx` wrote it.
            threads: of one operator; None leaves it to ONNX Runtime.
            capacity: tokens that the cache holds, if the model knows so many positions.

        Raises:
            CheckpointError: a file is missing or damaged, or the folder names code to be loaded.
            MachineError: a package is missing, or the device is not there.
        """
        check_installation()
        if not (folder / MODEL_FILE).is_file():
            raise CheckpointError(
                f"{folder / MODEL_FILE} is missing: export the model with `gblm export onnx`."
            )
        about = read_json(folder / CONFIG_FILE)
        self.device = _device(folder, about)
        self.capacity = min(capacity, int(about["model"]["context_length"]))
        self._vocabulary = int(about["model"]["vocab_size"])
        options = {} if threads is None else {"intra_op_num_threads": threads}
        self._generator = self._load(folder, options)

    def _load(self, folder: Path, options: dict[str, int]) -> Any:
        import onnxruntime_genai as genai

        no_device = (
            f"{folder} was exported for CUDA, and no CUDA device can be used here: export it with "
            "--target cpu."
        )
        if self.device == "cuda" and not genai.is_cuda_available():
            raise MachineError(no_device)
        try:
            config = genai.Config(str(folder))
            config.clear_providers()
            if self.device == "cuda":
                config.append_provider("cuda")
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            model = genai.Model(config)
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=self.capacity)
            return genai.Generator(model, parameters)
        except Exception as error:
            # A build for CUDA finds out only now that there is no driver.
            if self.device == "cuda" and "Cuda interface not available" in str(error):
                raise MachineError(f"{no_device} ({error})") from error
            raise CheckpointError(f"{folder}: ONNX Runtime cannot load it: {error}") from error

    @property
    def vocabulary(self) -> int:
        """Count the tokens that the model knows."""
        return self._vocabulary

    @property
    def dtype(self) -> str:
        """Name the dtype of logits; this runs a token and forgets all."""
        self._append([0])
        kind = str(self._generator.get_output("logits").dtype)
        self.reset()
        return kind

    def reset(self) -> None:
        """Forget all tokens."""
        self._generator.rewind_to(0)

    def run(self, tokens: Sequence[int]) -> int:
        """Append tokens; gives the most likely next one."""
        self._append(tokens)
        return int(self._generator.get_logits().argmax())

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [new] int64; gives logits [new, vocabulary] float32."""
        self._append(tokens.tolist())
        logits = self._generator.get_output("logits")[0]
        return torch.from_numpy(logits.astype(np.float32))

    def _append(self, tokens: Sequence[int]) -> None:
        length = int(self._generator.token_count())
        if not tokens or length + len(tokens) > self.capacity:
            raise UsageError(
                f"{len(tokens)} tokens after {length}: 1 to {self.capacity - length} fit."
            )
        self._generator.append_tokens(list(tokens))


def _device(folder: Path, about: dict[str, Any]) -> str:
    """Check what genai_config.json asks for; give the device: "cpu" or "cuda".

    A folder's library of operators is code; it is loaded only if it is that of the installed gblm.
    """
    path = folder / CONFIG_FILE
    try:
        given = dict(about["model"]["decoder"]["session_options"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes no decoder.") from error
    named = given.get(OPERATORS)
    if named not in (None, LIBRARY_FILE) or json.dumps(about).count(OPERATORS) > bool(named):
        raise CheckpointError(f"{path} names code that no export of gblm needs.")
    own = folder / LIBRARY_FILE
    if named and not (own.is_file() and filecmp.cmp(own, library(), shallow=False)):
        raise CheckpointError(
            f"{own} is not the library of the installed gblm, and other code is not loaded: copy "
            f"{library()} there, or export the model again."
        )
    return "cuda" if "cuda" in json.dumps(given.get("provider_options", [])) else "cpu"


if __name__ == "__main__":
    serve(lambda folder, settings: OnnxDecoder(folder, settings["threads"], settings["context"]))
