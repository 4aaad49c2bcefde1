"""plan(): what a pruning run will take, from shapes, without doing its work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gblm.calibrate.activations import fits
from gblm.calibrate.gradients import resident_fits
from gblm.calibrate.ranks import Ranks
from gblm.calibrate.saved import StatsFolder
from gblm.calibrate.stats import STATS
from gblm.errors import MachineError
from gblm.methods import METHODS
from gblm.model.loading import check_device
from gblm.plan.disk import occupy
from gblm.plan.memory import peaks
from gblm.plan.rates import probe
from gblm.plan.seconds import spend
from gblm.plan.setting import Setting
from gblm.plan.shapes import Shapes, read_shapes
from gblm.prune.job import Job, open_job
from gblm.recipe import Recipe


def plan(recipe: Recipe, ranks: int = 1) -> dict[str, Any]:
    """Predict memory, disk and time of `gblm.prune.prune(recipe, …)`.

    Headers and config.json are read, rates are probed for about a second and a half; no weight and
    no text is read, and nothing is written.

    Args:
        recipe: all inputs of the run.
        ranks: processes that share the samples, as under torchrun.

    Returns:
        Plain JSON types. "groups": the linears by pattern and values, with bits per weight.
        "phases": for each phase its peaks "ram_bytes" and, on a GPU, "gpu_bytes", the moments of
        the peaks and their terms, and "seconds". "ram_bytes" and "gpu_bytes": the highest of them,
        of rank 0. "disk": bytes of the output, of all that lies on disk at once, and of the rest
        by purpose. "seconds": in all; None where the device is not there to be probed.

    Raises:
        GblmError: whatever `prune` would refuse before it computes, apart from the text, the
            output, and what only the weights themselves can show.
    """
    device = _device(recipe.device)
    with open_job(recipe.model_copy(update={"device": "cpu"}), Ranks(size=ranks)) as job:
        shapes = read_shapes(job)
    pipeline, training, calibration = job.pipeline, job.training, job.recipe.calibration
    needs = pipeline.needs
    if needs and recipe.stats is not None:
        norm, names = pipeline.gradient_norm, frozenset(shapes.names)
        StatsFolder(Path(recipe.stats)).check(None, len(shapes.layers), names, needs, norm)
    # Ranks are taken to share this machine's memory.
    inputs, host = ranks * shapes.hidden_states(shapes.samples), torch.device("cpu")
    streams = inputs * (1 if training is None else 2)
    setting = Setting(
        shapes=shapes,
        pipeline=pipeline,
        training=training,
        name=next(name for name, kind in METHODS.items() if type(pipeline.method) is kind),
        collects=needs if calibration is not None else frozenset(),
        reads=needs if recipe.stats is not None else frozenset(),
        passes=_passes(job),
        sequential=calibration is not None and calibration.order == "sequential",
        in_memory=(fits(streams, host), fits(inputs * (len(shapes.layers) + 2), host)),
        resident=device is not None and _resident(shapes, device, ranks),
        device=torch.device(recipe.device).type,
    )
    return {"method": recipe.method, **_predict(setting, device, ranks)}


def _device(name: str) -> torch.device | None:
    """The device if it is there; a GPU that is not can be planned for, but not probed."""
    try:
        return check_device(name)
    except MachineError:
        return None


def _passes(job: Job) -> int:
    """How often the text runs through each layer while it is pruned, training apart."""
    calibration = job.recipe.calibration
    if calibration is None:
        return 0
    observing = int(not job.pipeline.needs.isdisjoint(STATS))
    if job.training is not None:
        return observing + 2  # through the dense layer, and through the one that was trained
    twice = calibration.prefix == "pruned" and calibration.order == "layer"
    return 2 * observing if twice else observing


def _resident(shapes: Shapes, device: torch.device, ranks: int) -> bool:
    """Whether gradients would be taken with all layers in memory."""
    shared = ranks if device.type == "cpu" else 1
    parameters = sum(layer.parameters for layer in shapes.layers)
    weights = sum(layer.weights for layer in shapes.layers)
    return resident_fits(shared * parameters, shared * weights, shapes.dtype, device)


def _predict(setting: Setting, device: torch.device | None, ranks: int) -> dict[str, Any]:
    phases, on_disk, head = peaks(setting), occupy(setting), setting.shapes.packed_head
    spent = spend(setting, probe(setting, device), on_disk) if device is not None else {}
    for phase in phases:
        phase["seconds"] = round(spent[phase["phase"]], 1) if spent else None
    return {
        "groups": _groups(setting.shapes),
        "head": "float" if head is None else str(head.fmt.values),
        "dtype": str(setting.shapes.dtype).removeprefix("torch."),
        "device": setting.device,
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "phases": phases,
        "ram_bytes": max(phase["ram_bytes"] for phase in phases),
        "gpu_bytes": max(phase.get("gpu_bytes", 0) for phase in phases),
        "disk": on_disk.to_dict(),
        "start_seconds": round(spent["start"], 1) if spent else None,
        "seconds": round(sum(spent.values()), 1) if spent else None,
    }


def _groups(shapes: Shapes) -> list[dict[str, Any]]:
    """What the output will hold, by pattern and values."""
    return [
        {
            "format": choice.fmt.name,
            "pattern": str(choice.pattern),
            "values": str(choice.values),
            "linears": len(linears),
            "weights": (weights := sum(own.weights for own in linears)),
            "bits_per_weight": round(8 * sum(own.packed for own in linears) / weights, 4),
        }
        for choice, linears in shapes.chosen.items()
    ]
