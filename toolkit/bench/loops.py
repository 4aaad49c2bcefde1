"""Engines that run inside a process of their own, which `gblm.bench.loop` starts.

Nothing of an engine is imported before it is chosen: what others need would count in its memory.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gblm.bench.loop import Decoder, Engine, request_of, serve
from gblm.bench.requests import Request
from gblm.bench.sides import bound_to
from gblm.errors import MachineError


class HfDecoder(Decoder):
    """This decoder runs transformers, in the checkpoint's dtype, on CPU, with the model's cache."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import torch

        from gblm import packed

        if settings["threads"] is not None:
            torch.set_num_threads(settings["threads"])
        torch.set_grad_enabled(False)
        self._torch: Any = torch
        self._model: Any = packed.load_any(folder, settings["backend"], None, "cpu")
        self.reset()

    @property
    def vocabulary(self) -> int:
        """Count the tokens that the model knows."""
        return int(self._model.config.get_text_config().vocab_size)

    def reset(self) -> None:
        """Forget all tokens."""
        self._cache: Any = None

    def run(self, tokens: Sequence[int]) -> int:
        """Append tokens; gives the most likely next one."""
        ids = self._torch.tensor([list(tokens)])
        out = self._model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


class LlamaDecoder(Decoder):
    """This decoder runs a GGUF file in llama.cpp.

    It needs llama-cpp-python, built for the machine: CMAKE_ARGS=-DGGML_NATIVE=ON.
    """

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


class VllmEngine(Engine):
    """This engine is vLLM's, without a prefix cache; on CPU it is bound to the first cores."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ |= bound_to(settings["threads"])
        if settings["backend"] is not None:
            from gblm.kernels import BACKEND_VARIABLE

            os.environ[BACKEND_VARIABLE] = settings["backend"]
        from vllm.engine.arg_utils import EngineArgs
        from vllm.sampling_params import SamplingParams
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.llm_engine import LLMEngine

        words = ["--model", str(folder), "--max-model-len", str(settings["context"]),
                 "--max-num-seqs", str(settings["sequences"]), "--no-enable-prefix-caching",
                 *settings["options"]]  # fmt: skip
        parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)
        self._engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parsed))
        self._sampling, self._names = SamplingParams, itertools.count()

    @property
    def vocabulary(self) -> int:
        """Count the tokens that the model knows."""
        return int(self._engine.model_config.get_vocab_size())

    def generate(
        self, prompts: Sequence[Sequence[int]], output_len: int, concurrency: int
    ) -> list[Request]:
        """Keep so many requests running until every prompt is done."""
        waiting, clock = list(prompts), time.perf_counter()
        began: dict[str, tuple[float, int]] = {}
        times: dict[str, list[float]] = {}
        unfinished: set[str] = set()
        while waiting or unfinished:
            while waiting and len(unfinished) < concurrency:
                name, prompt = str(next(self._names)), waiting.pop(0)
                began[name], times[name] = (time.perf_counter(), len(prompt)), []
                unfinished.add(name)
                options = self._sampling(max_tokens=output_len, temperature=0, ignore_eos=True)
                self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, options)
            for output in self._engine.step():
                now, own = time.perf_counter(), times[output.request_id]
                own += [now] * (len(output.outputs[0].token_ids) - len(own))
                if output.finished:
                    unfinished.discard(output.request_id)
        return [request_of(*began[name], times[name], clock) for name in began]


ENGINES: dict[str, Callable[[Path, dict[str, Any]], Engine]] = {
    "transformers": HfDecoder, "llama.cpp": LlamaDecoder, "vllm-offline": VllmEngine,
}  # fmt: skip

if __name__ == "__main__":
    serve(lambda path, settings: ENGINES[settings["engine"]](path, settings))
