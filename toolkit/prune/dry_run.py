"""Dry run: what a pruning run will write, and the memory and time that it will take.

Everything is checked as for the run itself. Then one decoder layer is pruned for real on a part of
the text; memory and time follow from what that took. Nothing is written but scratch files.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.calibrate.activations import fits
from gblm.calibrate.frame import capture, loss
from gblm.calibrate.gradients import folding
from gblm.calibrate.saved import LayerStats, StatsFolder
from gblm.calibrate.walk import DecoderLayer, walk
from gblm.checkpoint.pack import Packing
from gblm.checkpoint.write import SHARD_BYTES
from gblm.errors import UsageError
from gblm.model.linears import hidden_size, linears
from gblm.progress import Progress, no_progress
from gblm.prune.job import Job, open_job
from gblm.prune.layer import prune_layer
from gblm.prune.run import Output, extent
from gblm.prune.statistics import all_layers_fit, how_to_walk, stored
from gblm.recipe import Choice, Recipe
from gblm.recover.needs import settle
from gblm.recover.run import check_texts
from gblm.sparse.formats.size import is_exact, most_bytes

# Text that the timed decoder layer sees at most, unless one batch has more.
TOKENS = 8192
# What the allocator keeps, and what later layers add, on top of everything that was counted.
MARGIN, SLACK = 1.15, 64 << 20
# Float32 values that one token needs in a decoder layer, of the hidden and of the widest size: on
# the way up, and kept for the way down.
FORWARD, KEPT = (8, 4), (12, 6)


def dry_run(recipe: Recipe, output: Output, progress: Progress = no_progress) -> dict[str, Any]:
    """Check a pruning run and tell what it will take.

    Args:
        recipe: all inputs of the run.
        output: where it would write.
        progress: for progress bars.

    Returns:
        Plain JSON types. "groups": the linears by pattern and values, with their bits per weight.
        "bytes_packed": of all tensors of the packed folder, or at most so many if "exact" is False.
        "disk_bytes", "memory_bytes" and "gpu_bytes": upper bounds while it runs. "seconds": an
        estimate from one decoder layer on this machine. "recover": the tokens, memory and disk of
        a recovery, or None.

    Raises:
        UsageError: several processes were started.
        GblmError: whatever `prune` would refuse before it computes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a dry run takes one process: start it without torchrun.")
    began = time.perf_counter()
    with open_job(recipe) as job, tempfile.TemporaryDirectory(prefix="gblm-dry-run-") as scratch:
        output.check(job)
        step = progress("one decoder layer", 1)
        job.batches()  # reads the text
        seconds = time.perf_counter() - began + _seconds(job, Path(scratch))
        step()
        reader = job.layers.reader
        packed = {name: _packed_bytes(job, name, choice) for name, choice in job.choices.items()}
        pruned = sum(reader.num_bytes(f"{name}.weight") for name in packed)
        dense = sum(map(reader.num_bytes, reader))
        size = dense - pruned + sum(packed.values()) + (job.head.added_bytes if job.head else 0)
        memory, gpu = _memory_bytes(job, size)
        scope = job.pipeline.method.scope
        return {
            "method": recipe.method,
            "groups": _groups(job, packed),
            "head": str(job.head.fmt.values) if job.head else "float",
            "bits_per_weight": round(8 * sum(packed.values()) / _weights(job, packed), 4),
            "bytes_dense": dense,
            "bytes_packed": size,
            "exact": all(is_exact(c.pattern, c.values, scope) for c in job.choices.values()),
            "disk_bytes": size + output.extra_bytes(job),
            "memory_bytes": memory,
            "gpu_bytes": gpu,
            "seconds": round(seconds, 3),
            "recover": _recovery(job, recipe),
        }


def _recovery(job: Job, recipe: Recipe) -> dict[str, int] | None:
    """Tell what a recovery will take; None where there is none."""
    if recipe.recover is None:
        return None
    check_texts(recipe.recover)
    size = extent(job)
    how = settle(recipe.recover, size, recipe.device)
    return {
        "tokens": how.tokens,
        "memory_bytes": size.memory(how, how.train),
        "disk_bytes": size.disk(how, how.train),
    }


def _weights(job: Job, names: Iterable[str]) -> int:
    """Count the weights of some linears."""
    headers = job.layers.reader.headers
    return sum(prod(headers[f"{name}.weight"][0]) for name in names)


def _packed_bytes(job: Job, name: str, choice: Choice) -> int:
    (rows, columns), dtype = job.layers.reader.headers[f"{name}.weight"]
    scope = job.pipeline.method.scope
    return most_bytes(choice.pattern, choice.values, (rows, columns), dtype, scope)


def _groups(job: Job, packed: Mapping[str, int]) -> list[dict[str, Any]]:
    """Sum up the choices by what linears become."""
    names: dict[Choice, list[str]] = {}
    for name, choice in job.choices.items():
        names.setdefault(choice, []).append(name)
    rows = []
    for choice, own in names.items():
        weights = _weights(job, own)
        rows.append({
            "format": choice.fmt.name,
            "pattern": str(choice.pattern),
            "values": str(choice.values),
            "linears": len(own),
            "weights": weights,
            "bits_per_weight": round(8 * sum(packed[name] for name in own) / weights, 4),
        })  # fmt: skip
    return rows


def _seconds(job: Job, scratch: Path) -> float:
    """Estimate the run's time by its heaviest decoder layer, and the gradients if it takes any."""
    prefixes = [f"{job.layers.name(index)}." for index in range(len(job.layers))]
    names = [[n for n in job.choices if n.startswith(prefix)] for prefix in prefixes]
    heaviest = max(range(len(names)), key=lambda index: _weights(job, names[index]))
    seconds = _layers_seconds(job, heaviest, sum(map(bool, names)), scratch)
    if "grad_norm" in job.pipeline.needs and job.saved is None:
        seconds += _gradient_seconds(job, heaviest)
    return seconds


@torch.no_grad()
def _layers_seconds(job: Job, index: int, num_pruned: int, scratch: Path) -> float:
    """Prune one decoder layer on a part of the text, and estimate all of them on all of it."""
    batches, every = _part(job), sum(batch.numel() for batch in job.batches())
    share = sum(batch.numel() for batch in batches) / every if every else 1.0
    opening = _timed(job, lambda: _open(job, index))
    walking = walk(job.layers, batches, how_to_walk(job, scratch, index), job.ranks)
    layer = next(layer for layer in walking if layer.index == index)
    layer.run(keep=False)  # the first pass sets up what later ones find ready
    running = _timed(job, lambda: layer.run(keep=False))
    observing = _timed(job, lambda: layer.visit(lambda local, stats: None))
    # Pruning observes the same text once more.
    own = max(_timed(job, lambda: _prune(job, layer)) - observing, 0.0)
    text = job.recipe.calibration
    twice = text is not None and (text.prefix, text.order) == ("pruned", "layer")
    passes = (observing + (twice + (job.training is not None)) * running) / share
    own /= share if job.training is not None else 1.0
    return len(job.layers) * (opening + passes) + num_pruned * own


def _open(job: Job, index: int) -> None:
    with job.layers.open(index):
        pass


def _part(job: Job) -> list[Tensor]:
    """Take the first batches of the text, or some samples where all of them are one batch."""
    batches = job.batches()
    if job.recipe.calibration is not None and job.recipe.calibration.order == "sequential":
        return [batch[: max(1, TOKENS // batch.shape[1])] for batch in batches]
    return batches[: max(1, TOKENS // batches[0].numel())] if batches else []


def _prune(job: Job, layer: DecoderLayer) -> None:
    packing = Packing(job.layers, job.recipe.to_dict(), {}, job.keeps_values, job.head)
    made_up = "grad_norm" in job.pipeline.needs and job.saved is None
    more = stored(job, StatsFolder(Path())) if not made_up else lambda index: _ones(layer)
    for name, weight in prune_layer(job, layer, more).weights.items():
        packing.pack(name, weight, job.choices[name].fmt)


def _ones(layer: DecoderLayer) -> LayerStats:
    """Stand in for gradient norms, which have not been taken."""
    return {
        local: {"grad_norm": torch.ones(linear.weight.shape), "num_samples": torch.tensor(1.0)}
        for local, linear in layer.linears.items()
    }


@torch.no_grad()
def _gradient_seconds(job: Job, index: int) -> float:
    """Time one sample up and down one decoder layer, and its loss; estimate all of them."""
    if job.windows is None:
        return 0.0
    layers, row = job.layers, job.windows[:1]
    layers.load_frame(head=True)
    states, call = next(capture(layers, [row]))
    with layers.open(index) as module:
        prefix = f"{layers.name(index)}."
        wanted = {n: m for n, m in linears(module).items() if prefix + n in job.choices}

        def down() -> None:
            out = call.run(module, index, states.detach().requires_grad_(True))
            torch.autograd.backward(out, torch.ones_like(out))

        with torch.enable_grad(), folding(wanted, job.pipeline.gradient_norm or "l2"):
            down()
            both = _timed(job, down)
        up = 0.0 if all_layers_fit(job) else _timed(job, lambda: call.run(module, index, states))
    with torch.enable_grad():
        last = states.detach().requires_grad_(True)
        head = _timed(job, lambda: loss(layers, row, last).backward())
    return len(job.windows) * (len(layers) * (both + up) + head)


def _timed(job: Job, work: Callable[[], Any]) -> float:
    """Give the seconds that some work takes, on a GPU until it has finished."""
    on_gpu = job.layers.device.type == "cuda"
    began = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize(job.layers.device)
    return time.perf_counter() - began


def _memory_bytes(job: Job, output: int) -> tuple[int, int]:
    """Bound the peak of host memory, and of the GPU's: what one layer took, and what it did not.

    Later come: all of the text at once, all decoder layers where gradients are taken with them in
    memory, and the shard that is being written.
    """
    device, layers = job.layers.device, job.layers
    cpu, inputs = torch.device("cpu"), job.activation_bytes()
    streams = inputs * (1 if job.training is None else 2)
    here = streams if fits(streams, cpu) else 0
    there, text = 0, job.recipe.calibration
    if text is not None and text.order == "sequential":
        tokens = sum(batch.numel() for batch in job.batches())
        there = _pass_bytes(job, tokens, FORWARD)
    if "grad_norm" in job.pipeline.needs and job.saved is None:
        if all_layers_fit(job):
            every = sum(p.numel() for p in layers.modules.parameters())
            sums = 4 * _weights(job, job.choices)
            kept = len(layers) * _pass_bytes(job, text.seq_len if text else 0, KEPT)
            there = max(there, every * layers.dtype.itemsize + sums + kept)
        else:
            stored_inputs = (len(layers) + 2) * inputs
            here = max(here, stored_inputs if fits(stored_inputs, cpu) else 0)
    shard = min(output, SHARD_BYTES) + (job.head.num_bytes if job.head else 0)
    if device.type == "cuda":
        gpu = int(MARGIN * (torch.cuda.max_memory_reserved(device) + there)) + SLACK
        return int(MARGIN * (_peak() + max(here, shard))) + SLACK, gpu
    return int(MARGIN * (_peak() + max(here + there, shard))) + SLACK, 0


def _pass_bytes(job: Job, tokens: int, values: tuple[int, int]) -> int:
    """Count what so many tokens hold in one decoder layer."""
    wide = max(max(linear.weight.shape) for linear in linears(job.layers.modules[0]).values())
    return 4 * tokens * (values[0] * hidden_size(job.layers.model) + values[1] * wide)


def _peak() -> int:
    """Give the most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
