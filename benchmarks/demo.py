"""The whole road on a real model: fetch, prune and recover, inspect, evaluate, run in vLLM, ask.

Run by `make demo`; every step is a `gblm` command that is printed before it runs. Ends in a table,
in answers of the dense and of the sparse model, and in runs/demo/summary.json.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pages

from gblm.record import Record

RUN = Path("runs/demo")
MODEL, DENSE, SPARSE = (RUN / name for name in ("smollm2", "smollm2-int4", "smollm2-sparse"))
EVAL, BENCH, SUMMARY = RUN / "eval.json", RUN / "bench.json", RUN / "summary.json"
SIDES = {"dense bf16": MODEL, "dense int4": DENSE, "sparse int4": SPARSE}
# The default of `gblm prune`, on less text: of its own no more than the model writes in one go.
PRUNE = "--num-samples 14 --recover 8192"
# A text of a domain that no step has seen comes first; pydoc's is held out, but of a known one.
WINDOWS = "--seq-len 256 --max-windows 16 --backend dense"
PROMPT = 128
LOAD = f"--prompt-len {PROMPT} --output-len 24 --num-prompts 8 --concurrency 1,8 --rounds 3"
# Traced, but not compiled: as fast within 5 % (docs/log.md), and vLLM starts a minute sooner.
VLLM = "-cc.backend=eager --max-model-len 1024"
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Why do plants need light?",
)


def main() -> None:
    """Run every step, then print and write the summary."""
    began = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    # A small cache, so that memory shows the weights.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    gblm(f"fetch smollm2 --output {MODEL}")
    gblm(f"export pack {MODEL} --pattern dense --values int4 --head int4 --output {DENSE}")
    gblm(f"prune {MODEL} {PRUNE} --output {SPARSE}")
    gblm(f"inspect {SPARSE} --verify")
    texts = f"--text {pages.descriptions(RUN)} --text pydoc"
    gblm(f"eval {SPARSE} --baseline {MODEL} {texts} {WINDOWS} --output {EVAL}")
    # Without its HTTP server, vLLM starts and answers in half of the time.
    sides = " ".join(f"{folder.name}=vllm-offline:{folder}" for folder in SIDES.values())
    # Few machines of newcomers are quiet: noise is told in the notes, and hits all sides alike.
    gblm(f"bench {sides} {LOAD} --allow-noise --output {BENCH} -- {VLLM}", (0, 5))
    summary = summarise()
    print_table(summary)
    summary["answers"] = answers()
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{time.monotonic() - began:.0f} s; record: {SUMMARY}")


def gblm(arguments: str, allowed: tuple[int, ...] = (0,)) -> None:
    """Print and run one command; stop the demo when it fails."""
    print(f"\n$ gblm {arguments}", flush=True)
    done = subprocess.run([sys.executable, "-m", "gblm", *shlex.split(arguments)], check=False)
    if done.returncode not in allowed:
        sys.exit(done.returncode)


def summarise() -> dict[str, Any]:
    """Read the figures of the run from the records that the commands wrote."""
    recipe = json.loads((SPARSE / "recipe.json").read_text())
    report = json.loads((SPARSE / "sparsity_report.json").read_text())
    control = json.loads((DENSE / "sparsity_report.json").read_text())
    quality, bench = Record.read(EVAL), Record.read(BENCH)
    sizes = [report["bytes_dense"], control["bytes_packed"], report["bytes_packed"]]
    one, eight = bench.loads
    found = {
        "weights on disk, MB": {n: s / 1e6 for n, s in zip(SIDES, sizes, strict=True)},
        "memory when running, MB": _speeds(bench, one, "memory_mb"),
    }
    for text in quality.loads:
        name = text.split(",")[0]
        for metric, words in (("perplexity", "perplexity"), ("kl_mean", "KL, nats")):
            found[f"{words}, {name}"] = {
                "dense bf16": quality.value(quality.baseline or "", text, metric),
                "sparse int4": quality.value(_pruned(quality), text, metric),
            }
    prefill = _speeds(bench, one, "ttft_ms_p50")
    return {
        "model": "SmolLM2-135M-Instruct",
        "recipe": recipe,
        "recovered": report["recover"],
        "protocols": quality.loads,
        "table": found | {
            "1 stream, tok/s": _speeds(bench, one, "decode_tok_s"),
            "8 streams, tok/s": _speeds(bench, eight, "output_tok_s"),
            "prefill, tok/s": {n: v and 1e3 * PROMPT / v for n, v in prefill.items()},
        },
        "provenance": dict(bench.provenance),
    }  # fmt: skip


def _pruned(quality: Record) -> str:
    return next(name for name in quality.sides if name != quality.baseline)


def _speeds(bench: Record, load: str, metric: str) -> dict[str, float | None]:
    return {name: bench.value(folder.name, load, metric) for name, folder in SIDES.items()}


def answers() -> list[dict[str, str]]:
    """Ask the dense and the sparse model the same questions, greedily; print what they answer."""
    print("\nBoth models answer the same questions.", flush=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from gblm import packed

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    models = {
        "dense bf16": AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto"),
        "sparse int4": packed.load(SPARSE),
    }
    found = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        length = asked["input_ids"].shape[1]
        row = {"question": question}
        print(f"\n{question}", flush=True)
        for name, model in models.items():
            ids = model.generate(**asked, do_sample=False, max_new_tokens=48)[0, length:]
            row[name] = tokenizer.decode(ids, skip_special_tokens=True)
            shown = textwrap.fill(" ".join(row[name].split()), 84, subsequent_indent=" " * 14)
            print(f"  {name:<12}{shown}", flush=True)
        found.append(row)
    return found


def print_table(summary: dict[str, Any]) -> None:
    """Print the dense model, its integer controls and the sparse one side by side."""
    recipe = summary["recipe"]
    print(f"\n{summary['model']}: {recipe['method']}, recovered on {recipe['recover']['tokens']}")
    print(f"{'':32}" + "".join(f"{name:>12}" for name in SIDES))
    for label, values in summary["table"].items():
        digits = 2 if label.startswith("KL") else 1
        cells = (values.get(name) for name in SIDES)  # None: no figure that stands
        shown = ("–" if cell is None else f"{cell:.{digits}f}" for cell in cells)
        print(f"{label:32}" + "".join(f"{cell:>12}" for cell in shown))
    print("dense int4 is rounded to the nearest, as a control of speed; for its quality see README")
    for protocol in summary["protocols"]:
        print(f"perplexity, KL: {protocol}")


if __name__ == "__main__":
    main()
