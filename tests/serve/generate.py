"""Run by the plugin's tests in a process of its own: greedy tokens of a model folder as JSON."""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, settings = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(folder, max_model_len=256, distributed_executor_backend="uni", **settings)
    prompts = [{"prompt_token_ids": [(7 * i + j) % 250 for j in range(5 + i)]} for i in range(8)]
    options = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=0)
    for done in llm.generate(prompts, options):
        out = done.outputs[0]
        chosen = [
            step[token].logprob for step, token in zip(out.logprobs, out.token_ids, strict=True)
        ]
        print(
            "TOKENS " + json.dumps({"tokens": list(out.token_ids), "logprobs": chosen}), flush=True
        )


if __name__ == "__main__":
    main()
