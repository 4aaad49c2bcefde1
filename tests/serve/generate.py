"""Run by vllm_run.py: greedy tokens of a model folder and the likeliest ones' log-probs as JSON."""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, settings = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(folder, max_model_len=256, distributed_executor_backend="uni", **settings)
    prompts = [{"prompt_token_ids": [(7 * i + j) % 250 for j in range(5 + i)]} for i in range(8)]
    options = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=20)
    for done in llm.generate(prompts, options, use_tqdm=False):
        out = done.outputs[0]
        steps = [{token: one.logprob for token, one in step.items()} for step in out.logprobs]
        print("TOKENS " + json.dumps({"tokens": list(out.token_ids), "steps": steps}), flush=True)


if __name__ == "__main__":
    main()
