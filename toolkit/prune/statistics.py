"""Statistics of a job: how its text is walked, its gradient norms, what is read or saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gblm.calibrate.activations import place
from gblm.calibrate.gradients import Gradients, gradient_norms, num_steps, resident_fits
from gblm.calibrate.saved import LayerStats, StatsFolder
from gblm.calibrate.stats import STATS
from gblm.calibrate.walk import Walk
from gblm.progress import Progress
from gblm.prune.job import Job
from gblm.recipe import Recipe

GRADIENTS = frozenset({"grad_norm"})


def how_to_walk(job: Job, scratch: Path, first: int) -> Walk:
    """Say how the job's text runs through the decoder layers, of which `first` are finished.

    Args:
        job: to be run.
        scratch: for activations, if memory is short.
        first: index of the first decoder layer that is still to be pruned.
    """
    text, keep_dense = job.recipe.calibration, job.training is not None
    return Walk(
        needs=frozenset(STATS) & job.pipeline.needs if job.saved is None else frozenset(),
        first=first,
        prefix=text.prefix if text else "pruned",
        order=text.order if text else "layer",
        scratch=place(scratch, job.activation_bytes() * (2 if keep_dense else 1)),
        keep_dense=keep_dense,
    )


def make_gradients(job: Job, folder: StatsFolder, scratch: Path, progress: Progress) -> None:
    """Fill a folder with the gradient norms of the dense model; rank 0 writes.

    Args:
        job: to be run, with calibration text.
        folder: to write to.
        scratch: for the inputs of all decoder layers, if memory is short.
        progress: for a progress bar.
    """
    if job.windows is None:
        return
    ranks, layers = job.ranks, job.layers
    samples = ranks.share(list(job.windows))
    resident = ranks.agree(int(all_layers_fit(job))) == 1
    how = Gradients(
        norm=job.pipeline.gradient_norm or "l2",
        names=frozenset(job.choices),
        scratch=place(scratch, job.activation_bytes() * (len(layers) + 2)),
        resident=resident,
        on_step=progress("gradients", num_steps(layers, len(samples), resident)),
    )
    for index, norms in gradient_norms(layers, samples, how, ranks):
        prefix = layers.name(index) + "."
        if ranks.leads:
            own = {n.removeprefix(prefix): {"grad_norm": t} for n, t in norms.items()}
            folder.write(index, own)
    if ranks.leads:
        folder.finish(facts(job, GRADIENTS))


def stored(job: Job, gradients: StatsFolder) -> Callable[[int], LayerStats]:
    """Return a reader of the statistics that the walk does not collect itself, by decoder layer.

    Args:
        job: to be run.
        gradients: the folder that `make_gradients` has filled, if the job needs them.
    """
    if job.saved is not None:
        return partial(_read, job.saved, job.pipeline.needs)
    if "grad_norm" in job.pipeline.needs:
        return partial(_read, gradients, GRADIENTS)
    return lambda index: {}


def facts(job: Job, needs: frozenset[str]) -> dict[str, Any]:
    """Describe those of a job's statistics that are in `needs`, for stats.json."""
    text = job.recipe.calibration
    pruned = text is None or text.prefix == "pruned"
    return {
        "model": job.model_sha256,
        "linears": sorted(job.choices),
        "needs": sorted(needs),
        "gradient_norm": job.pipeline.gradient_norm,
        "num_samples": len(job.windows) if job.windows is not None else 0,
        "calibration_sha256": job.calibration_sha256,
        "prefix": _prefix(job.recipe) if pruned else "dense",
        "order": text.order if text else "layer",
    }


def all_layers_fit(job: Job) -> bool:
    """Tell whether there is room for all layers, and a sum per weight, at once."""
    model, prefix = job.layers.model, job.layers.prefix
    count = sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefix))
    weights = sum(model.get_submodule(name).weight.numel() for name in job.choices)
    return resident_fits(count, weights, job.layers.dtype, job.layers.device)


def _prefix(recipe: Recipe) -> str:
    """Say in words how the layers in front of one were made."""
    steps = [name for name in ("refit", "reconstruct") if getattr(recipe, name) is not None]
    return ", ".join([f"{recipe.method} {', '.join(recipe.patterns)}", *steps])


def _read(folder: StatsFolder, wanted: frozenset[str], index: int) -> LayerStats:
    stats = folder.read(index, wanted)
    if "grad_norm" not in wanted:
        return stats
    # The method's formula may divide by it; see GBLM's mode "mean".
    samples = torch.tensor(float(folder.facts()["num_samples"]))
    return {local: own | {"num_samples": samples} for local, own in stats.items()}
