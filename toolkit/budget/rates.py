"""Decode time of linears on this machine: a short probe of the kernels, one token at a time.

Seconds of a call are what a call costs on a tiny weight, and a time per weight that is measured on
a large one for each format and value type, and for unstructured masks at a few sparsities. Copies
of the weight are together as large as the model's would be, up to four times the last cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from gblm.bench.linears import (
    Asked,
    Clock,
    last_level_cache,
    packed_linear,
    torch_linear,
)
from gblm.bench.linears import Linear as Timed
from gblm.budget.linears import Linear
from gblm.checkpoint.head import Head
from gblm.choices import Choice
from gblm.formats import Shape
from gblm.kernels import native
from gblm.kernels.cpu import COLUMN_UNIT
from gblm.patterns import Unstructured
from gblm.progress import Progress, no_progress

# Sparsities of unstructured masks that are measured.
SPARSITIES = (0.3, 0.5, 0.7)
PROBED, TINY = 1 << 21, (16, 64)
# Bits of a value as the kernels hold it.
IN_MEMORY = {"float": 16, "int8": 8, "int4": 4, "uint4": 8, "fp8": 16}
ROUNDS, BLOCK_SECONDS, MAX_CALLS = 3, 0.02, 300


@dataclass(frozen=True)
class Rates:
    """Times of this machine.

    Attributes:
        call: seconds of a call when there is nothing to multiply.
        per_weight: seconds per weight of the dense shape, by FORMAT/PATTERN and kind of values;
            "torch" is PyTorch's own bfloat16 linear.
        threads: of PyTorch while it was measured.
    """

    call: float
    per_weight: dict[tuple[str, str], float]
    threads: int

    def seconds(self, weights: int, choice: Choice | None) -> float:
        """Of one token through a linear with so many weights; None: as PyTorch has it."""
        if choice is None:
            return self.call + weights * self.per_weight["torch", "float"]
        kind, pattern = choice.values.kind, choice.pattern
        if not isinstance(pattern, Unstructured):
            return self.call + weights * self.per_weight[f"{choice.fmt.name}/{pattern}", kind]
        low, high = (
            SPARSITIES[:2] if pattern.sparsity < SPARSITIES[1] else (SPARSITIES[1], SPARSITIES[2])
        )
        first, last = (self.per_weight[f"bitmask/{s}", kind] for s in (low, high))
        share = (pattern.sparsity - low) / (high - low)
        return self.call + weights * max(first + share * (last - first), 0.0)


def unmeasurable(device: str, linears: Sequence[Linear]) -> str | None:
    """Why decode time cannot be predicted; None when it can."""
    if torch.device(device).type != "cpu":
        return f"they are measured on CPUs only, not on {device}"
    columns = max(linears, key=lambda linear: linear.weights).shape[1]
    if columns % max(COLUMN_UNIT.values()):
        return f"{columns} columns do not fill the blocks of the CPU kernels"
    return native.refusal()


def probe(
    linears: Sequence[Linear],
    kinds: Sequence[str],
    patterns: Sequence[str],
    head: Head | None = None,
    progress: Progress = no_progress,
) -> Rates:
    """Measure; takes a few seconds.

    Args:
        linears: of the model.
        kinds: value types in question, such as "int4:auto".
        patterns: further patterns in question, such as "2:4".
        head: the output head, if it is to be packed.
        progress: for a progress bar.

    Raises:
        GblmError: a format cannot have the model's shapes.
    """
    largest = max(linears, key=lambda linear: linear.weights).shape
    shape = (max(16, min(largest[0], PROBED // largest[1]) // 16 * 16), largest[1])
    threads = torch.get_num_threads()
    clock = time.thread_time if threads == 1 else time.perf_counter
    weights = sum(linear.weights for linear in linears)
    names = ["dense/dense", *(f"bitmask/{s}" for s in SPARSITIES), *(f"nm/{p}" for p in patterns)]
    asked = [(name, kind) for name in names for kind in kinds]
    if head is not None:
        asked.append(("dense/dense", f"{head.fmt.values.kind}:auto"))
    step = progress("probing the kernels", len(asked) + 2)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    tiny = packed_linear(Asked("dense/dense"), "cpu", torch.zeros(TINY), 0, clock)
    call = _seconds(tiny, TINY[1], clock)
    step()
    found = {
        ("torch", "float"): _seconds(torch_linear(weight, _cold(16, weights)), shape[1], clock)
    }
    step()
    for name, kind in asked:
        text = name if kind == "float" else f"{name}/{kind}"
        bits = IN_MEMORY[kind.partition(":")[0]]
        timed = packed_linear(Asked(text), "cpu", weight, _cold(bits, weights), clock)
        found[name, kind.partition(":")[0]] = _seconds(timed, shape[1], clock)
        step()
    size = prod(shape)
    return Rates(call, {key: max(own - call, 0.0) / size for key, own in found.items()}, threads)


def rest_seconds(rates: Rates, head: Head | None, head_shape: Shape | None) -> float:
    """Of the output head, packed or as it is; 0 if the model has none that is known."""
    if head is not None:
        return rates.seconds(head.weights, Choice(head.fmt.pattern, head.fmt.values))
    return rates.seconds(prod(head_shape), None) if head_shape else 0.0


def _cold(bits: int, weights: int) -> int:
    """Bytes of all copies: what the model's linears take, as far as a cache could not hold them."""
    return min(4 * last_level_cache(), weights * bits // 8)


def _seconds(linear: Timed, columns: int, clock: Clock) -> float:
    """Of one call with one token: the median of a few short blocks' medians."""
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    linear.time(x, min(len(linear.copies), 8), clock)
    once = max(1e-7, statistics.median(linear.time(x, 3, clock)))
    calls = min(MAX_CALLS, max(3, round(BLOCK_SECONDS / once)))
    blocks = [statistics.median(linear.time(x, calls, clock)) for _ in range(ROUNDS)]
    return statistics.median(blocks)
