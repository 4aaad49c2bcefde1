"""Score texts with a folder in vLLM's offline engine, by the log-probs of prompts.

vLLM gives those of the prompt's own tokens and of the likeliest ones, not of all tokens.
"""

from __future__ import annotations

import gc
import os
from typing import Any

from torch import Tensor

from gblm.errors import InputError, MachineError
from gblm.evaluate.subjects import TOP, Scores, Subject
from gblm.model.folder import ModelFolder
from gblm.serve.vllm_cli import check_version

# For the cache of the one prompt that is scored at a time, unless the user asks for more.
CACHE_GIB = "1"


class VllmSubject(Subject):
    """The subject runs one engine in this process."""

    engine = "vllm"

    def __init__(self, folder: ModelFolder, dtype: str) -> None:
        """Start the engine.

        Raises:
            MachineError: vLLM is missing, or was never run with packed weights.
            InputError: vLLM cannot load the folder.
        """
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            from vllm import LLM
        except ImportError as error:
            raise MachineError(
                f"--engine vllm needs vLLM ({error}): pip install 'gblm-toolkit[cpu]', or [cuda]."
            ) from error
        check_version()
        try:
            # Cached prefixes give no log-probs, so each prompt is computed anew.
            self._llm: Any = LLM(
                str(folder), dtype=dtype, enforce_eager=True, enable_prefix_caching=False,
                distributed_executor_backend="uni",
            )  # fmt: skip
        except Exception as error:
            raise InputError(f"{folder} could not be loaded by vLLM: {error}") from error
        found = self._llm.llm_engine.model_config.dtype
        self.dtype = str(found).removeprefix("torch.")

    def score(self, window: Tensor) -> Scores:
        """Score a window [seq_len] int64 as a prompt, after which one token is generated."""
        from vllm import SamplingParams

        tokens: list[int] = window.tolist()
        options = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=TOP)
        (found,) = self._llm.generate([{"prompt_token_ids": tokens}], options, use_tqdm=False)
        own: list[float] = []
        best: list[dict[int, float]] = []
        for token, step in zip(tokens[1:], found.prompt_logprobs[1:], strict=True):
            own.append(step[token].logprob)
            ranked = sorted(step.items(), key=lambda pair: int(pair[1].rank))[:TOP]
            best.append({number: one.logprob for number, one in ranked})
        return Scores.likeliest(own, best)

    def close(self) -> None:
        """End the engine and give back its memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()
