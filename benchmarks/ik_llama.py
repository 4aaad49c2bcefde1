"""ik_llama.cpp as a rival: the loop that runs a GGUF file in it.

IK_LLAMA names the library that is built as rivals/ik_llama.cpp says; PYTHONPATH finds this module.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gblm.bench.loop import LOOPS, Decoder, serve

ENGINE = "ik_llama.cpp"
COMMIT = "8337e4cd3861406fc04e0854b1409cd1b027fbc9"
LOOPS[ENGINE] = "ik_llama"


class IkDecoder(Decoder):
    """This decoder runs a GGUF file, its tensors repacked as by `-rtr`, with flash attention."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._lib = ctypes.CDLL(os.environ["IK_LLAMA"])
        self._lib.ik_open.restype = ctypes.c_void_p
        found = self._lib.ik_open(os.fsencode(file), settings["threads"], settings["context"])
        if not found:
            raise OSError(f"{file}: {ENGINE} does not open it")
        self._model = ctypes.c_void_p(found)

    @property
    def vocabulary(self) -> int:
        """Count the tokens that the model knows."""
        return int(self._lib.ik_vocabulary(self._model))

    def reset(self) -> None:
        """Forget all tokens."""
        self._lib.ik_reset(self._model)

    def run(self, tokens: Sequence[int]) -> int:
        """Append tokens; gives the most likely next one."""
        count = len(tokens)
        found = int(self._lib.ik_run(self._model, (ctypes.c_int32 * count)(*tokens), count))
        if found < 0:
            raise RuntimeError(f"{ENGINE} does not decode {count} more tokens")
        return found


if __name__ == "__main__":
    serve(IkDecoder)
