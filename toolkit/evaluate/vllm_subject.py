"""A model in vLLM, in this process, scored by the log-probs of prompts.

vLLM gives those of the prompt's own tokens and of the likeliest ones, not of all tokens.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from gblm.evaluate.subjects import TOP, Scores, Subject
from gblm.serve.vllm_plugin.scoring import PromptScorer


class VllmSubject(Subject):
    """A dense or packed folder in vLLM's offline engine."""

    engine = "vllm"

    def __init__(self, folder: Path, dtype: str) -> None:
        self._scorer = PromptScorer(folder, dtype)
        self.dtype = self._scorer.dtype

    def score(self, window: Tensor) -> Scores:
        """Score a window [seq_len] int64."""
        return Scores.likeliest(*self._scorer.score(window.tolist(), TOP))

    def close(self) -> None:
        """End the engine."""
        self._scorer.close()
