"""Job: one pruning run whose inputs have been opened and checked, but nothing computed yet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gblm import data
from gblm.calibrate.ranks import ALONE, Ranks, rank_device
from gblm.calibrate.reconstruct import Training
from gblm.calibrate.saved import StatsFolder
from gblm.calibrate.text import draw
from gblm.checkpoint.head import Head, output_head
from gblm.checkpoint.pack import check_packable
from gblm.errors import UsageError
from gblm.methods.magnitude import Magnitude
from gblm.methods.pipeline import Pipeline, make_pipeline
from gblm.methods.sparsegpt import SparseGPT
from gblm.model.folder import ModelFolder
from gblm.model.layers import StreamedLayers, stream
from gblm.model.linears import hidden_size, prunable
from gblm.model.loading import load_tokenizer
from gblm.recipe import Calibration, Choice, Recipe, choose
from gblm.sparse.patterns import Dense, parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A recipe, the dense model that it prunes, and what follows from the two.

    Attributes:
        recipe: of the run; its calibration is None where no step runs text through the model.
        layers: the dense model, read one decoder layer at a time.
        choices: what each linear is pruned and rounded to, by full name; others stay dense.
        pipeline: what happens to each linear.
        training: what happens to each decoder layer afterwards; None leaves it as it is.
        head: the output head as it is to be packed; None leaves it floating.
        ranks: the processes that share the calibration samples.
    """

    recipe: Recipe
    layers: StreamedLayers
    choices: Mapping[str, Choice]
    pipeline: Pipeline
    training: Training | None = None
    head: Head | None = None
    ranks: Ranks = ALONE

    @property
    def folder(self) -> ModelFolder:
        """Give the dense model's folder."""
        return self.layers.reader.folder

    @property
    def keeps_values(self) -> bool:
        """Whether kept weights stay bit for bit, until they are rounded to codes."""
        return self.pipeline.keeps_values and self.training is None

    @cached_property
    def model_sha256(self) -> str:
        """The hash of the model's config.json and weights; reading them all takes a while."""
        return self.layers.reader.sha256()

    @cached_property
    def saved(self) -> StatsFolder | None:
        """Statistics of an earlier run that stand for calibration text, checked; or None.

        Raises:
            InputError: they are of another model.
            UsageError: they lack something that the pipeline needs.
        """
        if self.recipe.stats is None or not self.pipeline.needs:
            return None
        found, names = StatsFolder(Path(self.recipe.stats)), frozenset(self.choices)
        needs, norm = self.pipeline.needs, self.pipeline.gradient_norm
        found.check(self.model_sha256, len(self.layers), names, needs, norm)
        if (prefix := found.facts().get("prefix")) != "dense":
            logger.warning("the statistics were taken behind layers pruned by %s", prefix)
        return found

    @cached_property
    def windows(self) -> Tensor | None:
        """Calibration token ids [samples, tokens] of all ranks; None where no text is run.

        Raises:
            InputError: the text cannot be read.
            UsageError: there is too little of it.
        """
        wanted = self.recipe.calibration
        if wanted is None:
            return None
        return draw(
            wanted.source,
            self.folder.path,
            load_tokenizer(self.folder),
            wanted.num_samples,
            wanted.seq_len,
            wanted.seed,
            wanted.bos,
        )

    @cached_property
    def calibration_sha256(self) -> str | None:
        """The hash of the token ids that the statistics are taken on; None without any."""
        if self.saved is not None:
            found: str | None = self.saved.facts().get("calibration_sha256")
            return found
        return data.fingerprint(self.windows) if self.windows is not None else None

    def batches(self) -> list[Tensor]:
        """Return this rank's token ids, each [samples, tokens] int64."""
        wanted = self.recipe.calibration
        if self.windows is None or wanted is None:
            return []
        if wanted.order == "sequential":
            own = self.ranks.share(list(self.windows))
            return [torch.stack(own)] if own else []
        return self.ranks.share(self.windows.split(wanted.batch_size))

    def activation_bytes(self) -> int:
        """Count the bytes of this rank's samples at the input of one decoder layer."""
        tokens = sum(batch.numel() for batch in self.batches())
        return tokens * hidden_size(self.layers.model) * self.layers.dtype.itemsize


@contextmanager
def open_job(recipe: Recipe, ranks: Ranks = ALONE) -> Iterator[Job]:
    """Open a recipe's model and check whatever its headers can tell; no weight or text is read.

    Args:
        recipe: all inputs of the run.
        ranks: the processes that share the calibration samples.

    Raises:
        GblmError: the run would be refused: a method, pattern or value type is unknown or does not
            fit the model, or the model is none that can be pruned.
    """
    pipeline, training = _pipeline(recipe), _training(recipe)
    recipe = recipe.model_copy(update={"calibration": _text(recipe, pipeline)})
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    with stream(ModelFolder.open(recipe.model), dtype, rank_device(recipe.device)) as layers:
        choices = choose(recipe, prunable(layers.model, recipe.targets, recipe.ignore))
        _check_steps(recipe, pipeline, choices, ranks)
        check_packable(layers.reader, choices)
        head = output_head(layers, recipe.head)
        yield Job(recipe, layers, choices, pipeline, training, head, ranks)


def _pipeline(recipe: Recipe) -> Pipeline:
    """Build the steps of one linear; where all patterns are dense no method is asked."""
    refit = recipe.refit.model_dump() if recipe.refit is not None else None
    pipeline = make_pipeline(recipe.method, recipe.options, refit, recipe.rounding)
    factored = isinstance(pipeline.method, SparseGPT) and recipe.rounding == "obs"
    if not factored and all(isinstance(parse(text), Dense) for text in recipe.patterns):
        return replace(pipeline, method=Magnitude())
    return pipeline


def _training(recipe: Recipe) -> Training | None:
    wanted = recipe.reconstruct
    return Training(**wanted.model_dump()) if wanted is not None else None


def _text(recipe: Recipe, pipeline: Pipeline) -> Calibration | None:
    """Return the text that is run through the model; None if no step needs any."""
    if recipe.stats is not None or not (pipeline.needs or recipe.reconstruct):
        return None
    if recipe.calibration is None:
        what = "refit" if pipeline.refit is not None else f"rounding {pipeline.rounding}"
        if pipeline.method.needs:
            what = f"method {recipe.method}"
        raise UsageError(f"{what} needs calibration text.")
    return recipe.calibration


def _check_steps(
    recipe: Recipe, pipeline: Pipeline, choices: Mapping[str, Choice], ranks: Ranks
) -> None:
    """Refuse a refit that has nothing to do, and ranks that are left without a sample."""
    dense = all(isinstance(choice.pattern, Dense) for choice in choices.values())
    if pipeline.refit is not None and dense:
        raise UsageError("refit moves what pruning leaves, and the pattern dense prunes nothing.")
    text = recipe.calibration
    if text is not None and text.num_batches < ranks.size:
        raise UsageError(
            f"{ranks.size} ranks cannot share {text.num_samples} samples: give each a batch of its "
            "own (--num-samples)."
        )
