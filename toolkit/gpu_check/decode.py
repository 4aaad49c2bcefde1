"""A decode loop in PyTorch alone: a model of LLaMA-7B's shape, one token for every sequence a step.

Weights are random; the head is dense, as gblm leaves it by default. Keys and values of a full
context are read, those of the new token are written, nothing else depends on the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gblm.formats import Shape
from gblm.gpu_check.place import Place
from gblm.gpu_check.section import Section
from gblm.gpu_check.weights import CUBLAS, cublas, packed, serving

BATCHES = (1, 8, 32)
SPECS = ("nm/2:4", "nm/2:4/int8:128", "nm/2:4/int4:128", "bitmask/0.5", "bitmask/0.7")
Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ModelShape:
    """Of the model and the text before the token."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    context: int = 512

    @property
    def linears(self) -> list[Shape]:
        """[out, in] of q, k, v in one, o, gate and up in one, down."""
        hidden, inner = self.hidden, self.inner
        return [(3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]


class Decoder:
    """All layers for one batch size; a step runs on buffers that stay where they are."""

    def __init__(
        self, place: Place, shape: ModelShape, batch: int, linears: Sequence[Sequence[Linear]]
    ) -> None:
        """Fill the context.

        Args:
            place: where.
            shape: of the model.
            batch: sequences.
            linears: four per layer.
        """
        self.shape, self.batch, self._layers = shape, batch, linears
        half = torch.bfloat16
        dims = (batch, shape.heads, shape.context, shape.hidden // shape.heads)
        keys = place.normal(*dims, dtype=half)
        self._caches = [(keys.clone(), keys.clone()) for _ in linears]
        self._embedded = place.normal(batch, shape.hidden, dtype=half)
        self._head = place.normal(shape.vocabulary, shape.hidden, dtype=half)

    def step(self) -> Tensor:
        """The most likely token of each sequence: [batch] int64."""
        hidden, width = self._embedded, (self.shape.hidden,)
        for linears, cache in zip(self._layers, self._caches, strict=True):
            hidden = hidden + self._attention(functional.rms_norm(hidden, width), linears, cache)
            gate, up = linears[2](functional.rms_norm(hidden, width)).chunk(2, dim=-1)
            hidden = hidden + linears[3](functional.silu(gate) * up)
        last = functional.linear(functional.rms_norm(hidden, width), self._head)
        return last.argmax(dim=-1)

    def _attention(
        self, x: Tensor, linears: Sequence[Linear], cache: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [batch, hidden] → [batch, hidden]."""
        parts = linears[0](x).reshape(self.batch, 3, self.shape.heads, -1)
        query, key, value = parts.unbind(1)
        keys, values = cache
        keys[:, :, -1], values[:, :, -1] = key, value
        found = functional.scaled_dot_product_attention(query.unsqueeze(2), keys, values)
        return linears[1](found.reshape(self.batch, -1))


def measure_decoding(
    place: Place,
    section: Section,
    shape: ModelShape | None = None,
    batches: Sequence[int] = BATCHES,
    specs: Sequence[str] = SPECS,
) -> None:
    """A row per kind of linear and batch size: {"tokens_per_second", "x_dense"}.

    Args:
        place: where.
        section: takes the rows.
        shape: of the model.
        batches: sequences at once.
        specs: of formats; each on the first backend that takes all linears.
    """
    model = shape or ModelShape()
    baseline: dict[int, float] = {}
    for name, spec in [(CUBLAS, ""), *_kinds(place, model, specs, section)]:
        what = f"{name} {spec}".strip()
        linears = section.attempt(what, partial(_build, place, model, name, spec))
        if linears is None:
            continue
        for row in _batches(place, section, model, linears, batches, what):
            if name == CUBLAS:
                baseline[row["batch"]] = row["tokens_per_second"]
            base = baseline.get(row["batch"])
            row["x_dense"] = base and row["tokens_per_second"] / base
            section.rows.append({"contender": name, "spec": spec, **row})
        del linears
        place.release()


def _batches(
    place: Place,
    section: Section,
    model: ModelShape,
    linears: Sequence[Sequence[Linear]],
    batches: Sequence[int],
    what: str,
) -> list[dict[str, Any]]:
    rows = []
    for batch in batches:
        work = partial(_measure, place, model, batch, linears)
        row = section.attempt(f"{what}, batch {batch}", work)
        place.release()
        if row is not None:
            rows.append(row)
    return rows


def _kinds(
    place: Place, model: ModelShape, specs: Sequence[str], section: Section
) -> list[tuple[str, str]]:
    """Of each format the backend that `gblm` itself would take."""
    found = []
    for spec in specs:
        takes = [set(serving(place, spec, shape)) for shape in model.linears]
        names = [name for name in place.backends if all(name in own for own in takes)]
        if names:
            found.append((names[0], spec))
        else:
            section.skip(spec, "every backend refuses it")
    return found


def _build(place: Place, model: ModelShape, name: str, spec: str) -> list[list[Linear]]:
    """Four linears per layer, each with memory of its own."""
    made = [
        cublas(place, shape, model.layers)
        if name == CUBLAS
        else packed(place, name, spec, shape, model.layers)
        for shape in model.linears
    ]
    return [list(layer) for layer in zip(*(one.copies for one in made), strict=True)]


def _measure(
    place: Place, model: ModelShape, batch: int, linears: Sequence[Sequence[Linear]]
) -> dict[str, Any]:
    timing = place.time([Decoder(place, model, batch, linears).step])
    return {
        "batch": batch, "ms": 1e3 * timing.seconds, "captured": timing.captured,
        "tokens_per_second": batch / timing.seconds,
    }  # fmt: skip
