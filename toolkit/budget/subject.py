"""Subject: a model, measured, that budgets can be spread over as often as one likes."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm import data
from gblm.budget.curves import Judgement
from gblm.budget.linears import Linear, linears_of, rest_bytes
from gblm.budget.owl import M
from gblm.budget.rates import Rates, probe, rest_seconds, unmeasurable
from gblm.budget.sensitivity import Sensitivity, measure
from gblm.checkpoint.packer import check_packable
from gblm.checkpoint.reader import Reader
from gblm.choices import Choice
from gblm.errors import PatternError, UsageError
from gblm.folder import resolve
from gblm.layers import StreamedLayers
from gblm.methods.alps import ALPS
from gblm.methods.pipeline import Pipeline, make_pipeline
from gblm.methods.sparsegpt import SparseGPT
from gblm.model import load_tokenizer, output_head, prunable, refuse_packed
from gblm.patterns import NM, Dense, Unstructured, parse
from gblm.progress import Progress, no_progress
from gblm.recipe import Recipe
from gblm.values import ValueType, parse_values

# Text of the cheap pass: more of it moves the curves by less than they are off anyway.
SAMPLES, SEQ_LEN = 16, 256
# How much of the differences between linears' sensitivities is believed, fitted to SmolLM2-135M;
# at which sparsity they are compared.
TRUST, TYPICAL, TINY = 0.7, 0.5, 1e-30


@dataclass(frozen=True)
class Wanted:
    """What linears may become.

    Attributes:
        values: value types, such as "int4:auto".
        patterns: "unstructured" and N:M patterns; "dense" may always be.
    """

    values: tuple[str, ...] = ("float", "int8:auto", "int4:auto")
    patterns: tuple[str, ...] = ("unstructured", "2:4", "8:16")

    @property
    def fixed(self) -> list[NM]:
        """The N:M patterns."""
        parsed = [parse(text) for text in self.patterns if text != "unstructured"]
        return [pattern for pattern in parsed if isinstance(pattern, NM)]


@dataclass(frozen=True)
class Subject:
    """A model and what is known of it.

    Attributes:
        linears: to prune.
        every: names of all linears of the decoder layers.
        values: value types by kind, and by full name of the linear.
        specs: the same as they were asked for.
        wanted: what linears may become, as far as they can.
        sensitivity: predicted rises of the loss.
        rates: times of this machine; None where they cannot be measured.
        rest_bytes: of the packed folder's tensors besides the linears.
        rest_seconds: of a token besides the linears: the output head.
        notes: for people: what was left out, and why.
        facts: for JSON: the text of the pass, its time, the rates.
    """

    linears: tuple[Linear, ...]
    every: tuple[str, ...]
    values: Mapping[str, Mapping[str, ValueType]]
    specs: Mapping[str, str]
    wanted: Wanted
    sensitivity: Sensitivity
    rates: Rates | None
    rest_bytes: int
    rest_seconds: float
    notes: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def weights(self) -> int:
        """Of all linears."""
        return sum(linear.weights for linear in self.linears)

    def loss(self, linear: Linear, choice: Choice) -> float:
        """The predicted rise of the loss, nats per token.

        Whoever takes the least sum of estimates takes those that err low. Sensitivities are
        therefore drawn towards their mean before anything is chosen or told.
        """
        return self._drawn[linear.name] * self.sensitivity.curves[linear.name].loss(choice)

    @cached_property
    def _drawn(self) -> dict[str, float]:
        """Factors by linear: (mean / own)^(1 − TRUST) of the losses per weight at TYPICAL.

        The mean is geometric; all of them at TYPICAL add up to as much as before.
        """
        kind = next(iter(self.specs))
        typical = {x: self.sparse(x, kind, TYPICAL) for x in self.linears}
        own = {x: self.sensitivity.curves[x.name].loss(typical[x]) for x in self.linears}
        logs = {x: math.log(max(loss / x.weights, TINY)) for x, loss in own.items()}
        mean = sum(x.weights * log for x, log in logs.items()) / self.weights
        drawn = {x: math.exp((mean - log) * (1 - TRUST)) for x, log in logs.items()}
        total = sum(factor * own[x] for x, factor in drawn.items())
        return {
            x.name: factor * sum(own.values()) / max(total, TINY) for x, factor in drawn.items()
        }

    def seconds(self, linear: Linear, choice: Choice) -> float:
        """Of one token, predicted; needs rates."""
        if self.rates is None:
            raise RuntimeError("this subject has no rates.")
        return self.rates.seconds(linear.weights, choice)

    def dense(self, linear: Linear, kind: str) -> Choice:
        """The linear without zeros."""
        return Choice(Dense(), self.values[kind][linear.name])

    def sparse(self, linear: Linear, kind: str, sparsity: float) -> Choice:
        """The linear with zeros anywhere."""
        return Choice(Unstructured(round(sparsity, 4)), self.values[kind][linear.name])


def examine(recipe: Recipe, wanted: Wanted, progress: Progress = no_progress) -> Subject:
    """Read a model's headers, run the cheap pass, probe the kernels.

    Args:
        recipe: model, text, method and steps; pattern, values and layers are not looked at.
        wanted: what linears may become.
        progress: for progress bars.

    Raises:
        GblmError: what `prune` would refuse before it computes; no value type fits the model.
    """
    refit = recipe.refit.model_dump() if recipe.refit is not None else None
    pipeline = make_pipeline(recipe.method, recipe.options, refit, recipe.rounding)
    with Reader(resolve(recipe.model)) as reader:
        refuse_packed(reader.folder)
        dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        layers = StreamedLayers(reader, dtype, recipe.device)
        chosen = prunable(layers.model, recipe.targets, recipe.ignore)
        linears = linears_of(reader, layers.prefix, chosen)
        check_packable(reader, {own.name: Choice(Dense()) for own in linears})
        values, notes = _values(wanted, linears)
        fixed = _patterns(wanted, linears, pipeline, notes)
        found, facts = _pass(recipe, pipeline, layers, values, fixed, progress)
        kinds = {parse_values(spec).kind: spec for spec in wanted.values}
        specs: dict[str, str] = {kind: kinds[kind] for kind in kinds if kind in values}
        head, rates = output_head(layers.model, recipe.head, reader), None
        if reason := unmeasurable(recipe.device, linears):
            notes.append(f"no decode times: {reason}")
        else:
            rates = probe(linears, [*specs.values()], [*map(str, fixed)], head, progress)
        own_head = layers.model.get_output_embeddings()
        head_shape = tuple(own_head.weight.shape) if own_head is not None else None
        return Subject(
            linears=linears,
            every=tuple(prunable(layers.model)),
            values=values,
            specs=specs,
            wanted=Wanted(tuple(specs.values()), _names(wanted, fixed)),
            sensitivity=found,
            rates=rates,
            rest_bytes=rest_bytes(reader, linears, head),
            rest_seconds=rest_seconds(rates, head, head_shape) if rates else 0.0,
            notes=tuple(notes),
            facts=facts | _rate_facts(rates),
        )


def _pass(
    recipe: Recipe,
    pipeline: Pipeline,
    layers: StreamedLayers,
    values: Mapping[str, Mapping[str, ValueType]],
    fixed: list[NM],
    progress: Progress,
) -> tuple[Sensitivity, dict[str, Any]]:
    """The cheap pass, and for JSON its text and time."""
    began, windows = time.monotonic(), _windows(recipe, layers.reader.folder)
    names = next(iter(values.values()))
    by_name = {name: {kind: own[name] for kind, own in values.items()} for name in names}
    makes_up = isinstance(pipeline.method, SparseGPT | ALPS) or pipeline.refit is not None
    judgement = Judgement(by_name, fixed, makes_up, pipeline.rounding)
    with tempfile.TemporaryDirectory(prefix="gblm-budget-") as scratch:
        found = measure(layers, windows, judgement, M, Path(scratch), progress)
    return found, {
        "samples": len(windows),
        "seq_len": windows.shape[1],
        "calibration_sha256": data.fingerprint(windows),
        "seconds": round(time.monotonic() - began, 1),
    }


def _values(
    wanted: Wanted, linears: tuple[Linear, ...]
) -> tuple[dict[str, dict[str, ValueType]], list[str]]:
    """Value types by kind and linear; those that a linear cannot have are left out with a note."""
    found: dict[str, dict[str, ValueType]] = {}
    notes = []
    for spec in wanted.values:
        asked = parse_values(spec)
        try:
            own = {x.name: asked.resolve(x.name, x.shape[1]) for x in linears}
            for linear in linears:
                Choice(Dense(), own[linear.name]).fmt.check_shape(linear.name, linear.shape)
        except PatternError as error:
            notes.append(f"{spec} is left out: {error}")
            continue
        found[asked.kind] = own
    if not found:
        raise UsageError(f"no value type fits this model. {' '.join(notes)}")
    return found, notes


def _patterns(
    wanted: Wanted, linears: tuple[Linear, ...], pipeline: Pipeline, notes: list[str]
) -> list[NM]:
    """The N:M patterns that every linear can have; the others get a note."""
    found = []
    for pattern in wanted.fixed:
        pipeline.check_pattern(pattern)
        try:
            for linear in linears:
                pattern.check_shape(linear.name, linear.shape)
        except PatternError as error:
            notes.append(f"{pattern} is left out: {error}")
            continue
        found.append(pattern)
    return found


def _names(wanted: Wanted, fixed: list[NM]) -> tuple[str, ...]:
    loose = [text for text in wanted.patterns if text == "unstructured"]
    return (*loose, *map(str, fixed))


def _windows(recipe: Recipe, folder: Path) -> Tensor:
    """Token ids of the cheap pass, from the beginning of the recipe's own random draw."""
    text = recipe.calibration
    if text is None:
        raise UsageError("a budget needs calibration text; the recipe has none.")
    documents = data.read_documents(text.source, "calibration")
    samples, length = min(text.num_samples, SAMPLES), min(text.seq_len, SEQ_LEN)
    tokenizer = load_tokenizer(folder)
    return data.calibration_windows(documents, tokenizer, samples, length, text.seed, text.bos)


def _rate_facts(rates: Rates | None) -> dict[str, Any]:
    if rates is None:
        return {"threads": torch.get_num_threads(), "call_us": None, "ns_per_weight": None}
    return {
        "threads": rates.threads,
        "call_us": round(1e6 * rates.call, 3),
        "ns_per_weight": {
            f"{name} {kind}": round(1e9 * own, 6) for (name, kind), own in rates.per_weight.items()
        },
    }
