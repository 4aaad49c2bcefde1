"""The CPU kernels as different compilers make them: the same panels, in turn, in one process.

    python benchmarks/compilers.py [--compilers g++ clang++] [--rounds 5] [--shape 4096x4096]

The first compiler is the one compared with; CPU time of one thread. Writes
benchmarks/results/compilers.json and the tables. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tables
import torch
from older import spread
from pages import RESULTS, ROOT, made_by
from torch import Tensor

from gblm.bench.linears import Asked, last_level_cache, num_copies, sparse_weight
from gblm.kernels import BACKENDS, native
from gblm.provenance import provenance
from gblm.sparse.formats import Format

RECORD = RESULTS / "compilers.json"
FORMATS = ("dense/dense", "bitmask/0.5", "nm/2:4", "bitmask/0.8", "dense/dense/int8:128",
           "bitmask/0.5/int8:128", "nm/2:4/int8:128", "dense/dense/int4:128",
           "bitmask/0.5/int4:128", "nm/2:4/int4:128")  # fmt: skip
# Instruction set → numbers of tokens.
CASES = {"amx": (1, 4, 16, 256), "avx512": (1, 4, 16, 256), "avx2": (1, 16), "portable": (1,)}


def build(compiler: str, folder: Path) -> ctypes.CDLL:
    """The library, built as an installation builds it."""
    c_compiler = compiler.replace("clang++", "clang").replace("g++", "gcc")
    command = [sys.executable, "setup.py", "--quiet", "build_ext",
               "--build-lib", str(folder), "--build-temp", str(folder / "temp")]  # fmt: skip
    environment = os.environ | {"CC": c_compiler, "CXX": compiler}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)
    library = ctypes.CDLL(str(next(folder.rglob("_cpu.so"))))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.gblm_linear.argtypes = [pointer, number, pointer, number, pointer, pointer]
    library.gblm_compiler.restype = ctypes.c_char_p
    return library


def panels(text: str, shape: tuple[int, int]) -> tuple[Format, list[Tensor]]:
    """A format and enough copies of its panels that no cache holds them."""
    asked = Asked(text)
    fmt = asked.settle(shape[1])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = fmt.pack("weight", sparse_weight(fmt, weight))
    first = BACKENDS["cpu"].prepare(fmt, parts, shape, torch.bfloat16)[0]
    count = num_copies(first.numel(), 2 * last_level_cache())
    return fmt, [first, *(native.allocate(first.numel()).copy_(first) for _ in range(count - 1))]


def measure(
    libraries: dict[str, ctypes.CDLL], copies: list[Tensor], x: Tensor, rows: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each compiler's calls: the median of each round."""
    y = torch.empty(x.shape[0], rows, dtype=torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in libraries}
    for _ in range(rounds + 1):
        for name, library in libraries.items():
            calls = []
            for copy in copies[: max(2, len(copies) // x.shape[0])]:
                began = time.thread_time()
                failed = library.gblm_linear(
                    copy.data_ptr(), copy.numel(), x.data_ptr(), x.shape[0], y.data_ptr(), None
                )
                calls.append(time.thread_time() - began)
                if failed:
                    raise RuntimeError(f"{name}: gblm_linear returned {failed}")
            times[name].append(statistics.median(calls))
    return {name: own[1:] for name, own in times.items()}  # the first round warms up


def rows_of(
    libraries: dict[str, ctypes.CDLL], text: str, shape: tuple[int, int], rounds: int
) -> list[dict[str, Any]]:
    """Every instruction set and number of tokens with one format."""
    fmt, copies = panels(text, shape)
    baseline = next(iter(libraries))
    rows = []
    for isa, counts in CASES.items():
        if any(library.gblm_use_isa(isa.encode()) for library in libraries.values()):
            continue  # this CPU has no such instructions
        for tokens in counts:
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(tokens, shape[1], generator=generator).bfloat16()
            times = measure(libraries, copies, x, shape[0], rounds)
            row: dict[str, Any] = {"format": fmt.spec, "isa": isa, "tokens": tokens}
            for name in libraries:
                pairs = zip(times[baseline], times[name], strict=True)
                row[name] = {
                    "us": spread(tuple(1e6 * seconds for seconds in times[name])),
                    f"faster than {baseline}": spread(tuple(a / b for a, b in pairs)),
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Build, measure, record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--compilers", nargs="+", default=["g++", "clang++"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="4096x4096")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, columns = map(int, given.shape.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        libraries = {name: build(name, Path(folder) / name) for name in given.compilers}
        versions = {name: lib.gblm_compiler().decode() for name, lib in libraries.items()}
        found = [
            row
            for text in FORMATS
            for row in rows_of(libraries, text, (rows, columns), given.rounds)
        ]
    record = {
        "kind": "compilers", "command": made_by(),
        "provenance": provenance(), "compilers": versions,
        "shape": [rows, columns], "rounds": given.rounds, "rows": found,
    }  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    tables.main()


if __name__ == "__main__":
    main()
