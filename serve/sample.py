"""`python -m gblm.serve.sample MODEL LENGTH`: vLLM continues prompts, a line of JSON at a time."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

# For the cache of the sequences that run at a time, unless the user asks for more.
CACHE_GIB = "2"
# Tokens of a prompt beside those of a text that was written before.
TEMPLATE = 256


def main() -> None:
    """Say how long vLLM took to start, then answer each line of stdin by one on stdout.

    A line asks {"prompts", "seed", "ends"}; its answer is the token ids that follow each prompt.
    """
    began, model, length = time.monotonic(), sys.argv[1], int(sys.argv[2])
    # vLLM writes to stdout, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llm = _open(model, length)
    print(json.dumps({"seconds": round(time.monotonic() - began)}), file=answers, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        print(json.dumps(_continue(llm, length, **work)), file=answers, flush=True)


def _open(model: str, length: int) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from transformers import AutoConfig
    from vllm import LLM

    from gblm.model.folder import ModelFolder
    from gblm.model.loading import auto_dtype

    longest = AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings
    return LLM(
        model, max_model_len=min(longest, 2 * length + TEMPLATE), enforce_eager=True,
        distributed_executor_backend="uni", dtype=auto_dtype(ModelFolder.open(model)) or "auto",
    )  # fmt: skip


def _continue(
    llm: Any, length: int, prompts: list[list[int]], seed: int, ends: list[bool]
) -> list[list[int]]:
    """Draw up to `length` tokens behind each prompt, at temperature 1."""
    import torch
    from vllm import SamplingParams

    # Seeds of single requests would make vLLM sample them one by one.
    torch.manual_seed(seed)
    how = [
        SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=not end, detokenize=False)
        for end in ends
    ]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = llm.generate(asked, how, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


if __name__ == "__main__":
    main()
