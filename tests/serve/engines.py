"""Run by vllm_run.py: engines of vLLM one after another in one process, and what each answers.

    python engines.py '[{"folder": …, "backend": …, "settings": {…}, "asks": […]}, …]'

One process, for importing vLLM takes longer than starting an engine of a tiny model. An engine that
does not start is told of in the log, and the next one is started. Where WORLD_SIZE says so this is
one of several ranks, which all start the same engines.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any

PROMPTS, TOKENS, SHARED = 8, 12, 40  # 40 tokens are more than a block of the cache
COUNTERS = ("vllm:prefix_cache_hits", "vllm:spec_decode_num_accepted_tokens")


def main() -> None:
    for number, engine in enumerate(json.loads(sys.argv[1])):
        print(f"\nENGINE {number}", flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            meeting = f"file://{os.environ['MEETING']}-{number}"
            engine["settings"]["distributed_executor_backend"] = one_of_many(meeting)
        os.environ.pop("GBLM_BACKEND", None)
        if engine["backend"]:
            os.environ["GBLM_BACKEND"] = engine["backend"]
        try:
            print("\nANSWER " + json.dumps(answer(engine)), flush=True)
        except Exception:
            traceback.print_exc()
        clean()


def clean() -> None:
    """Make room for the next engine, whether or not this one has started."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def answer(engine: dict[str, Any]) -> dict[str, Any]:
    """Rows of tokens and log-probs, for each time that the engine is asked; see `vllm_run.ASKS`."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    settings = {"max_model_len": 128, "disable_log_stats": False} | engine["settings"]
    llm = LLM(engine["folder"], **settings)
    adapter = engine.get("adapter")
    asked, found = LoRARequest("random", 1, adapter) if adapter else None, {}
    for ask in engine["asks"]:
        if ask == "awake":
            llm.sleep()
            llm.wake_up()
        make = prompt_rows if ask == "prompts" else rows
        found[ask] = make(llm, None if ask == "without" else asked)
    values = {one.name: one.value for one in llm.get_metrics() if one.name in COUNTERS}
    llm.llm_engine.engine_core.shutdown()
    return {"rows": found, "counters": values}


def one_of_many(meeting: str) -> type:
    """vLLM's executor for torchrun, which names its shared memory alike in all groups of a machine.

    Here after the file where the ranks of one engine meet.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    class OneOfMany(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            return meeting, int(os.environ["RANK"]), int(os.environ["RANK"])

    return OneOfMany


def prompts(llm: Any) -> list[dict[str, list[int]]]:
    """Two beginnings, each of them that of four prompts."""
    size = min(250, llm.llm_engine.model_config.get_vocab_size())
    return [
        {"prompt_token_ids": [(7 * (i % 2) + 3 * j) % size for j in range(SHARED)]
         + [(5 * i + j) % size for j in range(5 + i)]}
        for i in range(PROMPTS)
    ]  # fmt: skip


def rows(llm: Any, asked: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    options = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=20)
    found = llm.generate(prompts(llm), options, use_tqdm=False, lora_request=asked)
    return [row(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in found]


def prompt_rows(llm: Any, asked: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    options = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=20)
    found = llm.generate(prompts(llm), options, use_tqdm=False, lora_request=asked)
    return [row(one.prompt_token_ids[1:], one.prompt_logprobs[1:]) for one in found]


def row(tokens: Any, steps: Any) -> dict[str, Any]:
    dicts = [{token: one.logprob for token, one in step.items()} for step in steps]
    return {"tokens": list(tokens), "steps": dicts}


if __name__ == "__main__":
    main()
