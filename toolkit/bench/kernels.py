"""Kernels against the memory limit, PyTorch and vLLM: interleaved rounds on weights out of memory.

What is measured stands in linears.py, how calls are timed in devices.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from gblm.bench import noise
from gblm.bench.devices import Device, Timed, cpu, gpu
from gblm.bench.linears import (
    DENSE,
    TWO_FOUR,
    Asked,
    Linear,
    packed_linear,
    serving,
    torch_linear,
    torch_two_four,
    vllm_bf16,
    vllm_operators,
    vllm_w8a8,
)
from gblm.errors import MachineError, UsageError
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance
from gblm.record import Record, Row, Verdict
from gblm.sparse.formats import Shape

logger = logging.getLogger(__name__)
T = TypeVar("T")

# [out, in] of the linears of one decoder layer, without repetitions.
SHAPE_SETS: dict[str, tuple[Shape, ...]] = {
    "llama-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama-1b": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "smollm2": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
}
FORMATS = {
    "cpu": (
        "dense/dense", "bitmask/0.5", "nm/2:4", "nm/4:8", "nm/8:16", "bitmask/0.7", "bitmask/0.8",
        "dense/dense/int8", "bitmask/0.5/int8", "nm/2:4/int8", "nm/4:8/int8", "nm/8:16/int8",
        "dense/dense/int4", "bitmask/0.5/int4", "nm/2:4/int4", "nm/4:8/int4", "nm/8:16/int4",
    ),
    "cuda": ("nm/2:4", "bitmask/0.5", "nm/2:4/int8", "nm/2:4/int4", "bitmask/0.7"),
}  # fmt: skip
BASELINES = (DENSE, "vllm_bf16", "vllm_w8a8")
MIN_READ = 1 << 20


@dataclass(frozen=True)
class Settings:
    """The settings say what is measured.

    `shapes` are [out, in] of the weights, `tokens` the rows of x, `formats` specs, in which an
    integer type without a group size takes the one that `auto` means; formats and backends are the
    device's usual ones if empty. Threads and vLLM's linears are about CPUs. With `allow_noise`
    noisy rounds count, too.
    """

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    formats: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1
    rounds: int = 7
    vllm: bool = True
    allow_noise: bool = False


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
    """Measure every shape × number of tokens × linear on the device of the settings.

    Raises:
        UsageError: a format, shape or backend does not exist, or they do not fit each other.
        MachineError: there is no such device, the kernels are not built, or memory is short.
    """
    if settings.device == "cuda":
        return measure(gpu(), settings, progress)
    with cpu(settings.threads) as device:
        return measure(device, settings, progress)


def measure(device: Device, settings: Settings, progress: Progress = no_progress) -> Record:
    """Measure on a device that is there.

    Returns:
        The record. Its loads are "OUTxIN, N tokens"; its sides are linears, and "memory", whose
        read limit says what no linear can pass. "us" is the time of a call. It is invalid when
        anything failed, and says what.
    """
    formats = asked_formats(settings)
    check(device, settings, formats)
    origin = {**provenance(), "settings": asdict(settings), "cold_bytes": device.cold,
              **device.facts}  # fmt: skip
    run = Run(device, settings, device.reader(max(device.cold, MIN_READ)))
    step = progress("measuring", len(settings.shapes))
    for shape in settings.shapes:
        linears = run.make(shape, formats)
        run.describe(linears, shape)
        for tokens in settings.tokens:
            run.time(linears, name_of(shape, tokens), device.normal(tokens, shape[1]))
        del linears
        torch.cuda.empty_cache()
        step()
    reasons = tuple(run.reasons)
    return Record(
        kind="kernels", sides=run.sides, rows=tuple(run.rows), baseline=DENSE,
        verdict=Verdict(not reasons, reasons, tuple(run.notes + noise.unchecked(run.heard))),
        provenance=origin,
    )  # fmt: skip


class Run:
    """A run holds what has been found so far on a device."""

    def __init__(self, device: Device, settings: Settings, read: Callable[[], float]) -> None:
        """Begin with nothing; `read` says how fast memory is now, in GB/s."""
        self.device, self.settings, self.read = device, settings, read
        self.sides: dict[str, dict[str, Any]] = {"memory": {}}
        self.rows: list[Row] = []
        self.reasons: list[str] = []
        self.notes: list[str] = []
        self.heard: list[dict[str, Any]] = []

    def make(self, shape: Shape, formats: Sequence[Asked]) -> list[Linear]:
        """Make every linear of one random weight; those that fail become reasons."""
        device, cold = self.device, self.device.cold
        weight = device.normal(*shape, dtype=torch.float32).mul_(0.02)
        makers: dict[str, Callable[[], Linear]] = {DENSE: partial(torch_linear, weight, device)}
        if self.settings.device == "cuda":
            makers[TWO_FOUR] = partial(torch_two_four, weight, device)
        elif self.settings.vllm and (operators := vllm_operators()) is not None:
            makers["vllm_bf16"] = partial(vllm_bf16, operators, weight, cold)
            makers["vllm_w8a8"] = partial(vllm_w8a8, operators, weight, cold)
        for asked in formats:
            for name in serving(device, self.settings.backends, asked, shape):
                makers[asked.on(name)] = partial(packed_linear, asked, name, weight, device)
        made = [self.attempt(f"{name}, {name_of(shape)}", make) for name, make in makers.items()]
        linears = [linear for linear in made if linear is not None]
        for linear in linears:
            facts = {"backend": linear.backend, "spec": linear.spec, "control": linear.control}
            self.sides.setdefault(linear.name, facts)
        return linears

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """Do a piece of work; what it raises costs its figures alone."""
        try:
            return work()
        except Exception as error:
            logger.debug("gblm: %s", what, exc_info=True)
            text = (str(error).splitlines() or [""])[0]
            self.reasons.append(f"{what}: {type(error).__name__}: {text[:200]}")
        return None

    def describe(self, linears: Sequence[Linear], shape: Shape) -> None:
        """Add what is known of the weights without a call."""
        load, weights = name_of(shape), shape[0] * shape[1]
        for linear in linears:
            self._row(linear.name, load, "bytes", "bytes", [linear.size])
            self._row(linear.name, load, "bits_per_weight", "bits", [8 * linear.size / weights])

    def time(self, linears: Sequence[Linear], load: str, x: Tensor) -> None:
        """Multiply x [tokens, in] by all linears in turn, and add rows of the quiet rounds."""
        timed: dict[str, Timed] = {}
        for linear in linears:
            calls = [partial(call, x) for call in linear.copies]
            timer = self.attempt(f"{linear.name}, {load}", partial(self.device.timer, calls))
            if timer is not None:
                timed[linear.name] = timer
        found, reads = self.rounds(timed, load) if timed else ({}, [])
        if not reads:
            return
        self._row("memory", load, "read_limit_gb_s", "GB/s", reads)
        sizes = {linear.name: linear.size for linear in linears}
        for name, seconds in found.items():
            self._row(name, load, "us", "us", [1e6 * each for each in seconds])
            speeds = [sizes[name] / each / 1e9 for each in seconds]
            self._row(name, load, "gb_s", "GB/s", speeds)
            # A limit is what the machine can do, so a slower round of reading does not lower it.
            parts = [speed / max(reads) for speed in speeds]
            self._row(name, load, "share_of_read_limit", "", parts)

    def rounds(
        self, timed: dict[str, Timed], load: str
    ) -> tuple[dict[str, list[float]], list[float]]:
        """Time all sides in turn; gives seconds by side, and read limits, of the quiet rounds."""
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        heard = []
        for number in range(self.settings.rounds):
            limit = self.read()
            with noise.measured() as found:
                # The order alternates, so that drift of the machine hits all alike.
                for name in timed if number % 2 == 0 else reversed(timed):
                    seconds[name].append(timed[name]())
            heard.append(found | {"read_limit_gb_s": limit})
        self.heard += heard
        kept, notes, reasons = noise.judge(load, [{"": one} for one in heard],
                                           self.settings.allow_noise)  # fmt: skip
        self.notes += notes
        self.reasons += reasons
        quiet = {name: [times[number] for number in kept] for name, times in seconds.items()}
        return quiet, [heard[number]["read_limit_gb_s"] for number in kept]

    def _row(self, side: str, load: str, metric: str, unit: str, rounds: Sequence[float]) -> None:
        self.rows.append(Row.of_rounds(side, load, metric, unit, rounds))


def asked_formats(settings: Settings) -> list[Asked]:
    """List the formats that are measured; on a CPU each follows its dense control."""
    wanted = list(map(Asked, settings.formats or FORMATS[settings.device]))
    if settings.device == "cpu":
        wanted = [each for asked in wanted for each in (asked.control, asked)]
    return list(dict.fromkeys(wanted))


def check(device: Device, settings: Settings, formats: Sequence[Asked]) -> None:
    """Refuse what cannot be measured, before anything is."""
    count = len(BASELINES)
    for asked in formats:
        names = [serving(device, settings.backends, asked, shape) for shape in settings.shapes]
        count += max(map(len, names), default=0)
    if settings.device == "cpu":
        _check_memory(settings, count, device.cold)


def name_of(shape: Shape, tokens: int | None = None) -> str:
    """Name a shape, or a shape and a number of tokens, as the loads of the record do."""
    size = f"{shape[0]}x{shape[1]}"
    return size if tokens is None else f"{size}, {tokens} tokens"


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
