"""`python -m gblm.serve.sample MODEL ASKED ANSWERED`: vLLM continues prompts at temperature 1."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# For the cache of the sequences that run at a time, unless the user asks for more.
CACHE_GIB = "2"


def main() -> None:
    """Read token ids from ASKED, write the tokens that follow each to ANSWERED."""
    model, asked, answered = sys.argv[1:]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    work = json.loads(Path(asked).read_text())
    length = max(map(len, work["prompts"])) + work["length"]
    llm = LLM(
        model, max_model_len=length, enforce_eager=True, distributed_executor_backend="uni",
        max_num_seqs=len(work["prompts"]), seed=work["seed"],
    )  # fmt: skip
    # Seeds of single requests would make vLLM sample them one by one.
    how = SamplingParams(
        temperature=1.0, max_tokens=work["length"], ignore_eos=not work["ends"], detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
    found = llm.generate(prompts, how, use_tqdm=False)
    rows = [list(one.outputs[0].token_ids) for one in found]
    Path(answered).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
