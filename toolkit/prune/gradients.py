"""The gradient norms of a job: taken before the first decoder layer is pruned, kept until the end.

The backward pass gives the last layer first and pruning begins with the first, so that all of them
lie on disk, in the work folder of the run: a file for each decoder layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from gblm.calibrate.gradients import gradient_norms
from gblm.checkpoint.resume import COMPLETE
from gblm.files import write_json, write_tensors
from gblm.progress import Progress
from gblm.prune.job import Job
from gblm.prune.layer import LayerStats


def take_gradients(job: Job, folder: Path, scratch: Path, progress: Progress) -> None:
    """Fill the folder, if the method reads gradients and no earlier run has filled it.

    Args:
        job: every rank has the same, and rank 0 writes.
        folder: it is complete once COMPLETE is there.
        scratch: for the inputs of all decoder layers, if memory is short.
        progress: for a progress bar.
    """
    complete = (folder / COMPLETE).exists()
    if job.windows is None or not job.reads_gradients or job.ranks.agree(int(complete)):
        return
    norms_by_layer = gradient_norms(
        job.layers, job.ranks.share(list(job.windows)), job.formats, job.pipeline.gradient_norm,
        scratch=scratch, progress=progress, ranks=job.ranks,
    )  # fmt: skip
    for index, norms in norms_by_layer:
        if job.ranks.leads:
            folder.mkdir(parents=True, exist_ok=True)
            prefix = job.layers.name(index) + "."
            own = {name.removeprefix(prefix): tensor.cpu() for name, tensor in norms.items()}
            write_tensors(_file(folder, index), own)
    if job.ranks.leads:
        write_json(folder / COMPLETE, {"layers": len(job.layers)})


def read_gradients(job: Job, folder: Path, index: int) -> LayerStats:
    """Read those of a decoder layer, by local name of the linear; nothing if none are needed.

    Returns:
        "grad_norm" [out, in], and "num_samples" [], how many samples it sums over, by which the
        method's formula may divide it.
    """
    if job.windows is None or not job.reads_gradients:
        return {}
    samples = torch.tensor(float(len(job.windows)))
    norms = load_file(_file(folder, index))
    return {name: {"grad_norm": tensor, "num_samples": samples} for name, tensor in norms.items()}


def _file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"
