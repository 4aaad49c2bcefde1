"""Examine a model once: its linears, what each may become, and the loss that this would bring."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from gblm.calibrate.text import draw
from gblm.errors import PatternError, UsageError
from gblm.model.linears import prunable
from gblm.model.loading import load_tokenizer
from gblm.progress import Progress, no_progress
from gblm.prune.job import Job, open_job
from gblm.recipe import Recipe
from gblm.search.allocate import LinearSpec, linears_of
from gblm.search.sensitivity import Curve, Judgement, measure
from gblm.sparse.formats import Format, format_for
from gblm.sparse.patterns import NM, Dense, Pattern, Unstructured, parse
from gblm.sparse.values import KINDS, ValueType, parse_values

logger = logging.getLogger(__name__)
# Text of the cheap pass: more of it moves the curves by less than they are off anyway.
SAMPLES, SEQ_LEN = 16, 256
# How much of the differences between linears' sensitivities is believed, fitted to SmolLM2-135M;
# at which sparsity they are compared.
TRUST, TYPICAL, TINY = 0.7, 0.5, 1e-30


@dataclass(frozen=True)
class Space:
    """The space says what linears may become: value types, "unstructured" and N:M patterns.

    They may always stay dense.
    """

    values: tuple[str, ...] = ("float", "int8:auto", "int4:auto", "int3:auto")
    patterns: tuple[str, ...] = ("unstructured", "2:4", "8:16")

    @property
    def has_unstructured(self) -> bool:
        """Tell whether zeros may stand anywhere."""
        return "unstructured" in self.patterns


EVERYTHING = Space()


@dataclass(frozen=True)
class Examined:
    """A model whose linears have been judged, so that budgets can be spread over them.

    Attributes:
        linears: the linears to prune.
        every: the names of all linears of the decoder layers.
        specs: the value types as they were asked for, by kind.
        has_unstructured: whether zeros may stand anywhere.
        judgement: what else they may become.
        curves: the predicted losses by full name of the linear.
        rest_bytes: of the packed folder's tensors besides the linears.
    """

    linears: tuple[LinearSpec, ...]
    every: tuple[str, ...]
    specs: Mapping[str, str]
    has_unstructured: bool
    judgement: Judgement
    curves: Mapping[str, Curve]
    rest_bytes: int

    @property
    def weights(self) -> int:
        """Count the weights of all linears to prune."""
        return sum(linear.weights for linear in self.linears)

    def loss(self, linear: LinearSpec, fmt: Format) -> float:
        """Predict the rise of the loss in nats per token.

        Whoever takes the least sum of estimates takes those that err low. Sensitivities are
        therefore drawn towards their mean before anything is chosen or told.
        """
        return self._drawn[linear.name] * self.curves[linear.name].loss(fmt)

    @cached_property
    def _drawn(self) -> dict[str, float]:
        """Give factors by linear: (mean / own)^(1 − TRUST) of the losses per weight at TYPICAL.

        The mean is geometric; all of them at TYPICAL add up to as much as before.
        """
        kind = next(iter(self.specs))
        own = {linear: self.curves[linear.name].at(kind, TYPICAL) for linear in self.linears}
        logs = {x: math.log(max(loss / x.weights, TINY)) for x, loss in own.items()}
        mean = sum(x.weights * log for x, log in logs.items()) / self.weights
        drawn = {x: math.exp((mean - log) * (1 - TRUST)) for x, log in logs.items()}
        total = sum(factor * own[x] for x, factor in drawn.items())
        return {
            x.name: factor * sum(own.values()) / max(total, TINY) for x, factor in drawn.items()
        }

    @property
    def kinds_with_zeros(self) -> list[str]:
        """Name the kinds of values that may stand beside zeros."""
        return [kind for kind in self.specs if KINDS[kind].bits in Format.bits]

    def fmt(self, linear: LinearSpec, kind: str, pattern: Pattern) -> Format:
        """Give the format of a linear with a pattern and a kind of values."""
        return format_for(pattern, self.judgement.values[linear.name][kind])


def examine(recipe: Recipe, space: Space, progress: Progress = no_progress) -> Examined:
    """Read a model's headers and judge its linears on a little text.

    Args:
        recipe: gives model, text, method and steps; its pattern, values and layers do not count.
        space: what linears may become.
        progress: for progress bars.

    Raises:
        GblmError: whatever `prune` would refuse before it computes; no value type fits the model.
    """
    # Any pattern and values that every linear can have stand for those that are searched for.
    typical = {"pattern": str(Unstructured(TYPICAL)), "values": "float", "layers": ()}
    with open_job(recipe.model_copy(update=typical)) as job:
        reader, model = job.layers.reader, job.layers.model
        linears = linears_of(reader, job.formats, job.pipeline.method.scope)
        values, patterns = _values(space, linears), _patterns(space, linears)
        pipeline = job.pipeline
        makes_up = "hessian" in pipeline.method.needs or pipeline.refit is not None
        judgement = Judgement(values, patterns, makes_up, pipeline.rounding)
        with tempfile.TemporaryDirectory(prefix="gblm-search-") as scratch:
            windows = _windows(recipe, job)
            curves = measure(job.layers, windows, judgement, Path(scratch), progress)
        pruned = sum(reader.num_bytes(f"{linear.name}.weight") for linear in linears)
        every = sum(map(reader.num_bytes, reader)) + (job.head.added_bytes if job.head else 0)
        specs = {parse_values(spec).kind: spec for spec in space.values}
        return Examined(
            linears=linears,
            every=tuple(prunable(model)),
            specs={kind: specs[kind] for kind in values[linears[0].name]},
            has_unstructured=space.has_unstructured,
            judgement=judgement,
            curves=curves,
            rest_bytes=every - pruned,
        )


def _values(space: Space, linears: tuple[LinearSpec, ...]) -> dict[str, dict[str, ValueType]]:
    """Resolve value types by linear and kind; those that a linear cannot have are left out."""
    found: dict[str, dict[str, ValueType]] = {linear.name: {} for linear in linears}
    for spec in space.values:
        values = parse_values(spec)
        try:
            own = {x.name: values.resolve(x.name, x.shape[1]) for x in linears}
            for linear in linears:
                format_for(Dense(), own[linear.name]).check_shape(linear.name, linear.shape)
        except PatternError as error:
            logger.warning("%s is left out: %s", spec, error)
            continue
        for name, resolved in own.items():
            found[name][values.kind] = resolved
    if not found[linears[0].name]:
        raise UsageError(f"no value type of {', '.join(space.values)} fits this model.")
    return found


def _patterns(space: Space, linears: tuple[LinearSpec, ...]) -> tuple[NM, ...]:
    """Give the N:M patterns that every linear can have; the others are left out."""
    found = []
    for pattern in map(parse, (text for text in space.patterns if text != "unstructured")):
        if not isinstance(pattern, NM):
            raise UsageError(f"pattern {pattern}: a search takes unstructured and N:M patterns.")
        try:
            for linear in linears:
                pattern.check_shape(linear.name, linear.shape)
        except PatternError as error:
            logger.warning("%s is left out: %s", pattern, error)
            continue
        found.append(pattern)
    return tuple(found)


def _windows(recipe: Recipe, job: Job) -> Tensor:
    """Draw the token ids of the cheap pass, from the beginning of the recipe's own random draw."""
    text = recipe.calibration
    if text is None:
        raise UsageError("a budget needs calibration text; the recipe has none.")
    few = {"num_samples": min(text.num_samples, SAMPLES), "seq_len": min(text.seq_len, SEQ_LEN)}
    return draw(text.model_copy(update=few), job.folder.path, load_tokenizer(job.folder))
