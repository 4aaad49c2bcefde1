"""Output: where a run writes; what can be refused about it before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gblm.checkpoint.pack import check_room
from gblm.checkpoint.write import check_output, folder_bytes
from gblm.errors import InputError, UsageError
from gblm.prune.job import Job
from gblm.prune.resume import is_complete, remove_leftovers, work_path


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

    def check(self, job: Job) -> None:
        """Refuse what is in the way, and a disk that cannot hold finished layers and the folder.

        Raises:
            GblmError: an output is not free, the disk has no room, or the head cannot be packed.
        """
        remove_leftovers(self.folder)
        self._check_save_stats(job)
        reader, head = job.layers.reader, job.head
        if head is not None:
            head.check(reader)
        extra = self.extra_bytes(job) - folder_bytes(work_path(self.folder))
        check_room(reader, self.folder, self.overwrite, extra)

    def extra_bytes(self, job: Job) -> int:
        """What lies on disk at the end of a run besides the folder itself, at most."""
        reader = job.layers.reader
        sizes = {name: math.prod(reader.headers[f"{name}.weight"][0]) for name in job.choices}
        layers = int(1.1 * sum(reader.num_bytes(f"{name}.weight") for name in job.choices))
        # Updated values are kept unrounded as well; codes are exact.
        floats = sum(sizes[name] for name, choice in job.choices.items() if choice.values.is_float)
        exact = 0 if job.keeps_values else 4 * floats
        collects = "grad_norm" in job.pipeline.needs and job.recipe.stats is None
        gradients = 4 * sum(sizes.values()) if collects else 0
        saved = gradients if self.save_stats is not None else 0
        return layers + exact + gradients + saved + (job.head.num_bytes if job.head else 0)

    def _check_save_stats(self, job: Job) -> None:
        target = self.save_stats
        if target is None:
            return
        if not job.pipeline.needs:
            raise UsageError("--save-stats: this method collects no statistics.")
        if job.recipe.stats is not None:
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
