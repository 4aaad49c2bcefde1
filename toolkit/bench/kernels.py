"""Kernels against the memory limit, PyTorch and vLLM: interleaved rounds on weights out of memory.

With one thread times are CPU time of the thread, so that other processes count less; with more,
wall time. Statistics: paired.py; what is measured: linears.py.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from gblm.bench.linears import (
    Asked,
    Clock,
    Linear,
    check,
    last_level_cache,
    packed_linear,
    torch_linear,
)
from gblm.bench.rounds import BASELINES, add_shares, call_overhead, measure_case
from gblm.bench.vllm_linears import vllm_linears, vllm_operators
from gblm.errors import MachineError, UsageError
from gblm.formats import Shape
from gblm.kernels import native
from gblm.progress import Progress, no_progress
from gblm.provenance import machine, provenance

# [out, in] of the linears of one decoder layer, without repetitions.
SHAPE_SETS: dict[str, tuple[Shape, ...]] = {
    "llama-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama-1b": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "smollm2": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
}
FORMATS = (
    "dense/dense", "bitmask/0.5", "nm/2:4", "nm/4:8", "nm/8:16", "bitmask/0.7", "bitmask/0.8",
    "dense/dense/int8", "bitmask/0.5/int8", "nm/2:4/int8", "nm/4:8/int8", "nm/8:16/int8",
    "dense/dense/int4", "bitmask/0.5/int4", "nm/2:4/int4", "nm/4:8/int4", "nm/8:16/int4",
)  # fmt: skip
MIN_COLD, MIN_READ = 128 << 20, 1 << 20
OVERHEAD_SHAPE, OVERHEAD_FORMATS = (16, 32), ("dense/dense", "dense/dense/int8")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        shapes: [out, in] of the weights.
        tokens: rows of x.
        formats: specs; an integer type without a group size takes the one that `auto` means.
        backends: of gblm.
        threads: of PyTorch, which are those of every linear here.
        isa: instruction set of gblm's kernels; None: the best.
        rounds: in each, every linear runs for a short block, in alternating order.
        vllm: whether to measure vLLM's linears, if it is installed.
        cold: bytes of all copies of a weight; None: four times the last-level cache.
    """

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    formats: tuple[str, ...] = FORMATS
    backends: tuple[str, ...] = ("cpu",)
    threads: int = 1
    isa: str | None = None
    rounds: int = 7
    vllm: bool = True
    cold: int | None = None


def parse_shapes(words: Sequence[str]) -> tuple[Shape, ...]:
    """Read `OUTxIN` and names of SHAPE_SETS, each once.

    Raises:
        UsageError: a word is neither, or a side is not positive.
    """
    shapes: dict[Shape, None] = {}
    for word in words:
        match = re.fullmatch(r"(\d{1,7})x(\d{1,7})", word)
        if match and int(match[1]) and int(match[2]):
            shapes[int(match[1]), int(match[2])] = None
        elif word in SHAPE_SETS:
            shapes |= dict.fromkeys(SHAPE_SETS[word])
        else:
            raise UsageError(
                f"shape {word[:40]!r}: give OUTxIN, both positive, or {', '.join(SHAPE_SETS)}."
            )
    return tuple(shapes)


def bench_kernels(settings: Settings, progress: Progress = no_progress) -> dict[str, Any]:
    """Measure every shape × number of tokens × linear.

    Args:
        settings: what.
        progress: for a progress bar.

    Returns:
        The record: settings, machine, and per case the times and paired ratios of each linear;
        what `prepare` takes; what a call costs when there is nothing to multiply.

    Raises:
        UsageError: a format, shape or backend does not exist, or they do not fit each other.
        MachineError: the kernels are not built, the CPU lacks the instruction set, or memory.
    """
    if reason := native.refusal():
        raise MachineError(f"there are no CPU kernels to measure: {reason}.")
    wanted = _linears_wanted(settings)
    cold = max(MIN_COLD, 2 * last_level_cache()) if settings.cold is None else settings.cold
    _check_memory(settings, len(wanted) + len(BASELINES), cold)
    operators = vllm_operators() if settings.vllm else None
    clock = time.thread_time if settings.threads == 1 else time.perf_counter
    origin = provenance()
    with _threads_and_isa(settings):
        facts = _facts(clock, cold)
        found = _measure_all(settings, wanted, operators, cold, clock, progress)
    return {
        "kind": "bench kernels",
        "provenance": origin,
        "kernels": facts | {"load_average_after": os.getloadavg()[0]},
        "settings": asdict(settings),
        **found,
    }


def _measure_all(
    settings: Settings,
    wanted: Sequence[tuple[Asked, str]],
    operators: Any,
    cold: int,
    clock: Clock,
    progress: Progress,
) -> dict[str, Any]:
    """The measured part of the record."""
    memory = native.allocate(max(cold, MIN_READ)).fill_(1)
    cases: list[dict[str, Any]] = []
    prepare: list[dict[str, Any]] = []
    step = progress("measuring", len(settings.shapes) * len(settings.tokens))
    for shape in settings.shapes:
        linears = _build(shape, wanted, operators, cold, clock)
        prepare += [
            _prepare_row(linear, seconds, shape, settings.threads)
            for linear in linears
            if (seconds := linear.prepare_seconds) is not None
        ]
        for tokens in settings.tokens:
            cases.append(measure_case(linears, shape, tokens, settings.rounds, clock, memory))
            step()
    tiny = [(Asked(text), "cpu") for text in OVERHEAD_FORMATS]
    linears = _build(OVERHEAD_SHAPE, tiny, operators, 0, clock)
    return {
        "read_limit_gb_s": add_shares(cases),
        "cases": cases,
        "prepare": prepare,
        "overhead_us": call_overhead(linears, OVERHEAD_SHAPE[1], settings.rounds, clock),
    }


def _linears_wanted(settings: Settings) -> list[tuple[Asked, str]]:
    """Formats and backends without repetitions, dense controls included, all of them checked."""
    cores = machine()["cores"]
    if settings.threads > cores:
        raise UsageError(f"{settings.threads} threads: this process may use {cores} cores.")
    wanted: dict[tuple[str, str], Asked] = {}
    for backend in settings.backends:
        for asked in map(Asked, settings.formats):
            for each in (asked.control, asked):
                wanted.setdefault((each.text, backend), each)
    for (_, backend), asked in wanted.items():
        for shape in settings.shapes:
            check(asked, shape, backend)
    return [(asked, backend) for (_, backend), asked in wanted.items()]


def _check_memory(settings: Settings, linears: int, cold: int) -> None:
    """Refuse to start what would run out of memory; drawing a weight takes 20 bytes each."""
    largest = max(rows * columns for rows, columns in settings.shapes)
    activations = 8 * max(settings.tokens) * max(map(max, settings.shapes))
    needed = cold + linears * max(cold, 4 * largest) + 20 * largest + activations
    available = psutil.virtual_memory().available
    if needed > available:
        raise MachineError(
            f"measuring needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free: "
            "give fewer --formats or smaller --shapes."
        )


def _build(
    shape: Shape, wanted: Sequence[tuple[Asked, str]], operators: Any, cold: int, clock: Clock
) -> list[Linear]:
    """Every linear of one random weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    linears = [torch_linear(weight, cold)]
    if operators is not None:
        linears += vllm_linears(operators, weight, cold)
    return linears + [packed_linear(asked, to, weight, cold, clock) for asked, to in wanted]


def _prepare_row(linear: Linear, seconds: float, shape: Shape, threads: int) -> dict[str, Any]:
    """Speed of `prepare` in bytes of the dense bfloat16 weight, which users know the size of."""
    return {
        "linear": linear.name,
        "shape": list(shape),
        "seconds": seconds,
        "gb_s_per_core": 2 * shape[0] * shape[1] / seconds / threads / 1e9,
    }


@contextmanager
def _threads_and_isa(settings: Settings) -> Iterator[None]:
    """Set both, and set them back."""
    threads, isa = torch.get_num_threads(), native.instruction_set()
    try:
        native.use_instruction_set(settings.isa or isa)
    except native.KernelError as error:
        raise MachineError(str(error)) from error
    torch.set_num_threads(settings.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        native.use_instruction_set(isa)


def _facts(clock: Clock, cold: int) -> dict[str, Any]:
    """What decides about speed, besides the provenance."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "instruction_set": native.instruction_set(),
        "compiler": native.compiler(),
        "cpu_model": _cpu_model(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time of the thread" if clock is time.thread_time else "wall time",
        "cold_bytes": cold,
        "last_level_cache": last_level_cache(),
        "huge_pages": huge.read_text().strip() if huge.exists() else None,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average_before": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    """Family and model number: what virtual machines call their CPU says little."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    family, model = found.get("cpu family"), found.get("model")
    return f"family {family} model {model}" if family and model else platform.processor()
