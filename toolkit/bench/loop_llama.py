"""The loop over a GGUF file in llama.cpp: `python -m` of gblm.bench.loop.

Needs llama-cpp-python, built for the machine: CMAKE_ARGS=-DGGML_NATIVE=ON.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gblm.bench.loop import Decoder, serve
from gblm.errors import MachineError


class LlamaDecoder(Decoder):
    """This decoder runs one sequence."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise MachineError(
                "llama-cpp-python is not installed: pip install llama-cpp-python."
            ) from error
        threads = settings["threads"]
        self._llama = llama_cpp.Llama(
            str(file), n_ctx=settings["context"], n_batch=512, n_threads=threads,
            n_threads_batch=threads, verbose=False,
        )  # fmt: skip

    @property
    def vocabulary(self) -> int:
        """Count the tokens that the model knows."""
        return int(self._llama.n_vocab())

    def reset(self) -> None:
        """Forget all tokens."""
        self._llama.reset()

    def run(self, tokens: Sequence[int]) -> int:
        """Append tokens; gives the most likely next one."""
        self._llama.eval(list(tokens))
        return int(self._llama.scores[self._llama.n_tokens - 1].argmax())


if __name__ == "__main__":
    serve(LlamaDecoder)
