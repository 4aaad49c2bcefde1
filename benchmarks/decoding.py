"""Tokens per second in vLLM: dense, our dense controls, sparse weights, vLLM's int8 and int4.

    python benchmarks/decoding.py [--shape tinyllama|smollm2] [--threads 1] [--compiled]
        [--rounds 5] [--only NAME …] [--llama-cpp PYTHON]

The 1.1B shape has random weights: speed does not depend on them. Every engine is a process of its
own; a few at a time stay loaded, always beside the baseline, so that one round runs each of them
once and what disturbs the machine disturbs all alike. Ratios are taken within a round; the record
holds their median and all rounds. With a Python that has llama-cpp-python, its BF16, Q8_0 and Q4_0
are rows, too. Writes benchmarks/results/decoding-[smollm2-]<threads>-<eager|compiled>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp_engine
import vllm_rivals
from memory import shape_folder
from pages import made_by

from gblm.checkpoint.inspect import inspect
from gblm.fetch import fetch
from gblm.folder import quant_method, read_config
from gblm.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = ("tinyllama", "smollm2")
BASELINE = "dense bf16 (vLLM)"
# Engines beside the baseline, as many as memory holds.
TOGETHER = {"tinyllama": 3, "smollm2": 7}
LLAMA_CPP = ("BF16", "Q8_0", "Q4_0")
PRUNE = "prune {model} --method magnitude --pattern {pattern} --values {values} --head {head}"
PACK = "export pack {model} --pattern dense --values {values} --head {head}"
LABELS = {
    "dense": "dense {}", "0.5": "{} 50 %", "2:4": "{} 2:4", "4:8": "{} 4:8", "8:16": "{} 8:16",
    "0.7": "{} 70 %",
}  # fmt: skip
VALUES = {"float": "bf16", "int8": "int8", "int4": "int4"}
# Name, command that makes the folder ("" for the model itself), pattern, values, head.
CASES = (
    (BASELINE, "", "", "", ""),
    *(
        (
            label.format(short),
            PACK if pattern == "dense" else PRUNE,
            pattern,
            values,
            "float" if values == "float" else "int8",
        )
        for values, short in VALUES.items()
        for pattern, label in LABELS.items()
    ),
)
# What one round measures: sequences, prompt tokens, new tokens.
WORK = {"decode 1": (1, 8, 32), "decode 8": (8, 8, 16), "prefill 512": (1, 512, 0)}


def model_folder(root: Path, shape: str) -> Path:
    """The dense model."""
    return fetch(shape) if shape == "smollm2" else shape_folder(root, shape)


def make_folders(root: Path, shape: str, only: list[str]) -> dict[str, Path]:
    """The model folders by name; those that exist are used again."""
    model = model_folder(root, shape)
    folders = {}
    for name, command, pattern, values, head in CASES:
        if only and name not in only and name != BASELINE:
            continue
        folder = root / f"{shape}-{pattern}-{values}-{head}" if command else model
        if not folder.exists():
            words = command.format(model=model, pattern=pattern, values=values, head=head).split()
            subprocess.run(
                [sys.executable, "-m", "gblm", *words, "--output", str(folder)], check=True
            )
        folders[name] = folder
    for kind in vllm_rivals.KINDS:
        folder = root / f"{shape}-{kind}"
        if not only or f"vLLM {kind}" in only:
            if not folder.exists():
                vllm_rivals.make_folder(model, kind, folder)
            folders[f"vLLM {kind}"] = folder
    return folders


def vllm_command(folder: Path, compiled: bool) -> list[str]:
    """Starts this file as a vLLM engine."""
    return [
        sys.executable, __file__, "--engine", str(folder), *(["--compiled"] if compiled else []),
    ]  # fmt: skip


def llama_cpp_commands(root: Path, shape: str, python: str, threads: int) -> dict[str, list[str]]:
    """Start llama.cpp engines, by the name of their row."""
    commands = {}
    for kind in LLAMA_CPP:
        path = root / f"{shape}-{kind}.gguf"
        if not path.exists():
            llama_cpp_engine.make_gguf(model_folder(root, shape), kind, path)
        commands[f"llama.cpp {kind}"] = [
            python, llama_cpp_engine.__file__, str(path), str(threads),
        ]  # fmt: skip
    return commands


class Engine:
    """An engine in a process that waits for work on its standard input."""

    def __init__(self, command: list[str], threads: int) -> None:
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment,
        )  # fmt: skip
        self.ask("ready")

    def ask(self, what: str) -> dict[str, Any]:
        """Have it do one piece of work."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the engine has no pipes")
        stdin.write(what + "\n")
        stdin.flush()
        for line in stdout:
            if line.startswith("ANSWER "):
                found: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return found
        raise SystemExit("an engine ended; run it alone to see why")

    @contextmanager
    def running(self) -> Iterator[Engine]:
        """Ends with the block."""
        try:
            yield self
        finally:
            self._process.kill()
            self._process.wait()


def serve_work(folder: str, compiled: bool) -> None:
    """The engine's process: answer each line of standard input."""
    import time

    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, max_model_len=1024, distributed_executor_backend="uni", dtype="bfloat16",
        enforce_eager=not compiled, enable_prefix_caching=False, max_num_seqs=8,
    )  # fmt: skip
    seed = 0

    def seconds(sequences: int, prompt: int, tokens: int) -> float:
        nonlocal seed
        seed += 1
        prompts = [
            {"prompt_token_ids": [(31 * i + 7 * j + seed) % 250 for j in range(prompt)]}
            for i in range(sequences)
        ]
        options = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        began = time.perf_counter()
        llm.generate(prompts, options, use_tqdm=False)
        return time.perf_counter() - began

    for line in sys.stdin:
        answer: dict[str, Any] = {}
        if len(line.split()) == 3:
            sequences, prompt, tokens = map(int, line.split())
            # One token costs the prompt; the others are decoding.
            first = seconds(sequences, prompt, 1)
            rest = seconds(sequences, prompt, 1 + tokens) - first if tokens else first
            answer = {"seconds": rest, "per_second": sequences * (tokens or prompt) / rest}
        print("ANSWER " + json.dumps(answer), flush=True)


def measure(engines: dict[str, Engine], rounds: int) -> dict[str, dict[str, Any]]:
    """Tokens per second of all engines, and ratios to the baseline within each round."""
    speeds: dict[str, dict[str, list[float]]] = {n: {w: [] for w in WORK} for n in engines}
    for index in range(rounds + 1):
        for work in WORK:
            for name, engine in engines.items():
                found = engine.ask(" ".join(map(str, WORK[work])))
                if index and found:  # the first round warms up
                    speeds[name][work].append(found["per_second"])
        print(f"round {index} of {rounds}", file=sys.stderr, flush=True)
    return {
        name: {
            work: {
                "tokens_per_second": statistics.median(values),
                "ratio": statistics.median(
                    mine / base for mine, base in zip(values, speeds[BASELINE][work], strict=True)
                ),
                "rounds": values,
            }
            for work, values in by_work.items()
            if values
        }
        for name, by_work in speeds.items()
    }


def measure_in_groups(
    commands: dict[str, list[str]], threads: int, rounds: int, together: int
) -> dict[str, Any]:
    """Few engines at a time, each time beside the baseline: all of them do not fit in memory."""
    rivals = [name for name in commands if name != BASELINE]
    cases: dict[str, Any] = {}
    for start in range(0, len(rivals), together):
        names = [BASELINE, *rivals[start : start + together]]
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(Engine(commands[name], threads).running())
                for name in names
            }
            cases = measure(engines, rounds) | cases
    return {name: cases[name] for name in commands}


def bits_per_weight(folder: Path) -> float:
    """Of the decoder layers' linears, as stored."""
    method = quant_method(read_config(folder))
    if method == "compressed-tensors":
        return vllm_rivals.BITS[folder.name.rpartition("-")[2]]
    if method is None:
        return 16.0  # the model itself
    groups = inspect(folder)["groups"]
    return 8 * sum(g["bytes"] for g in groups) / sum(g["weights"] for g in groups)


def llama_cpp_version(python: str | None) -> str | None:
    """Version of llama-cpp-python in another environment."""
    if python is None:
        return None
    code = "import llama_cpp; print(llama_cpp.__version__)"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Make the folders, start the engines, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="torch.compile, as vLLM's default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="names of cases besides the baseline")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-shapes")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="one that has llama-cpp-python")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.engine:
        serve_work(chosen.engine, chosen.compiled)
        return
    shape, threads = chosen.shape, chosen.threads
    origin = provenance()
    folders = make_folders(chosen.folder, shape, chosen.only)
    commands = {name: vllm_command(folder, chosen.compiled) for name, folder in folders.items()}
    if chosen.llama_cpp:
        commands |= llama_cpp_commands(chosen.folder, shape, chosen.llama_cpp, threads)
    load = os.getloadavg()[0]
    cases = measure_in_groups(commands, threads, chosen.rounds, TOGETHER[shape])
    for name, by_work in cases.items():
        shown = [
            f"{work}: {w['tokens_per_second']:.1f} ({w['ratio']:.2f}x)"
            for work, w in by_work.items()
        ]
        print(f"{name:18}", "  ".join(shown))
    record = {
        "kind": "decoding", "command": made_by(),
        "provenance": origin, "shape": shape, "threads": threads,
        "mode": "compiled" if chosen.compiled else "eager", "rounds": chosen.rounds,
        "load_average_at_start": load, "work": WORK, "baseline": BASELINE,
        "llama_cpp": llama_cpp_version(chosen.llama_cpp), "cases": cases,
        "bits_per_weight": {name: bits_per_weight(path) for name, path in folders.items()},
    }  # fmt: skip
    name = "" if shape == SHAPES[0] else f"{shape}-"
    path = RESULTS / f"decoding-{name}{threads}-{record['mode']}.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
