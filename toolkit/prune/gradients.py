"""The gradient norms of a job: taken before the first decoder layer is pruned, kept until the end.

The backward pass gives the last layer first and pruning begins with the first, so that all of them
lie on disk, in the work folder of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from gblm.calibrate.gradients import Gradients, gradient_norms
from gblm.checkpoint.resume import COMPLETE
from gblm.files import write_json, write_tensors
from gblm.progress import Progress
from gblm.prune.job import Job
from gblm.prune.layer import LayerStats


@dataclass(frozen=True)
class GradientNorms:
    """The folder holds a file for each decoder layer; they count once all of them are there."""

    job: Job
    path: Path

    @property
    def are_needed(self) -> bool:
        """Tell whether the method reads them."""
        return "grad_norm" in self.job.pipeline.needs

    def take(self, scratch: Path, progress: Progress) -> None:
        """Fill the folder, unless an earlier run has; every rank calls this, and rank 0 writes.

        Args:
            scratch: for the inputs of all decoder layers, if memory is short.
            progress: for a progress bar.
        """
        job, complete = self.job, (self.path / COMPLETE).exists()
        if job.windows is None or not self.are_needed or job.ranks.agree(int(complete)):
            return
        samples = job.ranks.share(list(job.windows))
        how = Gradients(job.pipeline.gradient_norm, frozenset(job.formats), scratch, progress)
        for index, norms in gradient_norms(job.layers, samples, how, job.ranks):
            if job.ranks.leads:
                self.path.mkdir(parents=True, exist_ok=True)
                prefix = job.layers.name(index) + "."
                own = {name.removeprefix(prefix): tensor.cpu() for name, tensor in norms.items()}
                write_tensors(self._file(index), own)
        if job.ranks.leads:
            write_json(self.path / COMPLETE, {"layers": len(job.layers)})

    def read(self, index: int) -> LayerStats:
        """Read those of a decoder layer, by local name of the linear; nothing if none are needed.

        Returns:
            "grad_norm" [out, in], and "num_samples" [], how many samples it sums over, by which
            the method's formula may divide it.
        """
        if self.job.windows is None or not self.are_needed:
            return {}
        samples = torch.tensor(float(len(self.job.windows)))
        norms = load_file(self._file(index))
        return {name: {"grad_norm": t, "num_samples": samples} for name, t in norms.items()}

    def _file(self, index: int) -> Path:
        return self.path / f"layer-{index:05d}.safetensors"
