"""Run by vllm_run.py: greedy tokens of model folders and the likeliest ones' log-probs as JSON.

One process serves one folder after the other: most of what a start of vLLM costs are its imports.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    jobs = json.loads(sys.argv[1])
    for number, job in enumerate(jobs):
        run(number, last=job is jobs[-1], **job)


def run(
    number: int, last: bool, folder: str, backend: str | None, settings: dict[str, Any]
) -> None:
    """Write a line for each prompt; then make room for the next engine."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ["GBLM_BACKEND"] = backend or ""
    settings = {"max_model_len": 256, "distributed_executor_backend": "uni"} | settings
    llm = LLM(folder, **settings)
    size = min(250, llm.llm_engine.model_config.get_vocab_size())
    prompts = [{"prompt_token_ids": [(7 * i + j) % size for j in range(5 + i)]} for i in range(8)]
    options = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=20)
    for done in llm.generate(prompts, options, use_tqdm=False):
        out = done.outputs[0]
        steps = [{token: one.logprob for token, one in step.items()} for step in out.logprobs]
        row = {"job": number, "tokens": list(out.token_ids), "steps": steps}
        print("TOKENS " + json.dumps(row), flush=True)
    if not last:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
