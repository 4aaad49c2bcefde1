"""Job: one pruning run whose inputs have been opened and checked, but nothing computed yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gblm import data
from gblm.calibrate.ranks import ALONE, Ranks, rank_device
from gblm.calibrate.stats import STATS
from gblm.calibrate.text import draw
from gblm.calibrate.walk import DecoderLayer, Walk, walk
from gblm.checkpoint.head import Head, output_head
from gblm.checkpoint.pack import check_packable
from gblm.errors import UsageError
from gblm.methods.pipeline import Pipeline, make_pipeline
from gblm.methods.scores import Magnitude
from gblm.model.folder import ModelFolder
from gblm.model.layers import Layers, stream
from gblm.model.linears import prunable
from gblm.model.loading import load_tokenizer
from gblm.prune.choose import choose
from gblm.recipe import Calibration, Recipe
from gblm.sparse.formats import Format
from gblm.sparse.patterns import Dense


@dataclass(frozen=True)
class Job:
    """A job is a recipe, the dense model that it prunes, and what follows from the two.

    Attributes:
        recipe: of the run, which ends before a recovery; its calibration is None where no step
            runs text through the model.
        layers: the dense model, read one decoder layer at a time.
        formats: what each linear is pruned and rounded to, by full name; others stay dense.
        pipeline: what happens to each linear.
        head: the output head as it is to be packed; None leaves it floating.
        ranks: the processes that share the calibration samples.
    """

    recipe: Recipe
    layers: Layers
    formats: Mapping[str, Format]
    pipeline: Pipeline
    head: Head | None = None
    ranks: Ranks = ALONE

    @property
    def folder(self) -> ModelFolder:
        """Give the dense model's folder."""
        return self.layers.reader.folder

    @property
    def keeps_values(self) -> bool:
        """Tell whether kept weights stay bit for bit, until they are rounded to codes."""
        return self.pipeline.keeps_values and self.recipe.reconstruct is None

    @property
    def reads_gradients(self) -> bool:
        """Tell whether the method reads gradient norms."""
        return "grad_norm" in self.pipeline.needs

    @property
    def rounds_head(self) -> bool:
        """Tell whether the head is rounded by the errors of its codes; 8 bits leave hardly any."""
        by_errors = self.pipeline.rounding == "obs" and self.recipe.calibration is not None
        return self.head is not None and self.head.fmt.values.in_nibbles and by_errors

    @cached_property
    def model_sha256(self) -> str:
        """Hash the model's config.json and weights; reading them all takes a while."""
        return self.layers.reader.sha256()

    @cached_property
    def windows(self) -> Tensor | None:
        """Draw the token ids of the calibration text, [samples, tokens] int64; None without any.

        Raises:
            InputError: the text cannot be read.
            UsageError: there is too little of it.
        """
        text = self.recipe.calibration
        if text is None:
            return None
        return draw(text, self.folder.path, load_tokenizer(self.folder))

    @cached_property
    def calibration_sha256(self) -> str | None:
        """Hash the token ids that the statistics are taken on; None without any."""
        return data.fingerprint(self.windows) if self.windows is not None else None

    def batches(self) -> list[Tensor]:
        """Return this rank's token ids, each [samples, tokens] int64."""
        text = self.recipe.calibration
        if self.windows is None or text is None:
            return []
        own = self.ranks.share(list(self.windows.split(1)))
        return [torch.cat(own)] if own and text.order == "sequential" else own

    def walk(
        self, scratch: Path, batches: Sequence[Tensor] | None = None
    ) -> Iterator[DecoderLayer]:
        """Visit the decoder layers with the statistics that the pipeline reads.

        Args:
            scratch: folder for activations, if memory is short.
            batches: the text; all of it if None.
        """
        text = self.recipe.calibration
        how = Walk(
            needs=frozenset(STATS) & self.pipeline.needs,
            order=text.order if text else "layer",
            scratch=scratch,
            keep_dense=self.recipe.reconstruct is not None,
            shrinkage=text.shrinkage if text else 0.0,
        )
        return walk(self.layers, self.batches() if batches is None else batches, how, self.ranks)

    def most_bytes(self, name: str) -> int:
        """Bound the bytes of a linear as it will be packed."""
        (rows, columns), dtype = self.layers.reader.headers[f"{name}.weight"]
        return self.formats[name].most_bytes((rows, columns), dtype, self.pipeline.method.scope)


@contextmanager
def open_job(recipe: Recipe, ranks: Ranks = ALONE) -> Iterator[Job]:
    """Open a recipe's model and check whatever its headers can tell; no weight or text is read.

    Raises:
        GblmError: the run would be refused: a method, pattern or value type is unknown or does not
            fit the model, or the model is none that can be pruned.
    """
    refit = recipe.refit.model_dump() if recipe.refit is not None else None
    pipeline = make_pipeline(recipe.method, recipe.options, refit, recipe.rounding)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    with stream(ModelFolder.open(recipe.model), dtype, rank_device(recipe.device)) as layers:
        names = [layers.name(index) for index in range(len(layers))]
        formats = choose(recipe, prunable(layers.model, recipe.ignore), names)
        if all(isinstance(fmt.pattern, Dense) for fmt in formats.values()):
            pipeline = _without_a_mask(pipeline)
        text = _text(recipe, pipeline)
        if text is not None and text.num_samples < ranks.size:
            raise UsageError(
                f"{ranks.size} ranks cannot share {text.num_samples} samples: give each one of its "
                "own (--num-samples)."
            )
        check_packable(layers.reader, formats)
        recipe = recipe.model_copy(update={"calibration": text, "recover": None})
        yield Job(recipe, layers, formats, pipeline, output_head(layers, recipe.head), ranks)


def _without_a_mask(pipeline: Pipeline) -> Pipeline:
    """Return the steps where all patterns are dense: no method is asked, and nothing to refit."""
    if pipeline.refit is not None:
        raise UsageError("refit moves what pruning leaves, and the pattern dense prunes nothing.")
    # The rounding takes the damping of a method that has one.
    damps = pipeline.rounding == "obs" and hasattr(pipeline.method, "damping")
    return pipeline if damps else replace(pipeline, method=Magnitude())


def _text(recipe: Recipe, pipeline: Pipeline) -> Calibration | None:
    """Return the text that is run through the model; None if no step needs any."""
    if not (pipeline.needs or recipe.reconstruct):
        return None
    if recipe.calibration is None:
        what = "refit" if pipeline.refit is not None else f"rounding {pipeline.rounding}"
        if pipeline.method.needs:
            what = f"method {recipe.method}"
        raise UsageError(f"{what} needs calibration text.")
    return recipe.calibration
