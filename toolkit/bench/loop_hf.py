"""The loop over a model in transformers, packed or dense: `python -m` of gblm.bench.loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gblm import packed
from gblm.bench.loop import Decoder, serve


class HfDecoder(Decoder):
    """This decoder runs batch 1 with the model's own cache, in the checkpoint's dtype, on CPU."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        if settings["threads"] is not None:
            torch.set_num_threads(settings["threads"])
        self._model: Any = packed.load_any(folder, settings["backend"], None, "cpu")
        self.reset()

    @property
    def vocabulary(self) -> int:
        """Count the tokens that the model knows."""
        return int(self._model.config.vocab_size)

    def reset(self) -> None:
        """Forget all tokens."""
        self._cache: Any = None

    @torch.inference_mode()
    def run(self, tokens: Sequence[int]) -> int:
        """Append tokens; gives the most likely next one."""
        ids = torch.tensor([list(tokens)])
        out = self._model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


if __name__ == "__main__":
    serve(HfDecoder)
