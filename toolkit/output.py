"""Output: where a run writes; what can be refused about it before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gblm.checkpoint.packer import check_room
from gblm.checkpoint.work import is_complete, remove_leftovers, work_path
from gblm.checkpoint.writer import check_output, folder_bytes
from gblm.choices import Choice
from gblm.errors import InputError, UsageError
from gblm.layers import StreamedLayers
from gblm.model import output_head
from gblm.recipe import Recipe
from gblm.steps import Steps


@dataclass(frozen=True)
class Output:
    """Where a run writes, and what it does with what is there.

    Attributes:
        folder: the packed folder to make; it appears complete or not at all.
        overwrite: replace an existing folder.
        resume: go on after the finished layers of an earlier run of the same recipe.
        save_stats: a folder for the statistics, to be used by other recipes.
    """

    folder: Path
    overwrite: bool = False
    resume: bool = True
    save_stats: Path | None = None

    def check(
        self, recipe: Recipe, steps: Steps, source: StreamedLayers, choices: Mapping[str, Choice]
    ) -> None:
        """The outputs are free, and the disk holds finished layers besides the folder itself.

        Args:
            recipe: of the run.
            steps: made from it.
            source: the dense model.
            choices: what each linear is pruned to.

        Raises:
            GblmError: an output is not free, the disk has no room, or the head cannot be packed.
        """
        remove_leftovers(self.folder)
        self._check_save_stats(recipe, steps)
        reader = source.reader
        head = output_head(source.model, recipe.head, reader)
        if head is not None:
            head.check(reader)
        sizes = {name: math.prod(reader.headers[f"{name}.weight"][0]) for name in choices}
        layers = int(1.1 * sum(reader.num_bytes(f"{name}.weight") for name in choices))
        # Updated values are kept unrounded as well; codes are exact.
        floats = sum(sizes[name] for name, choice in choices.items() if choice.values.is_float)
        exact = 0 if steps.keeps_values else 4 * floats
        collects = "grad_norm" in steps.pipeline.needs and recipe.stats is None
        gradients = 4 * sum(sizes.values()) if collects else 0
        saved = gradients if self.save_stats is not None else 0
        there = folder_bytes(work_path(self.folder))
        extra = layers + exact + gradients + saved + (head.num_bytes if head else 0) - there
        check_room(reader, self.folder, self.overwrite, extra)

    def _check_save_stats(self, recipe: Recipe, steps: Steps) -> None:
        target = self.save_stats
        if target is None:
            return
        if not steps.pipeline.needs:
            raise UsageError("--save-stats: this method collects no statistics.")
        if recipe.stats is not None:
            raise UsageError("--save-stats does not go with --stats: nothing new is collected.")
        folder, place = self.folder.resolve(), target.resolve()
        if place.is_relative_to(folder) or folder.is_relative_to(place):
            raise UsageError(
                f"--save-stats {target} and --output {self.folder} lie in one another."
            )
        if is_complete(self.folder) and target.exists():
            return
        if target.exists():
            raise InputError(f"{target} exists; choose another --save-stats, or remove it.")
        check_output(target, overwrite=False)
