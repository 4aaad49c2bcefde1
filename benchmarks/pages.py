"""What the scripts share: records, tables of Markdown, origins, and gblm's commands."""

from __future__ import annotations

import importlib.resources
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gblm.record import Record, without_folders

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# How tables call the models.
MODELS = {
    "smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M", "tinyllama": "1.1B LLaMA shape",
    "llama2": "LLaMA-2-7B shape", "olmoe": "OLMoE shape, 3 of 16 layers",
    "olmoe7b": "OLMoE-1B-7B shape", "qwen3moe": "Qwen3-30B-A3B shape, 2 of 48 layers",
    "smollm2-experts": "SmolLM2-135M split into experts",
}  # fmt: skip

# By kind of record, the code that its figures are of: when it changes they are stale.
KERNELS = ("toolkit/kernels/csrc", "toolkit/kernels/native.py", "toolkit/kernels/cpu.py")
PRUNING = (
    "toolkit/calibrate",
    "toolkit/methods",
    "toolkit/prune/layer.py",
    "toolkit/sparse/values.py",
)
MEASURES = {
    "search": ("toolkit/search", *PRUNING),
    "decoding": (
        *KERNELS,
        "toolkit/kernels/experts.py",
        "serve/vllm_plugin/linear.py",
        "serve/vllm_plugin/head.py",
        "serve/vllm_plugin/experts.py",
    ),
    "experts": (*KERNELS, "toolkit/kernels/experts.py"),
    "kernels": KERNELS,
    "memory": ("toolkit/prune", *PRUNING),
    "onnx": (*KERNELS, "export/onnx"),
    "published code": PRUNING,
    # Its other modules open, check and write.
    "recovery": (
        *(f"toolkit/recover/{name}.py" for name in ("teacher", "texts", "train")),
        *PRUNING,
    ),
    "rivals": ("export/onnx", "benchmarks/llama_cpp_files.py"),
    "soak": ("serve",),
}


def save(record: Record, path: Path) -> None:
    """Write a record that says what code it measures, for tests/test_records.py."""
    measures = {"measures": list(MEASURES[record.kind])}
    replace(record, provenance={**record.provenance, **measures}).write(path)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def counted(number: int, what: str) -> str:
    """Say how many things there are: "1 token", "2 tokens"."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def perplexity(value: float) -> str:
    """Print a perplexity with the digits that mean something."""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def origin(record: Mapping[str, Any], *packages: str) -> str:
    """Name the machine, the versions and the commit of a record."""
    found = record["provenance"]
    commit, _, dirty = found["commit"].partition("-")
    versions = ", ".join(f"{p} {found['packages'][p]}" for p in packages)
    machine = found["machine"]
    cpu = ", ".join(machine[key] for key in ("cpu", "cpu_model") if key in machine)
    return (
        f"{cpu}, {machine['cores']} cores; Python {found['python']}, "
        f"{versions}; commit {commit[:12]}{dirty and f'-{dirty}'}."
    )


def origins(records: Iterable[Mapping[str, Any]], *packages: str) -> str:
    """Name machines and versions of records, or of sides that have their own, with all commits."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        where, _, commit = origin(record, *packages).partition("; commit ")
        found.setdefault(where, {})[commit.rstrip(".")] = None
    return " ".join(f"{where}; commit {', '.join(commits)}." for where, commits in found.items())


def made_by(folder: str = "benchmarks") -> str:
    """Write down the call of this script for its record; of absolute paths only the last part."""
    words = [f"{folder}/{Path(sys.argv[0]).name}", *map(without_folders, sys.argv[1:])]
    return shlex.join(["python", *words])


def descriptions(folder: Path) -> Path:
    """Write a text of its own domain, which every machine has that runs the tests, into a folder.

    It is what scikit-learn says of its data sets, 43 kB.
    """
    package = importlib.resources.files("sklearn.datasets") / "descr"
    rst = (file for file in package.iterdir() if file.name.endswith(".rst"))
    files = sorted(rst, key=lambda file: file.name)
    path = folder / "descriptions.txt"
    path.write_text("\n\n".join(file.read_text() for file in files))
    return path


def gblm(line: str) -> None:
    """Run a command of gblm in a process of its own."""
    subprocess.run([sys.executable, "-m", "gblm", *shlex.split(line)], check=True)


def alone(*words: str) -> Any:
    """Run Python in a fresh process with one thread, and read the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])
