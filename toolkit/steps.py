"""Steps: what a recipe does with each linear and decoder layer, settled up front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gblm.calibrate.reconstruct import Training
from gblm.choices import Choice, patterns_of
from gblm.errors import UsageError
from gblm.methods.magnitude import Magnitude
from gblm.methods.pipeline import Pipeline, make_pipeline
from gblm.methods.sparsegpt import SparseGPT
from gblm.patterns import Dense, parse
from gblm.recipe import Calibration, Recipe


@dataclass(frozen=True)
class Steps:
    """The steps of a recipe.

    Attributes:
        pipeline: what happens to each linear.
        training: what happens to each decoder layer afterwards; None leaves it as it is.
        calibration: the text that is run through the model; None if no step needs any.
    """

    pipeline: Pipeline
    training: Training | None
    calibration: Calibration | None

    @property
    def keeps_values(self) -> bool:
        """Whether kept weights stay bit for bit, until they are rounded to codes."""
        return self.pipeline.keeps_values and self.training is None

    def check(self, choices: Mapping[str, Choice], ranks: int) -> None:
        """Refuse what these steps cannot do.

        Args:
            choices: what each linear is pruned to.
            ranks: processes that share the samples.

        Raises:
            UsageError: refit has nothing to do, or a rank is left without a sample.
        """
        patterns = patterns_of(choices)
        if self.pipeline.refit is not None and all(isinstance(p, Dense) for p in patterns):
            raise UsageError(
                "refit moves what pruning leaves, and the pattern dense prunes nothing."
            )
        text = self.calibration
        if text is not None and text.num_batches < ranks:
            raise UsageError(
                f"{ranks} ranks cannot share {text.num_samples} samples: give each a batch of its "
                "own (--num-samples)."
            )


def steps_of(recipe: Recipe) -> Steps:
    """The steps of a recipe. Where all patterns are dense the method is not asked for statistics.

    Raises:
        UsageError: the method or one of its options is unknown, or there is no text for a step
            that needs it.
    """
    refit = recipe.refit.model_dump() if recipe.refit is not None else None
    pipeline = make_pipeline(recipe.method, recipe.options, refit, recipe.rounding)
    factored = isinstance(pipeline.method, SparseGPT) and recipe.rounding == "obs"
    if not factored and all(isinstance(parse(text), Dense) for text in recipe.patterns):
        pipeline = replace(pipeline, method=Magnitude())
    wanted, text = recipe.reconstruct, recipe.calibration
    training = Training(**wanted.model_dump()) if wanted is not None else None
    if recipe.stats is not None or not (pipeline.needs or training):
        return Steps(pipeline, training, None)
    if text is None:
        raise UsageError(f"{_what_needs_text(recipe, pipeline)} needs calibration text.")
    return Steps(pipeline, training, text)


def _what_needs_text(recipe: Recipe, pipeline: Pipeline) -> str:
    if pipeline.method.needs:
        return f"method {recipe.method}"
    return "refit" if pipeline.refit is not None else f"rounding {pipeline.rounding}"
