"""Tokens per second in vLLM of one value type: dense, its sparse patterns, and rivals.

    python benchmarks/decoding.py --values int4 [--patterns dense 8:16 …]
        [--shape tinyllama|smollm2] [--threads 1] [--eager] [--rounds 7] [--llama-cpp PYTHON]

The 1.1B shape has random weights: speed does not depend on them. Every engine is a process of its
own; all of a table stay loaded, so that one round runs each of them once and what disturbs the
machine disturbs all alike. A round in which other processes took more than a tenth of the CPU, or
in which the hypervisor stole more than a fiftieth, is dropped and counted. The record holds all
rounds; the table divides its medians. With a Python that has llama-cpp-python, its file of the same
bits is a row. Writes benchmarks/results/decoding-<shape>-<values>-<threads>-<eager|compiled>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp_engine
import psutil
import vllm_rivals
from memory import shape_folder
from pages import made_by

from gblm.bench.noise import Limits, measured, reasons
from gblm.checkpoint.inspect import inspect
from gblm.fetch import fetch
from gblm.model.folder import ModelFolder, quant_method, read_config
from gblm.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = ("tinyllama", "smollm2")
BASELINE = "dense bf16 (vLLM)"
LLAMA_CPP = {"float": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
# vLLM's own integers, where they are at their best.
VLLM = {"int8": "W8A8"}
PRUNE = "prune {model} --method magnitude --pattern {pattern} --values {values} --head {head}"
PACK = "export pack {model} --pattern dense --values {values} --head {head}"
PATTERNS = ("dense", "2:4", "4:8", "8:16", "0.5")
LIMITS = Limits()
# What one round measures: sequences, prompt tokens, new tokens.
WORK = {"decode 1": (1, 8, 32), "decode 8": (8, 8, 16), "prefill 512": (1, 512, 0)}


def model_folder(root: Path, shape: str) -> Path:
    """The dense model."""
    return fetch(shape) if shape == "smollm2" else shape_folder(root, shape)


def make_folders(
    root: Path, shape: str, values: str, patterns: Sequence[str] = PATTERNS
) -> dict[str, Path]:
    """The model folders by the names of their rows; those that exist are used again."""
    model = model_folder(root, shape)
    folders = {BASELINE: model}
    head = "float" if values == "float" else "int8"
    for pattern in patterns:
        folder = root / f"{shape}-{pattern}-{values}-{head}"
        command = PACK if pattern == "dense" else PRUNE
        words = command.format(model=model, pattern=pattern, values=values, head=head).split()
        if not folder.exists():
            subprocess.run(
                [sys.executable, "-m", "gblm", *words, "--output", str(folder)], check=True
            )
        folders[row_name(pattern, values)] = folder
    if kind := VLLM.get(values):
        folder = root / f"{shape}-{kind}"
        if not folder.exists():
            vllm_rivals.make_folder(model, kind, folder)
        folders[f"{kind} (vLLM)"] = folder
    return folders


def row_name(pattern: str, values: str) -> str:
    """Such as "int4 8:16"; the dense control is "dense int4"."""
    short = "bf16" if values == "float" else values
    label = "50 %" if pattern == "0.5" else pattern
    return f"dense {short}" if pattern == "dense" else f"{short} {label}"


def vllm_command(folder: Path, compiled: bool) -> list[str]:
    """Starts this file as a vLLM engine."""
    return [
        sys.executable, __file__, "--engine", str(folder), *(["--compiled"] if compiled else []),
    ]  # fmt: skip


def llama_cpp_command(root: Path, shape: str, kind: str, python: str, threads: int) -> list[str]:
    """Starts a llama.cpp engine."""
    path = root / f"{shape}-{kind}.gguf"
    if not path.exists():
        llama_cpp_engine.make_gguf(model_folder(root, shape), kind, path)
    return [python, llama_cpp_engine.__file__, str(path), str(threads)]


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


def measure(engines: dict[str, Engine], rounds: int) -> dict[str, Any]:
    """Tokens per second of all engines, round after round, and the noise of each round."""
    speeds: dict[str, dict[str, list[float]]] = {n: {w: [] for w in WORK} for n in engines}
    noise, dropped = [], []
    for index in range(2 * rounds + 1):
        with measured(psutil.Process().children()) as heard:
            found = {
                (name, work): engine.ask(" ".join(map(str, shape)))
                for work, shape in WORK.items()
                for name, engine in engines.items()
            }
        quiet = not reasons(heard, LIMITS)
        if index:  # the first round warms up
            (noise if quiet else dropped).append(heard)
        if index and quiet:
            for (name, work), answer in found.items():
                if answer:
                    speeds[name][work].append(answer["per_second"])
        print(f"{len(noise)} rounds, {len(dropped)} dropped", file=sys.stderr, flush=True)
        if len(noise) == rounds:
            return {"cases": medians(speeds), "noise": noise, "dropped": dropped}
    raise SystemExit(f"only {len(noise)} of {2 * rounds} rounds were quiet: no figure stands")


def medians(speeds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """By engine and work: the median and all rounds."""
    return {
        name: {
            work: {"tokens_per_second": statistics.median(values), "rounds": values}
            for work, values in by_work.items()
            if values
        }
        for name, by_work in speeds.items()
    }


def bits_per_weight(folder: Path) -> float:
    """Of the decoder layers' linears, as stored."""
    method = quant_method(read_config(folder))
    if method == "compressed-tensors":
        return vllm_rivals.BITS[folder.name.rpartition("-")[2]]
    if method is None:
        return 16.0  # the model itself
    groups = inspect(ModelFolder.open(folder))["groups"]
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
    parser.add_argument("--values", choices=tuple(LLAMA_CPP), required=True)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS,
                        help="all engines have to find room in memory")  # fmt: skip
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-shapes")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="one that has llama-cpp-python")
    record(parser.parse_args(), provenance())


def record(chosen: argparse.Namespace, origin: dict[str, Any]) -> None:
    """Make the folders, start the engines, measure, write the record."""
    shape, values, threads = chosen.shape, chosen.values, chosen.threads
    folders = make_folders(chosen.folder, shape, values, chosen.patterns)
    commands = {name: vllm_command(path, not chosen.eager) for name, path in folders.items()}
    if chosen.llama_cpp:
        kind = LLAMA_CPP[values]
        commands[f"llama.cpp {kind}"] = llama_cpp_command(
            chosen.folder, shape, kind, chosen.llama_cpp, threads
        )
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(Engine(command, threads).running())
            for name, command in commands.items()
        }
        found = measure(engines, chosen.rounds)
    mode = "eager" if chosen.eager else "compiled"
    made = {
        "kind": "decoding", "command": made_by(), "provenance": origin, "shape": shape,
        "values": values, "threads": threads, "mode": mode, "work": WORK, "baseline": BASELINE,
        "control": row_name("dense", values), "llama_cpp": llama_cpp_version(chosen.llama_cpp),
        "bits_per_weight": {name: bits_per_weight(path) for name, path in folders.items()}, **found,
    }  # fmt: skip
    path = RESULTS / f"decoding-{shape}-{values}-{threads}-{mode}.json"
    path.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        serve_work(sys.argv[2], "--compiled" in sys.argv)
    else:
        main()
