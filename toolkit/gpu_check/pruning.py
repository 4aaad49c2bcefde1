"""How fast the product prunes on the device: one decoder layer of LLaMA-7B's shape.

What is timed is what happens to weights: deriving from the statistics what linears with the same
input share, choosing, and moving the weights that stay. Adding up the statistics is timed apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gblm.calibrate.stats import STATS
from gblm.formats import Shape
from gblm.gpu_check.place import Place
from gblm.gpu_check.section import Section
from gblm.methods.pipeline import Pipeline, make_pipeline
from gblm.patterns import parse
from gblm.values import FLOAT

METHODS = ("wanda", "gblm", "sparsegpt")
PATTERNS = ("2:4", "0.5")
SAMPLES = 8


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer without grouped-query attention, and the length of a calibration sample."""

    hidden: int = 4096
    inner: int = 11008
    sample_tokens: int = 2048

    def groups(self) -> list[list[Shape]]:
        """[out, in] of the linears, those with the same input together."""
        hidden, inner = self.hidden, self.inner
        square = (hidden, hidden)
        return [[square] * 3, [square], [(inner, hidden)] * 2, [(hidden, inner)]]


def measure_pruning(
    place: Place,
    section: Section,
    layer: LayerShape | None = None,
    methods: Sequence[str] = METHODS,
    patterns: Sequence[str] = PATTERNS,
) -> None:
    """Rows {"what": "statistics" | "prune", …}; layers per minute, tokens per second.

    Args:
        place: where.
        section: takes the rows.
        layer: its shape.
        methods: by name.
        patterns: of each method.
    """
    shape = layer or LayerShape()
    for need in ("act_norm", "hessian"):
        row = section.attempt(need, partial(_statistic, place, need, shape))
        if row is not None:
            section.rows.append(row)
    for method in methods:
        for pattern in patterns:
            work = partial(_prune, place, method, pattern, shape)
            row = section.attempt(f"{method} {pattern}", work)
            if row is not None:
                section.rows.append(row)
            place.release()


def _statistic(place: Place, need: str, layer: LayerShape) -> dict[str, Any]:
    stat, columns = STATS[need](), layer.inner
    x = place.normal(SAMPLES, layer.sample_tokens, columns, dtype=torch.bfloat16)
    stat.update(x[:1])
    seconds = _seconds(place, lambda: stat.update(x))
    return {
        "what": "statistics", "statistic": need, "columns": columns, "seconds": seconds,
        "tokens_per_second": SAMPLES * layer.sample_tokens / seconds,
    }  # fmt: skip


def _prune(place: Place, method: str, pattern: str, layer: LayerShape) -> dict[str, Any]:
    pipeline = make_pipeline(method, {}, None, "nearest")
    # The first kernel of its kind is loaded or compiled.
    small = min(256, layer.hidden)
    _prune_group(place, pipeline, pattern, [(small, small)])
    seconds = sum(_prune_group(place, pipeline, pattern, group) for group in layer.groups())
    return {
        "what": "prune", "method": method, "pattern": pattern,
        "layer": [layer.hidden, layer.inner], "seconds": seconds,
        "layers_per_minute": 60 / seconds,
    }  # fmt: skip


def _prune_group(place: Place, pipeline: Pipeline, pattern: str, shapes: Sequence[Shape]) -> float:
    """Seconds of linears with the same input."""
    columns, parsed = shapes[0][1], parse(pattern)
    shared = statistics_of(place, pipeline.needs - {"grad_norm"}, columns)
    weights = [place.normal(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate(shapes)]
    own: list[dict[str, Tensor]] = [{} for _ in shapes]
    if "grad_norm" in pipeline.needs:
        samples = torch.tensor(float(SAMPLES), device=place.device)
        own = [
            {"grad_norm": place.normal(*shape).abs(), "num_samples": samples} for shape in shapes
        ]

    def work() -> None:
        prepared = pipeline.prepare(shared)
        for weight, more in zip(weights, own, strict=True):
            pipeline.prune(weight, {**prepared, **more}, parsed, FLOAT)

    return _seconds(place, work)


def statistics_of(place: Place, needs: frozenset[str], columns: int) -> dict[str, Tensor]:
    """Of normal numbers with so many columns, by the product's own sums."""
    found = {}
    for need in sorted(needs):
        stat = STATS[need]()
        stat.update(place.normal(2, columns, columns))
        found[need] = stat.value()
    return found


def _seconds(place: Place, work: Callable[[], object]) -> float:
    place.synchronize()
    began = time.perf_counter()
    work()
    place.synchronize()
    return time.perf_counter() - began
