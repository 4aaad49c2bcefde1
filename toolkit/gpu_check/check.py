"""The whole check: sections one after the other, each until its share of the minutes is used."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gblm.gpu_check.bandwidth import measure_limits, read_limit
from gblm.gpu_check.correctness import Cases, check_products
from gblm.gpu_check.decode import ModelShape, measure_decoding
from gblm.gpu_check.lines import judge
from gblm.gpu_check.place import Cuda, Place
from gblm.gpu_check.pruning import LayerShape, measure_pruning
from gblm.gpu_check.sanitizer import TOOLS, run_sanitizer
from gblm.gpu_check.section import Clock, Section
from gblm.gpu_check.times import measure_times
from gblm.provenance import provenance

logger = logging.getLogger(__name__)

# Of the time; what a section leaves over goes to the next one.
SHARES = {
    "bandwidth": 0.03,
    "correctness": 0.22,
    "times": 0.40,
    "decode": 0.17,
    "pruning": 0.08,
    "sanitizer": 0.10,
}


@dataclass(frozen=True)
class Sizes:
    """How much there is to do; tests take less.

    Attributes:
        bandwidth: arguments of `measure_limits`.
        cases: of `check_products`.
        times: arguments of `measure_times`.
        model: of the decode loop, and its other arguments.
        layer: to prune.
        tools: of compute-sanitizer.
    """

    bandwidth: dict[str, Any] = field(default_factory=dict)
    cases: Cases = field(default_factory=Cases)
    times: dict[str, Any] = field(default_factory=dict)
    model: ModelShape = field(default_factory=ModelShape)
    decode: dict[str, Any] = field(default_factory=dict)
    layer: LayerShape = field(default_factory=LayerShape)
    tools: tuple[str, ...] = TOOLS


def gpu_check(
    minutes: float = 8.0,
    place: Place | None = None,
    sizes: Sizes | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Run all sections.

    Args:
        minutes: in all; nothing begins afterwards, and what runs is not interrupted.
        place: where; this machine's CUDA device if None.
        sizes: what to do; everything if None.
        clock: in seconds.

    Returns:
        The record: provenance, facts of the device, the lines of `judge`, what the autotuner chose,
        and of each section its rows, what it skipped and what failed.

    Raises:
        MachineError: there is no CUDA device.
    """
    here, wanted = place or Cuda(), sizes or Sizes()
    began = clock()
    sections: dict[str, Any] = {}
    limits = Section("bandwidth", began, clock)
    work: dict[str, Callable[[Section], None]] = {
        "bandwidth": lambda own: measure_limits(here, own, **wanted.bandwidth),
        "correctness": lambda own: check_products(here, own, wanted.cases),
        "times": lambda own: measure_times(here, own, read_limit(limits), **wanted.times),
        "decode": lambda own: measure_decoding(here, own, wanted.model, **wanted.decode),
        "pruning": lambda own: measure_pruning(here, own, wanted.layer),
        "sanitizer": lambda own: run_sanitizer(own, wanted.tools),
    }
    end = began
    for name, share in SHARES.items():
        end += 60 * minutes * share
        section = limits if name == "bandwidth" else Section(name, end, clock)
        section.deadline, started = end, clock()
        logger.info("gblm: %s, %.0f s at most", name, section.seconds_left)
        work[name](section)
        sections[name] = section.record(started)
    return {
        "kind": "gpu check",
        "provenance": provenance(),
        "device": here.facts(),
        "minutes": minutes,
        "seconds": round(clock() - began, 1),
        "lines": judge(sections),
        "autotune": here.answers(),
        "sections": sections,
    }
