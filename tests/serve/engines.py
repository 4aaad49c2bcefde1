"""Run by vllm_run.py: engines of vLLM one after another in one process, and what each answers.

    python engines.py '[{"folder": …, "backend": …, "settings": {…}, "asks": […]}, …]'

One process, for importing vLLM takes longer than starting an engine of a tiny model. An engine that
does not start is told of in the log, and the next one is started. Where WORLD_SIZE says so this is
one of several ranks, which all start the same engines.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import traceback
from typing import Any

PROMPTS, TOKENS, SHARED = 8, 12, 40  # 40 tokens are more than a block of the cache
COUNTERS = (
    "vllm:prefix_cache_hits", "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
)  # fmt: skip


def main() -> None:
    register_kernels_once()
    leave_imports_alone()
    for number, engine in enumerate(json.loads(sys.argv[1])):
        print(f"\nENGINE {number}", flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            meet(f"file://{os.environ['MEETING']}-{number}")
            engine["settings"]["distributed_executor_backend"] = "external_launcher"
        os.environ.pop("GBLM_BACKEND", None)
        if engine["backend"]:
            os.environ["GBLM_BACKEND"] = engine["backend"]
        try:
            print("\nANSWER " + json.dumps(answer(engine)), flush=True)
        except Exception:
            traceback.print_exc()
        clean()


def register_kernels_once() -> None:
    """vLLM does so for each engine, which fails once an engine has imported numba."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    once = functools.cache(platform.register_triton_kernel_overrides)
    platform.register_triton_kernel_overrides = staticmethod(once)


def leave_imports_alone() -> None:
    """Keep all that is imported out of the garbage collector's way.

    vLLM calls it nine times for each engine, and gives all that was frozen back to it.
    """
    import vllm.entrypoints.llm

    assert vllm
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


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


def meet(place: str) -> None:
    """Let the ranks of an engine meet in a file of its own.

    vLLM names its shared memory after where they meet, alike for all groups of a machine.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    rank = int(os.environ["RANK"])
    ExecutorWithExternalLauncher._distributed_args = lambda _: (place, rank, rank)


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
