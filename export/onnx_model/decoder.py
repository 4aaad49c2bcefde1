"""A decoder in ONNX Runtime with its key-value cache, for validation and benchmarks.

Keys and values stay in ONNX Runtime. GroupQueryAttention writes them into one buffer that is input
and output at once, as onnxruntime-genai runs it; other graphs return longer ones at every step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gblm.errors import CheckpointError, UsageError
from gblm.export.onnx_model.runtime import CONFIG_FILE, CPU, open_session
from gblm.files import read_json

TOKEN_INPUTS = {"input_ids", "attention_mask", "position_ids"}
CAPACITY = 2048
# ONNX's numbers of what keys and values are made of.
ELEMENTS = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}


class OrtDecoder:
    """Decodes one sequence, batch 1.

    Attributes:
        session: the `onnxruntime.InferenceSession`.
        length: tokens that are in the cache.
        capacity: tokens that fit, where keys and values share one buffer.
    """

    def __init__(
        self,
        folder: Path,
        provider: str = CPU,
        threads: int | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        """Open the session.

        Raises:
            GblmError: see `open_session`; or the graph has other inputs than a decoder.
        """
        self.session = open_session(folder, provider, threads)
        self._inputs = {node.name: node for node in self.session.get_inputs()}
        self._outputs = [node.name for node in self.session.get_outputs()]
        self._past = [name for name in self._inputs if name.startswith("past_key_values.")]
        unknown = set(self._inputs) - TOKEN_INPUTS - set(self._past)
        if unknown or "input_ids" not in self._inputs or "logits" not in self._outputs:
            odd = sorted(unknown)[0] if unknown else "input_ids or logits"
            raise CheckpointError(
                f"{folder}: the graph is no decoder as gblm or optimum exports it ({odd})."
            )
        about = read_json(folder / CONFIG_FILE)
        decoder = about["model"]["decoder"]
        self._heads, self._head_size = decoder["num_key_value_heads"], decoder["head_size"]
        shared = about["search"]["past_present_share_buffer"]
        self._context = int(about["model"]["context_length"])
        self.capacity = min(capacity, self._context) if shared else 0
        self._element = ELEMENTS[self._inputs[self._past[0]].type]
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        import onnxruntime

        self.length = 0
        shape = (1, self._heads, self.capacity, self._head_size)
        make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._cache = {name: make(shape, self._element, "cpu") for name in self._past}

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens.

        Args:
            tokens: [new] int64.

        Returns:
            Logits [new, vocabulary] float32.
        """
        self.run(tokens)
        return torch.from_numpy(self._logits.numpy().astype(np.float32, copy=False))[0]

    def run(self, tokens: Tensor) -> None:
        """Append tokens and leave the logits in ONNX Runtime, as a benchmark wants it."""
        new = tokens.numel()
        room = self.capacity or self._context
        if not new or self.length + new > room:
            raise UsageError(f"{new} tokens after {self.length}: 1 to {room - self.length} fit.")
        binding = self.session.io_binding()
        total = self.length + new
        fed = {
            "input_ids": tokens.reshape(1, new).numpy(),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(self.length, total, dtype=np.int64)[None],
        }
        for name, array in fed.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, array)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            past = name.replace("present", "past_key_values")
            if self.capacity and past in self._cache:
                binding.bind_ortvalue_output(name, self._cache[past])
            else:
                binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        values = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        self._logits = values["logits"]
        self._cache = {
            name: values[name.replace("past_key_values", "present")] for name in self._past
        }
        self.length = total


def greedy(decoder: OrtDecoder, prompt: Tensor, count: int) -> list[int]:
    """Give the tokens that follow a prompt [tokens] when the likeliest one is always taken."""
    decoder.reset()
    found: list[int] = []
    tokens = prompt
    for _ in range(count):
        found.append(int(decoder.step(tokens)[-1].argmax()))
        tokens = torch.tensor(found[-1:])
    return found
