"""Kernels against the memory limit, PyTorch and vLLM: interleaved rounds on weights out of memory.

With one thread times are CPU time of the thread, so that other processes count less; with more,
wall time. What is measured stands in linears.py.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from gblm.bench import noise
from gblm.bench.linears import (
    Asked,
    Clock,
    Linear,
    check,
    last_level_cache,
    packed_linear,
    torch_linear,
    vllm_linears,
    vllm_operators,
)
from gblm.errors import MachineError, UsageError
from gblm.kernels import native
from gblm.progress import Progress, no_progress
from gblm.provenance import machine, provenance
from gblm.record import Record, Row, Verdict
from gblm.sparse.formats import Shape

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
BASELINES = ("torch_bf16", "vllm_bf16", "vllm_w8a8")
# A block is the calls of one linear in one round.
BLOCK_SECONDS, MIN_CALLS, MAX_CALLS = 0.02, 3, 1000
READS, OVERHEAD_CALLS = 3, 500
CALL = "a call on 16x32"
OVERHEAD_SHAPE, OVERHEAD_FORMATS = (16, 32), ("dense/dense", "dense/dense/int8")


@dataclass(frozen=True)
class Settings:
    """The settings say what is measured.

    `shapes` are [out, in] of the weights, `tokens` the rows of x, `formats` specs, in which an
    integer type without a group size takes the one that `auto` means. PyTorch's `threads` are those
    of every linear here; an `isa` of None is the best one. In each round every linear runs for a
    short block. `cold` are the bytes of all copies of a weight; None: more than the caches hold.
    """

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    formats: tuple[str, ...] = FORMATS
    backends: tuple[str, ...] = ("cpu",)
    threads: int = 1
    isa: str | None = None
    rounds: int = 7
    vllm: bool = True
    limits: noise.Limits = field(default_factory=noise.Limits)
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


def bench_kernels(settings: Settings, progress: Progress = no_progress) -> Record:
    """Measure every shape × number of tokens × linear.

    Returns:
        The record. Its loads are "OUTxIN, N tokens"; its sides are linears, and "memory", whose
        read limit says what no linear can pass. "us" is the time of a call, "prepare_gb_s" how fast
        a weight gets its layout in memory, in bytes of bfloat16. On CALL a weight is so small that
        only the call itself counts.

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
    bench = _Bench(settings, wanted, operators, cold, clock)
    with _threads_and_isa(settings):
        facts = _facts(clock, cold)
        bench.run(progress)
    reasons = tuple(bench.reasons)
    return Record(
        kind="kernels",
        sides=bench.sides,
        rows=tuple(bench.rows),
        baseline="torch_bf16",
        verdict=Verdict(not reasons, reasons, tuple(bench.notes + noise.unchecked(bench.heard))),
        provenance=origin | {"settings": asdict(settings), **facts},
    )


@dataclass
class _Bench:
    """A run holds what is asked and what has been found so far."""

    settings: Settings
    wanted: Sequence[tuple[Asked, str]]
    operators: Any
    cold: int
    clock: Clock
    sides: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    heard: list[dict[str, Any]] = field(default_factory=list)

    def run(self, progress: Progress) -> None:
        """Measure all cases, then what a call costs."""
        memory = native.allocate(max(self.cold, MIN_READ)).fill_(1)
        step = progress("measuring", len(self.settings.shapes) * len(self.settings.tokens))
        for shape in self.settings.shapes:
            linears = _build(shape, self.wanted, self.operators, self.cold, self.clock)
            self._describe(linears, shape)
            for tokens in self.settings.tokens:
                self._case(linears, shape, tokens, memory)
                step()
        tiny = [(Asked(text), "cpu") for text in OVERHEAD_FORMATS]
        self._calls(_build(OVERHEAD_SHAPE, tiny, self.operators, 0, self.clock))

    def _describe(self, linears: Sequence[Linear], shape: Shape) -> None:
        size = name_of(shape)
        self.sides.setdefault("memory", {})
        for linear in linears:
            self.sides[linear.name] = {"backend": linear.backend, "spec": linear.spec,
                                       "control": linear.control}  # fmt: skip
            self._row(linear.name, size, "bytes", "bytes", [linear.size])
            bits = 8 * linear.size / (shape[0] * shape[1])
            self._row(linear.name, size, "bits_per_weight", "bits", [bits])
            if linear.prepare_seconds is not None:
                # Users know the size of the dense bfloat16 weight.
                speed = 2 * shape[0] * shape[1] / linear.prepare_seconds / 1e9
                self._row(linear.name, size, "prepare_gb_s", "GB/s", [speed])

    def _case(self, linears: Sequence[Linear], shape: Shape, tokens: int, memory: Tensor) -> None:
        """Run rounds of all linears and add rows; disturbed rounds are left out."""
        load = name_of(shape, tokens)
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
        times, heard = _rounds(linears, x, self.settings.rounds, self.clock, memory)
        self.heard += heard
        noisy = noise.noisy_rounds([{load: one} for one in heard], self.settings.limits)
        quiet = [number for number in range(len(heard)) if number not in noisy]
        self.notes += [f"round {number + 1} is left out: {why}." for number, why in noisy.items()]
        if 2 * len(quiet) < len(heard):
            first = next(iter(noisy.values()))
            self.reasons.append(f"only {len(quiet)} of {len(heard)} rounds were quiet; {first}")
            return
        reads = [heard[number]["read_limit_gb_s"] for number in quiet]
        self._row("memory", load, "read_limit_gb_s", "GB/s", reads)
        for linear in linears:
            seconds = [statistics.median(times[linear.name][number]) for number in quiet]
            self._row(linear.name, load, "us", "us", [1e6 * each for each in seconds])
            speeds = [linear.size / each / 1e9 for each in seconds]
            self._row(linear.name, load, "gb_s", "GB/s", speeds)
            # A limit is what the machine can do, so a slower round of reading does not lower it.
            parts = [speed / max(reads) for speed in speeds]
            self._row(linear.name, load, "share_of_read_limit", "", parts)

    def _calls(self, linears: Sequence[Linear]) -> None:
        """Time calls on a weight so small that only the call itself counts."""
        x = torch.randn(1, OVERHEAD_SHAPE[1]).bfloat16()
        found: dict[str, list[float]] = {linear.name: [] for linear in linears}
        for number in range(self.settings.rounds + 1):
            for linear in linears:
                call, began = linear.copies[0], self.clock()
                for _ in range(OVERHEAD_CALLS):
                    call(x)
                # The first round warms up.
                if number:
                    found[linear.name].append(1e6 * (self.clock() - began) / OVERHEAD_CALLS)
        for linear in linears:
            self.sides.setdefault(linear.name, {"backend": linear.backend, "spec": linear.spec})
            self._row(linear.name, CALL, "us", "us", found[linear.name])

    def _row(self, side: str, load: str, metric: str, unit: str, rounds: Sequence[float]) -> None:
        self.rows.append(Row.of_rounds(side, load, metric, unit, rounds))


def name_of(shape: Shape, tokens: int | None = None) -> str:
    """Name a shape, or a shape and a number of tokens, as the loads of the record do."""
    size = f"{shape[0]}x{shape[1]}"
    return size if tokens is None else f"{size}, {tokens} tokens"


def _rounds(
    linears: Sequence[Linear], x: Tensor, rounds: int, clock: Clock, memory: Tensor
) -> tuple[dict[str, list[list[float]]], list[dict[str, Any]]]:
    """Run interleaved rounds.

    Returns:
        Seconds of the calls by linear and round; the noise of each round, with its read limit.
    """
    counts = {linear.name: _warm_up(linear, x, clock) for linear in linears}
    times: dict[str, list[list[float]]] = {linear.name: [] for linear in linears}
    heard = []
    for number in range(rounds):
        limit = noise.read_limit(memory, READS, clock)
        with noise.measured() as found:
            # The order alternates, so that drift of the machine hits all alike.
            for linear in linears if number % 2 == 0 else reversed(linears):
                times[linear.name].append(linear.time(x, counts[linear.name], clock))
        heard.append(found | {"read_limit_gb_s": limit})
    return times, heard


def _warm_up(linear: Linear, x: Tensor, clock: Clock) -> int:
    """Call every copy once (oneDNN compiles for each), and give the calls that fill a block."""
    calls = len(linear.copies) if linear.backend == "vllm" else 1
    linear.time(x, calls, clock)
    seconds = max(1e-7, statistics.median(linear.time(x, MIN_CALLS, clock)))
    return min(MAX_CALLS, max(MIN_CALLS, round(BLOCK_SECONDS / seconds)))


def _linears_wanted(settings: Settings) -> list[tuple[Asked, str]]:
    """List formats and backends once each, dense controls included, and check them."""
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
    """Make every linear of one random weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    linears = [torch_linear(weight, cold)]
    if operators is not None:
        linears += vllm_linears(operators, weight, cold)
    return linears + [packed_linear(asked, to, weight, cold, clock) for asked, to in wanted]


@contextmanager
def _threads_and_isa(settings: Settings) -> Iterator[None]:
    """Set threads and instruction set for the block, and set them back."""
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
    """Collect what decides about speed besides the provenance."""
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
        "load_average": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    """Find family and model number: what virtual machines call their CPU says little."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    family, model = found.get("cpu family"), found.get("model")
    return f"family {family} model {model}" if family and model else platform.processor()
